"""The comparison of bricks: what is held equal, what is chosen on what, and that no run is made twice."""

import json
from dataclasses import replace

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.tasks.classification import comparison
from lipguide.tasks.classification.comparison import LOSSES, Plan, compare, training_steps

TOY = Plan(
    seconds=3.0,
    search=2.0,
    rates=(1e-4, 1e-2),
    seeds=(0, 1),
    parameters=0,
    batch_size=16,
    train_items=20,
    choosing_items=8,
    test_items=12,
)
COSTS = {"spectral": (1.0, 10.0), "shift": (0.5, 20.0)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare(folder, COSTS, CPU, TOY, tuple(COSTS))


def test_bricks_have_the_same_seconds_and_the_best_of_them_meets_the_other_losses(made):
    _, record = made
    assert {brick: row["steps"] for brick, row in record["bricks"].items()} == {"spectral": 3, "shift": 6}
    assert [row["milliseconds"] for row in record["bricks"].values()] == [1000, 500]
    means = {brick: row["36/255"]["mean"] for brick, row in record["bricks"].items()}
    assert means[record["best"]] == max(means.values())
    assert list(record["losses"]) == list(LOSSES)
    assert record["losses"]["offset"]["36/255"] == record["bricks"][record["best"]]["36/255"]
    for row in record["bricks"].values():
        for share in (row[k] for k in ("clean", "36/255", "72/255", "108/255")):
            assert 0 <= share["least"] <= share["mean"] <= share["most"] <= 100
        assert row["clean"]["mean"] >= row["36/255"]["mean"] >= row["108/255"]["mean"]


def test_a_rate_is_chosen_on_other_digits_than_those_that_judge(made):
    folder, record = made
    hashes = [split["hash"] for split in record["data"].values()]
    assert len(set(hashes)) == 3
    for brick, rates in record["searched"].items():
        assert rates[f"{record['bricks'][brick]['rate']:g}"] == max(rates.values())
        assert json.loads((folder / f"search-{brick}-0.01.json").read_text())["steps"] == 2 / COSTS[brick][0]


def test_nothing_is_trained_twice_and_a_run_of_another_plan_is_refused(made, monkeypatch):
    folder, record = made
    monkeypatch.setattr(comparison, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert compare(folder, COSTS, CPU, TOY, tuple(COSTS)) == record
    with pytest.raises(ValueError, match="made by another run .*move it away"):
        compare(folder, COSTS, CPU, replace(TOY, search=4.0), tuple(COSTS))


def test_the_command_times_once_and_writes_the_record(made, tmp_path, capsys, monkeypatch):
    _, record = made
    monkeypatch.setattr(comparison, "PLAN", TOY)
    asked = {}

    def toy(folder, costs, device):
        asked.update(costs)
        return record

    monkeypatch.setattr(comparison, "compare", toy)
    monkeypatch.setattr("lipguide.book.cost.compare", lambda steps: {name: _Cost(0.5, 7.0) for name in steps})
    call = ["compare", "--folder", str(tmp_path), "--device", "cpu"]
    assert main(call) == 0 and "on record" in capsys.readouterr().out
    assert read(tmp_path / "comparison.cpu.json")["results"]["best"] == record["best"]
    assert asked["sll"] == [0.5, 7.0]
    monkeypatch.setattr("lipguide.book.cost.compare", lambda steps: pytest.fail("timed again"))
    assert main(call) == 0


class _Cost:
    def __init__(self, seconds, mebibytes):
        self.seconds, self.mebibytes = seconds, mebibytes


def test_a_step_that_is_timed_is_a_step_of_training():
    step = training_steps(replace(TOY, batch_size=4), CPU)["orthogonal"]
    model, loss = step.__closure__[2].cell_contents, None
    assert loss is None
    before = {name: value.clone() for name, value in model.named_parameters()}
    step()
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())

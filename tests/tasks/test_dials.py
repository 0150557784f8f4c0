"""The sweep of the losses' dials: what is chosen on what, what three seeds say, and that no run is made twice."""

import json
import math
from dataclasses import replace

import pytest
import torch

import lipguide as lip
from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.robustness.attacks import pgd_l2
from lipguide.tasks.classification import dials
from lipguide.tasks.classification.dials import RADII, Grey, Plan, learn, measured, small_network, sweep
from lipguide.tasks.classification.runs import house_digits

TOY = Plan(seeds=(0, 1), steps=2, width=8, batch_size=8, train_scenes=8, choosing_scenes=6, test_scenes=7)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    return folder, sweep(folder, CPU, TOY)


def test_every_dial_turns_and_ranges_hold_their_means(made):
    folder, record = made
    assert {dial: len(rows) for dial, rows in record["dials"].items()} == {
        "temperature": 7,
        "margin": 7,
        "alpha": 6,
        "offset": 6,
        "annealing": 5,
        "EMMA": 4,
        "none": 5,
    }
    names = [row["name"] for rows in record["dials"].values() for row in rows]
    assert len(set(names)) == len(names) == len(list(folder.glob("*.json"))) / len(TOY.seeds)
    for row in sum(record["dials"].values(), []):
        assert row["curve"] == sorted(row["curve"], reverse=True) and len(row["curve"]) == len(RADII)
        for part, at in {"clean": 0.0, "quarter": 0.25, "half": 0.5}.items():
            assert row[part]["least"] <= row[part]["mean"] <= row[part]["most"]
            assert row[part]["mean"] == pytest.approx(row["curve"][RADII.index(at)])


def test_the_margin_of_hkr_is_chosen_on_digits_that_neither_train_nor_judge(made):
    _, record = made
    assert len({part["hash"] for part in record["data"].values()}) == 3
    best = max(row["chosen on"]["clean"] for row in record["dials"]["margin"])
    chosen = [row for row in record["dials"]["margin"] if row["value"] == record["margin"]]
    assert chosen[0]["chosen on"]["clean"] == best
    assert all(row["name"].endswith(f"m = {record['margin']:g}") for row in record["dials"]["alpha"])


def test_nothing_is_trained_twice_and_other_data_or_another_plan_are_refused(made, monkeypatch):
    folder, record = made
    monkeypatch.setattr(dials, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert sweep(folder, CPU, TOY) == record
    for other in (replace(TOY, steps=3), replace(TOY, test_scenes=6), replace(TOY, rate=0.1)):
        with pytest.raises(ValueError, match="made by another run .*move it away"):
            sweep(folder, CPU, other)


def test_a_run_repeats_bit_for_bit_and_seeds_differ(made, tmp_path):
    folder, _ = made
    names = [f"hinge--m-=-1-{seed}.json" for seed in TOY.seeds]
    again = dials._Runs(tmp_path, TOY, CPU)
    setting = next(setting for setting in dials.margins() if setting.value == 1)
    for name, seed in zip(names, TOY.seeds, strict=True):
        made_first = json.loads((folder / name).read_text())
        assert again.run(setting, seed) | {"seconds": 0} == made_first | {"seconds": 0}
    first, second = (json.loads((folder / name).read_text())["judged on"] for name in names)
    assert first != second


def test_what_learns_is_the_dense_part_and_the_bound_is_of_the_whole(monkeypatch):
    """The certificate is for the colour picture: no attack on it breaks one."""
    network, data = small_network(16), house_digits("test", 30, seed=0)
    before = [value.clone() for value in network.parameters()]
    learn(network, dials.others()[4].loss(), data.columns, replace(TOY, steps=20, batch_size=32))
    assert not any(map(torch.equal, before, network.parameters()))
    assert lip.lipschitz_bound(network, (3, 32, 32)).value == pytest.approx(1, abs=1e-4)
    images, labels = data.columns
    promised = measured(network, data)
    attacked = pgd_l2(network, images, labels, 0.25, steps=20)
    kept = 100 * (network(attacked).argmax(1) == labels).double().mean().item()
    assert promised[RADII.index(0.25)] <= kept <= promised[0] and promised[0] > 15


def test_grey_is_an_orthogonal_projection():
    grey = torch.autograd.functional.jacobian(lambda x: Grey()(x).flatten(), torch.rand(1, 3, 2, 2)).reshape(4, 12)
    assert torch.allclose(grey @ grey.mT, torch.eye(4), atol=1e-6)


@pytest.mark.parametrize("setting", [*dials.temperatures(), *dials.margins(), *dials.alphas(1.0), *dials.offsets()])
def test_a_setting_is_the_loss_of_its_own_value(setting):
    """Each factory keeps its own knob, not that of the last in the list."""
    loss, value = setting.loss(), setting.value
    knobs = {name: knob for name, knob in vars(loss).items() if isinstance(knob, int | float)}
    offset = 2 * math.sqrt(2) * value
    assert any(knob in (value, offset) for knob in knobs.values()), knobs


def test_the_command_puts_means_and_all_seconds_on_record(made, tmp_path, capsys, monkeypatch):
    _, record = made
    monkeypatch.setattr(dials, "sweep", lambda folder, device: record | {"seconds": 12.3456})
    assert main(["losses", "--folder", str(tmp_path), "--device", "cpu"]) == 0
    assert "on record" in capsys.readouterr().out
    kept = read(tmp_path / "losses.cpu.json")
    assert kept["results"]["margin"] == record["margin"] and kept["results"]["plan"]["steps"] == 2
    assert kept["provenance"]["seconds"] == 12.35
    assert kept["provenance"]["data"]["hash"] == record["data"]["judged on"]["hash"]

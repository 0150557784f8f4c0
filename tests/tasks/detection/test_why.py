"""Why the fully 1-Lipschitz Tinier SSD does not learn: the run, and its record."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.tasks.detection import why as module
from lipguide.tasks.detection.recipes import LARGE, Unlearnt, build
from lipguide.tasks.detection.study import Plan
from lipguide.tasks.detection.tinier_ssd import Parts, TinierSSD
from lipguide.tasks.detection.unlearnt import CHANGES
from lipguide.tasks.detection.why import why, why_weights
from lipguide.tasks.weights import TRAIN_SEED

RECORD = Path(__file__).resolve().parents[3] / "book" / "results" / "failed.cpu.json"


@dataclass(frozen=True)
class Toy(Unlearnt):
    """A network of one convolution and eight heads, in place of the variant with SLL."""

    def networks(self):
        def layer(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 3, padding=1)

        def toy():
            parts = Parts(layer, layer, layer, layer, lambda _: nn.MaxPool2d(2))
            return TinierSSD(parts, ((2, "2", "2"), ("2",), ("2",), ("2",)))

        return {"sll": toy}


@pytest.fixture
def tiny(monkeypatch):
    toy = Toy("sll", steps=2, batch_size=4, items=6, test_items=6)
    monkeypatch.setitem(LARGE, why_weights("sll"), toy)
    monkeypatch.setattr(module, "PLAN", Plan("", None, 2, 1, "float32"))
    return toy


def test_the_command_trains_evaluates_certifies_and_does_nothing_twice(tiny, tmp_path, capsys, monkeypatch):
    call = ["why", "--only", "sll", "--folder", str(tmp_path), "--device", "cpu"]
    assert main(call) == 0 and "on record" in capsys.readouterr().out
    record = read(tmp_path / "failed.cpu.json")
    (entry,) = record["results"]["networks"]
    assert entry["name"] == "sll" and entry["recipe"] == asdict(tiny) and entry["steps"] == 2
    assert entry["attacked_scenes"] == 2 and entry["lipschitz_bound"] > 0 and 0 <= entry["ranked_map50"] <= 100
    assert entry["certified_objects"] > 0 and entry["left"] > 0
    assert all(0 <= at["after"] <= at["before"] <= 100 for at in entry["certified"].values())
    assert record["provenance"]["data"]["hash"] in str(entry["run"]["data"])
    monkeypatch.setattr("lipguide.tasks.harness.train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr("lipguide.tasks.detection.study.evaluate", lambda *a, **k: pytest.fail("attacked again"))
    assert why(tmp_path, "cpu", only=["sll"])[0]["clean_map50"] == entry["clean_map50"]


def test_a_wrong_name_is_answered_with_those_that_there_are(capsys):
    assert main(["why", "--only", "magic"]) == 2
    assert "unknown change 'magic'; valid: spectral-norm, sll" in capsys.readouterr().err


def test_all_networks_are_trained_alike():
    recipes = [LARGE[why_weights(change)] for change in CHANGES]
    assert [recipe.network for recipe in recipes] == list(CHANGES)
    assert len({str(asdict(replace(recipe, network=""))) for recipe in recipes}) == 1


def test_the_record_is_that_of_the_recipes():
    record = read(RECORD)
    entries = record["results"]["networks"]
    assert {entry["name"] for entry in entries} <= set(CHANGES)
    assert {"spectral-norm", "together"} <= {entry["name"] for entry in entries}
    for entry in entries:
        recipe = LARGE[why_weights(entry["name"])]
        assert entry["recipe"] == asdict(recipe) and entry["steps"] == recipe.steps
        torch.manual_seed(0)
        assert entry["parameters"] == sum(p.numel() for p in build(recipe).parameters())
        assert entry["test"]["seed"] == TRAIN_SEED and entry["attacked_scenes"] == recipe.items
        assert set(entry["certified"]) == {str(eps) for eps in module.CERTIFIED}
        assert entry["strongest_map50"] <= entry["clean_map50_of_attacked_scenes"] + 1e-9
    assert len({(entry["test"]["hash"], str(entry["run"]["data"])) for entry in entries}) == 1

"""What each step to the reader that ships has gained: the run, and its record."""

from pathlib import Path

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.tasks import TEST_SEED, WEIGHTS
from lipguide.tasks.detection import trials as module
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.reader import HANDICAP, LEAST, RIVALS
from lipguide.tasks.detection.recipes import RECIPES
from lipguide.tasks.harness import trained
from lipguide.tasks.weights import run_of

RECORD = Path(__file__).resolve().parents[3] / "book" / "results" / "readers.cpu.json"
SHORT = module.Plan(scored=3, certified=2, grid=(0.1,), far=0.2)


@pytest.fixture(scope="module")
def scenes():
    return load_split("test", 4, TEST_SEED, torch.device("cpu"))


def test_a_trial_is_scored_and_certified_once(scenes, tmp_path, monkeypatch):
    entries = module.trials(tmp_path, scenes, SHORT)
    assert [entry["name"] for entry in entries] == list(module.TRIALS)
    for entry, trial in zip(entries, module.TRIALS.values(), strict=True):
        assert (entry["weights"], entry["handicap"], tuple(entry["near"])) == trial
        assert entry["threshold"] == LEAST and entry["by the block alone"]["eps"] == 0.2
        assert (entry["scenes"], entry["certified"]) == (3, 2)
        assert [row["eps"] for row in entry["certificates"]] == [0.1] and entry["certificates"][0]["found"] > 0
    without, with_it = entries[1:3]
    assert without["commit"] == with_it["commit"] and without["clean"]["detections"] < with_it["clean"]["detections"]
    monkeypatch.setattr(module, "answers", lambda *a, **k: pytest.fail("certified again"))
    assert module.trials(tmp_path, scenes, SHORT) == entries


def test_a_file_of_other_scenes_is_an_error(scenes, tmp_path):
    few, one = scenes.part(slice(1)), {"one": module.TRIALS["trained once"]}
    module.trials(tmp_path, few, SHORT, one)
    with pytest.raises(ValueError, match="made by another run"):
        module.trials(tmp_path, few._replace(hash="others"), SHORT, one)


def test_the_steps_are_those_of_the_recipes():
    first, second, third, last = module.TRIALS.values()
    assert RECIPES[second.weights].start == first.weights
    assert {second.weights, third.weights, last.weights} == {"detection-reader"}
    assert [trained(name)[0].handicap for name in (first.weights, last.weights)] == [first.handicap, last.handicap]
    assert (second.handicap, third.handicap, last.handicap) == (0, HANDICAP, HANDICAP)
    assert first.near == second.near == third.near and trained(last.weights)[0].near == last.near == RIVALS


def test_the_command_puts_them_on_record(tmp_path, monkeypatch, capsys, scenes):
    entry = {"name": "trained once"}
    monkeypatch.setattr(module, "trials", lambda folder, scenes: [entry])
    monkeypatch.setattr("lipguide.tasks.detection.data.load_split", lambda *a, **k: scenes)
    assert main(["readers", "--folder", str(tmp_path), "--device", "cpu"]) == 0
    assert "on record" in capsys.readouterr().out
    record = read(tmp_path / "readers.cpu.json")
    assert record["results"]["readers"] == [entry] and record["provenance"]["data"]["hash"] == scenes.hash


def test_the_record_is_of_the_weights_that_ship():
    entries = read(RECORD)["results"]["readers"]
    tried = {entry["name"]: (entry["weights"], entry["handicap"], tuple(entry["near"])) for entry in entries}
    assert tried == module.TRIALS
    for entry in entries:
        assert entry["commit"] == run_of(WEIGHTS / f"{entry['weights']}.safetensors")["commit"]
        assert (entry["scenes"], entry["certified"]) == (module.PLAN.scored, module.PLAN.certified)

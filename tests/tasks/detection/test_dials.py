"""What the dials of the reader's loss buy: the run, and its record."""

from dataclasses import replace

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.tasks import TEST_SEED
from lipguide.tasks.detection import dials as module
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.recipes import LARGE, RECIPES, Reading
from lipguide.tasks.harness import recipe_of

TOY = Reading("residual-reader", steps=2, batch_size=4, width=4, tau=5.0, start=None, items=8, test_items=4)
SHORT = module.Plan((0.1,), certified=2)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(LARGE, "detection-clean-reader", TOY)
    return "detection-clean-reader"


@pytest.fixture(scope="module")
def scenes():
    return load_split("test", 3, TEST_SEED, torch.device("cpu"))


def test_a_reader_is_trained_scored_and_certified_once(toy, scenes, tmp_path, monkeypatch):
    entries = module.dials(tmp_path, scenes, SHORT, ["detection-reader", toy])
    shipped, trained = entries
    assert [entry["recipe"]["tau"] for entry in entries] == [RECIPES["detection-reader"].tau, TOY.tau]
    assert (shipped["scenes"], shipped["certified"]) == (3, 2)
    assert shipped["clean"]["map50"] > trained["clean"]["map50"]
    assert [row["eps"] for row in shipped["certificates"]] == [0.1] and shipped["certificates"][0]["found"] > 0
    assert (tmp_path / f"{toy}.safetensors").exists() and not (tmp_path / "detection-reader.safetensors").exists()
    monkeypatch.setattr("lipguide.tasks.harness.train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(module, "answers", lambda *a, **k: pytest.fail("certified again"))
    assert module.dials(tmp_path, scenes, SHORT, ["detection-reader", toy]) == entries


def test_a_file_of_other_scenes_is_an_error(scenes, tmp_path):
    few = scenes.part(slice(1))
    module.dials(tmp_path, few, SHORT, ["detection-reader"])
    with pytest.raises(ValueError, match="made by another run"):
        module.dials(tmp_path, few._replace(hash="others"), SHORT, ["detection-reader"])


def test_the_ends_differ_in_nothing_but_the_dials_of_their_loss():
    recipes = [recipe_of(name)[1] for name in module.ENDS]
    assert {recipe.start for recipe in recipes} == {module.FIRST}
    assert len({replace(recipe, tau=1.0, offset=0.0) for recipe in recipes}) == 1
    assert len({(recipe.tau, recipe.offset) for recipe in recipes}) == len(recipes)


def test_the_command_puts_them_on_record(tmp_path, monkeypatch, capsys, scenes):
    entry = {"name": "detection-reader", "seconds": 1.5}
    monkeypatch.setattr(module, "dials", lambda folder, scenes: [entry])
    monkeypatch.setattr("lipguide.tasks.detection.data.load_split", lambda *a, **k: scenes)
    assert main(["readers", "--folder", str(tmp_path), "--device", "cpu"]) == 0
    assert "on record" in capsys.readouterr().out
    record = read(tmp_path / "readers.cpu.json")
    assert record["results"]["readers"] == [entry] and record["provenance"]["data"]["hash"] == scenes.hash

"""How like SVHN the twin is: the looks that need no label, and the command that measures everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.book.likeness import SHARES, distance, looks
from lipguide.data import SyntheticHouseNumbers
from lipguide.tasks.harness import recipe_of

QUICKLY = ["--versions", "1", "3", "--size", "12", "--lessons", "8", "--epochs", "1", "--attacked", "2"]
QUICKLY += ["--attack-steps", "1", "--classifier-steps", "2", "--detector-steps", "2", "--seeds", "2"]
QUICKLY += ["--device", "cpu"]


def few(monkeypatch) -> None:
    """Let the recipes take a few scenes instead of all, and fewer at a time."""

    def shorter(name: str):
        task, recipe = recipe_of(name)
        return task, replace(recipe, items=80, test_items=8, batch_size=8)

    monkeypatch.setattr("lipguide.book.likeness.recipe_of", shorter)


def patterned(count: int, seed: int) -> torch.Tensor:
    """Soft random pictures (N, 3, 32, 32) in [0.2, 0.6]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return 0.2 + 0.4 * torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")


def test_every_look_sees_its_own_change_and_little_else():
    images = patterned(60, 0)
    grey = images.mean(1, keepdim=True).expand_as(images)
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    changes = {
        "brightness": images + 0.3,
        "colourfulness": grey + 2.0 * (images - grey),
        "contrast": 0.5 * images,
        "sharpness": images + noise,
        "grain": images + noise,
    }
    before = looks(images)
    middle = SHARES.index(50)
    for name, changed in changes.items():
        after = looks(changed)
        assert abs(after[name][middle] / before[name][middle] - 1) > 0.2, name
    brighter = looks(changes["brightness"])
    for name in set(before) - {"brightness"}:
        assert brighter[name] == pytest.approx(before[name], abs=2e-4), name


def test_dark_ink_on_a_light_ground_is_told_from_light_on_dark():
    page = torch.full((4, 3, 32, 32), 0.8)
    page[:, :, 8:24, 12:20] = 0.1
    assert looks(page)["dark on light"][0] < -0.1
    assert looks(1 - page)["dark on light"][0] > 0.1


def test_distance_is_zero_for_the_same_and_one_for_a_shift_by_the_spread():
    assert distance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.0
    assert distance([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]) == 1.0


def test_compare_measures_a_real_folder_and_keeps_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "cache"))
    real = SyntheticHouseNumbers("test", 10, seed=77, cache=False)
    real.save(tmp_path / "svhn")
    few(monkeypatch)
    arguments = ["--svhn", str(tmp_path / "svhn"), "--folder", str(tmp_path / "made"), *QUICKLY]
    assert main(["data", "compare", *arguments]) == 0
    record = read(tmp_path / "made" / "likeness.cpu.json")
    assert record["provenance"]["data"]["name"] == "SVHN, test, 10 pictures" and record["provenance"]["threads"] == 1
    found = record["results"]
    assert found["digits"]["svhn"] == sum(len(note.labels) for note in real.annotations())
    assert found["pictures"] == {"svhn": 10, "shn1": 12, "shn3": 12} and found["windows"]["svhn"] <= 10
    # The real folder is synthetic here, and what ships has learnt from synthetic scenes.
    assert found["classifier"]["shn3"]["svhn"]["accuracy"] > 50 and found["detector"]["shn3"]["svhn"]["map50"] > 40
    assert found["detector"]["shn3"]["svhn"]["attacked"] == 2
    assert found["detector"]["shn3"]["run"]["steps"] == 3788 and found["detector"]["shn1"]["run"]["steps"] == 2
    assert found["detector"]["shn3"]["run"]["data"].startswith("Synthetic House Numbers 3, train")
    for name, seeds in found["classifiers"].items():  # the shipped network, then one of two steps; two of two steps
        assert seeds["accuracy"][0] == found["classifier"][name]["svhn"]["accuracy"] and len(seeds["log_loss"]) == 2
    (ships, small), (one, other) = (found["classifiers"][name]["log_loss"] for name in ("shn3", "shn1"))
    assert ships < 1 and len({small, one, other}) == 3
    first, second = (sum(found["classifiers"][name]["accuracy"]) / 2 for name in ("shn1", "shn3"))
    assert list(found["gain"]) == ["shn3"] and found["gain"]["shn3"]["error"] > 0
    assert found["gain"]["shn3"]["points"] == pytest.approx(second - first)
    printed = capsys.readouterr().out
    assert "by 2 seeds, from shn3" in printed
    row = next(line for line in printed.splitlines() if line.startswith("classification-ordinary, learnt from shn1"))
    read_right = (found["classifier"]["shn1"][name]["accuracy"] for name in ("svhn", "shn1", "shn3"))
    assert row.split()[-3:] == [f"{share:.2f}" for share in read_right]

    # What was trained and measured is not done again, nor taken for something else.
    for name in ("train_by", "train_reader", "_find", "_read"):
        monkeypatch.setattr(f"lipguide.book.likeness.{name}", lambda *_, **__: pytest.fail("done again"))
    assert main(["data", "compare", *arguments]) == 0
    assert read(tmp_path / "made" / "likeness.cpu.json")["results"] == found
    assert main(["data", "compare", *arguments, "--detector-steps", "3"]) == 1
    assert "steps = 2 there, 3 here" in capsys.readouterr().err
    assert main(["data", "compare", *arguments, "--detector-steps", "0", "--classifier-steps", "0"]) == 0
    ships = read(tmp_path / "made" / "likeness.cpu.json")["results"]
    assert list(ships["detector"]) == list(ships["classifier"]) == ["shn3"]
    assert ships["reader"] == found["reader"] and len(ships["classifiers"]["shn3"]["accuracy"]) == 1
    assert ships["gain"] == {}
    assert main(["data", "compare", *arguments, "--versions", "3"]) == 0
    alone = read(tmp_path / "made" / "likeness.cpu.json")["results"]
    assert list(alone["reader"]) == ["shn3"] and set(alone["looks"]) == {"svhn", "shn3"} and alone["gain"] == {}
    assert alone["classifier"]["shn3"]["svhn"] == found["classifier"]["shn3"]["svhn"]

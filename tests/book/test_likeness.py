"""How like SVHN the twin is: the looks that need no label, and the command that measures everything."""

from __future__ import annotations

import json

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.likeness import SHARES, distance, looks
from lipguide.data import SyntheticHouseNumbers


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
    arguments = ["--svhn", str(tmp_path / "svhn"), "--size", "12", "--epochs", "1", "--device", "cpu"]
    assert main(["data", "compare", *arguments, "--record", str(tmp_path / "record.json")]) == 0
    found = json.loads((tmp_path / "record.json").read_text())["results"]
    assert found["digits"]["svhn"] == sum(len(note.labels) for note in real.annotations())
    assert found["scenes"] == {"svhn": 10, "shn": 12, "lessons": 12} and found["windows"]["svhn"] <= 10
    # The real folder is synthetic here, and what ships has learnt from synthetic scenes.
    assert found["classifier"]["svhn"]["accuracy"] > 50 and found["detector"]["svhn"]["map50"] > 40
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("classification-ordinary, digits read"))
    assert row.split()[-2:] == [f"{found['classifier'][name]['accuracy']:.2f}" for name in ("svhn", "shn")]

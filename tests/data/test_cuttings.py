"""Squares of scenes that are kept in files: the same as cut in memory, whoever makes them and whatever happens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from lipguide.data import SyntheticHouseNumbers, digits, scenes
from lipguide.data.crops import Cutting
from lipguide.data.shn import cuttings as module
from lipguide.data.shn.cuttings import make_rows, tallies
from lipguide.data.shn.pages import Pages

VIEWS = [Cutting("number", 20, 3), Cutting("frame", 20), Cutting("digits", 32)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def bare():
    return SyntheticHouseNumbers("train", 40, seed=6, cache=False)


def files() -> list[Path]:
    return sorted(Path(os.environ["LIPGUIDE_CACHE"]).rglob("*.map"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("cutting", VIEWS, ids=lambda c: c.view)
def test_from_the_file_comes_what_is_cut_in_memory(bare, cutting):
    kept = SyntheticHouseNumbers("train", 40, seed=6)
    for _ in range(2):  # made, then found
        assert same(kept.cuttings(cutting), bare.cuttings(cutting))
    assert len(files()) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_data_set_of_scenes_gives_the_same(bare, dtype):
    """A `Subset` is cut scene by scene, as real scenes are."""
    kept = SyntheticHouseNumbers("train", 40, seed=6)
    plain = Subset(bare, range(40))
    for a, b in zip(scenes(kept, 20, seed=3, dtype=dtype), scenes(plain, 20, seed=3, dtype=dtype), strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
    for a, b in zip(digits(kept, dtype), digits(plain, dtype), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("cutting", VIEWS, ids=lambda c: c.view)
def test_what_comes_of_a_scene_is_known_before_it_is_opened(bare, cutting):
    rows, inked = tallies(bare._pages, cutting)
    for index in range(len(bare)):
        found = make_rows(bare._pages, range(index, index + 1), cutting)
        assert len(found["images"]) == rows[index] and len(found["labels"]) == inked[index]
    if cutting.view == "number":
        assert 0 < rows.sum() < len(bare)  # some are dropped


def test_a_scene_whose_digits_lie_outside_gives_no_square():
    scene = SyntheticHouseNumbers("train", 1, seed=6, cache=False)._pages[0]
    pages = Pages.of([scene._replace(boxes=scene.boxes + [5000, 0, 0, 0])])
    for cutting in VIEWS:
        rows, inked = (int(tally.sum()) for tally in tallies(pages, cutting))
        assert inked == 0 and rows == (cutting.view == "frame")
        assert len(make_rows(pages, range(1), cutting)["images"]) == rows


def test_processes_make_the_same_file(monkeypatch):
    """With blocks as they are, and processes for a set that is worth none."""
    size = module.BLOCK + 9
    alone = SyntheticHouseNumbers("test", size, seed=2, workers=1)
    expected = [alone.cuttings(cutting) for cutting in VIEWS]
    for path in files():
        path.unlink()
    monkeypatch.setattr(module, "APART", 1)
    monkeypatch.setattr(module, "_fill", lambda *_: pytest.fail("made here"))
    shared = SyntheticHouseNumbers("test", size, seed=2, workers=2)
    assert all(same(shared.cuttings(cutting), rows) for cutting, rows in zip(VIEWS, expected, strict=True))


def test_a_longer_file_serves_a_shorter_set_and_takes_its_place(bare, monkeypatch):
    few, many = (SyntheticHouseNumbers("train", size, seed=6) for size in (7, 40))
    assert len(few.cuttings(VIEWS[0])["images"]) and [path.name for path in files()] == ["000007.map"]
    many.cuttings(VIEWS[0])
    assert [path.name for path in files()] == ["000040.map"]
    monkeypatch.setattr(module, "make_rows", lambda *_: pytest.fail("cut again"))
    assert same(few.cuttings(VIEWS[0]), make_rows(bare._pages, range(7), VIEWS[0]))


def test_another_view_size_or_seed_is_another_file():
    data = SyntheticHouseNumbers("train", 3, seed=6)
    others = [*VIEWS, Cutting("number", 20, 4), Cutting("number", 21, 3)]
    for cutting in others:
        data.cuttings(cutting)
    assert len(files()) == len(others)


@pytest.mark.parametrize("place", [10, 4096 + 700, -80, None], ids=["head", "a picture", "the end", "cut off"])
def test_a_damaged_file_is_made_again(bare, place):
    data = SyntheticHouseNumbers("train", 40, seed=6)
    data.cuttings(VIEWS[0])
    (path,) = files()
    content = bytearray(path.read_bytes())
    if place is None:
        del content[len(content) // 2 :]
    else:
        content[place] ^= 0x10
    path.write_bytes(content)
    assert same(data.cuttings(VIEWS[0]), bare.cuttings(VIEWS[0]))
    assert path.read_bytes() != bytes(content)


def test_an_interrupted_making_leaves_nothing_and_the_next_one_succeeds(bare, monkeypatch):
    data = SyntheticHouseNumbers("train", 40, seed=6)
    monkeypatch.setattr(module, "seal", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.cuttings(VIEWS[0])
    assert not [path for path in Path(os.environ["LIPGUIDE_CACHE"], "cuttings").rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert same(data.cuttings(VIEWS[0]), bare.cuttings(VIEWS[0]))


def test_who_writes_to_a_picture_changes_neither_the_file_nor_the_next_reader(bare):
    data = SyntheticHouseNumbers("train", 40, seed=6)
    first = scenes(data, 20, seed=3, dtype=torch.uint8).images
    before = first.clone()
    (path,) = files()
    content = path.read_bytes()
    first.zero_()
    assert path.read_bytes() == content
    assert torch.equal(scenes(data, 20, seed=3, dtype=torch.uint8).images, before)


def test_pictures_as_bytes_are_the_file_itself():
    """No copy: what is written to the file shows in the tensor, as its pages were not read before."""
    data = SyntheticHouseNumbers("train", 40, seed=6)
    images = scenes(data, 20, seed=3, dtype=torch.uint8).images
    (path,) = files()
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes([images[0, 0, 0, 0].item() ^ 0xFF]))
    assert images[0, 0, 0, 0] == path.read_bytes()[4096]


def test_where_nothing_can_be_written_scenes_that_are_there_are_cut_anew(bare, monkeypatch):
    data = SyntheticHouseNumbers("train", 40, seed=6)
    monkeypatch.setattr(module, "prepare", lambda _: (_ for _ in ()).throw(OSError("read-only")))
    assert same(data.cuttings(VIEWS[0]), bare.cuttings(VIEWS[0])) and files() == []


FILLS = """
from lipguide.data import SyntheticHouseNumbers
from lipguide.data.crops import Cutting
import hashlib
rows = SyntheticHouseNumbers("train", 40, seed=6).cuttings(Cutting("number", 20, 3))
print(hashlib.sha256(rows["images"].tobytes()).hexdigest())
"""


def test_two_processes_may_make_the_same_file(bare, forked, tmp_path):
    processes = forked.ranks(FILLS, tmp_path)
    assert all(process.returncode == 0 for process in processes), processes
    assert len({process.stdout for process in processes}) == 1
    assert len(files()) == 1 and same(bare.cuttings(VIEWS[0]), SyntheticHouseNumbers("train", 40, 6).cuttings(VIEWS[0]))


def test_a_full_disk_is_named_with_what_would_do():
    data = SyntheticHouseNumbers("train", 40, seed=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "put", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left.*set LIPGUIDE_CACHE to another folder"):
            data.cuttings(VIEWS[0])
    assert files() == []

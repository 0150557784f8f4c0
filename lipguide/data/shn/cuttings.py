"""Squares cut out of scenes, kept: cut once, by several processes, and mapped into memory from then on.

A file holds the squares of the first so many scenes, and serves whoever wants no more than these. The name of its
folder is a hash of the scenes' own key, of what is cut, and of the code that cuts.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lipguide.data.crops import Cutting, inside, square_around, stacked, visible
from lipguide.data.mapped import map_arrays, put, reserve, seal
from lipguide.data.npz import DamagedFile
from lipguide.data.shn.cache import BLOCK, PACKAGE, prepare, stored, unwritable
from lipguide.data.shn.pages import Pages, decode
from lipguide.data.shn.processes import share
from lipguide.data.sources import hash_of
from lipguide.files import cache_folder, replacing

__all__ = ["Part", "cuttings_hash", "fill_from_block", "kept_cuttings", "make_rows", "tallies"]

CUTTERS = [PACKAGE / "data" / name for name in ("crops.py", "mapped.py", "shn/pages.py", "shn/cuttings.py")]
APART = 8 * BLOCK  # from so many scenes on it is worth starting processes
Row = dict[str, np.ndarray]


class Part(NamedTuple):
    """The squares of a block of scenes: which block, how many scenes, and where in the file its first square and its
    first digit go."""

    block: int
    count: int
    row: int
    digit: int


def cuttings_hash(scenes: str, cutting: Cutting) -> str:
    """Name of the folder for what is cut out of the scenes with this key: 24 hexadecimal digits.

    >>> cuttings_hash("abc", Cutting("frame", 74)) == cuttings_hash("abc", Cutting("number", 74))
    False
    """
    text = hash_of(CUTTERS) + json.dumps([scenes, astuple(cutting)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def make_rows(pages: Pages, scenes: range, cutting: Cutting, start: int = 0) -> Row:
    """What is cut out of some of the scenes; the first scene of the pages is number `start` of its data set."""
    return stacked(cutting, (_rows(pages, index, cutting, start) for index in scenes))


def _rows(pages: Pages, index: int, cutting: Cutting, start: int) -> Row:
    scene = pages[index]
    pixels, mask = decode(scene)
    corners, labels, mask = visible(scene.boxes, scene.labels, mask, scene.width, scene.height)
    return cutting.rows(pixels, corners, labels, mask, start + index)


def tallies(pages: Pages, cutting: Cutting) -> tuple[np.ndarray, np.ndarray]:
    """How many squares, and how many digits in these, come of each scene: known without opening a picture."""
    widths, heights = pages.arrays["sizes"].T
    owner = np.repeat(np.arange(len(pages)), np.diff(pages.arrays["digits"]))
    corners, seen = inside(pages.arrays["boxes"], widths[owner], heights[owner])
    corners, owner = corners[seen], owner[seen]
    digits = np.bincount(owner, minlength=len(pages))
    if cutting.view == "digits":
        return digits, digits
    if cutting.view == "frame":
        return np.ones_like(digits), digits
    fits = _fits(corners.astype(np.float64), owner, widths, heights) & (digits > 0)
    return fits.astype(int), digits * fits


def _fits(corners: np.ndarray, owner: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Whether a square around all boxes of a scene fits the picture."""
    near = np.full((2, len(widths)), 1e9)  # x and y of the corners around all
    far = np.full((2, len(widths)), -1e9)
    sides = np.stack([widths, heights])
    for axis in (0, 1):
        np.minimum.at(near[axis], owner, np.floor(corners[:, axis] * sides[axis, owner]))
        np.maximum.at(far[axis], owner, np.ceil(corners[:, axis + 2] * sides[axis, owner]))
    first, last, _ = square_around(near, far, sides)
    return (first <= last).all(axis=0)


def kept_cuttings(pages: Pages, scenes: str, cutting: Cutting, workers: int) -> Row:
    """What is cut out of all scenes, from its file; made first if there is none. Files of fewer scenes go then.

    Where nothing can be written, but the scenes can be read, it is cut anew every time.

    Args:
        scenes: the key of the pages; see `lipguide.data.shn.cache.content_hash`.
    """
    folder = cache_folder("cuttings", cuttings_hash(scenes, cutting))
    rows, digits = tallies(pages, cutting)
    arrays = _found(folder, len(pages))
    if arrays is None:
        try:
            prepare(folder)
        except OSError:
            return make_rows(pages, range(len(pages)), cutting)
        path = folder / f"{len(pages):06d}.map"
        _make(path, pages, cache_folder("shn", scenes), cutting, (rows, digits), workers)
        arrays = map_arrays(path)
        _drop_shorter(folder, path.name)
    counts = {name: digits.sum() if name in ("boxes", "labels") else rows.sum() for name in arrays}
    return {name: array[: counts[name]] for name, array in arrays.items()}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".map") and name[:-4].isdigit())
    except OSError:
        return []


def _found(folder: Path, count: int) -> Row | None:
    """The arrays of a file of at least so many scenes; a damaged file counts as none."""
    for name in _names(folder):
        if int(name[:-4]) >= count:
            try:
                return map_arrays(folder / name)
            except (OSError, DamagedFile):
                continue
    return None


def _drop_shorter(folder: Path, longest: str) -> None:
    for name in _names(folder):
        if int(name[:-4]) < int(longest[:-4]):
            try:
                os.unlink(folder / name)
            except OSError:  # another process has done so, or the system lets none of those go that are in use
                continue


def _make(
    path: Path, pages: Pages, folder: Path, cutting: Cutting, tally: tuple[np.ndarray, np.ndarray], workers: int
) -> None:
    """Write the file of all scenes, here or with processes that read the scenes' own files."""
    rows, digits = tally
    ends = [(int(rows[:k].sum()), int(digits[:k].sum())) for k in range(0, len(pages), BLOCK)]
    parts = [Part(k, min(BLOCK, len(pages) - k * BLOCK), *end) for k, end in enumerate(ends)]
    name = f"{cutting.view}, {cutting.side} pixels"
    try:
        with replacing(path) as temporary, tqdm(total=len(pages), unit="scene", desc=name, disable=None) as bar:
            reserve(temporary, cutting.kinds(int(rows.sum()), int(digits.sum())))
            if workers > 1 and len(pages) >= APART:
                task = {"make": "cuttings", "file": str(temporary), "folder": str(folder), "cutting": asdict(cutting)}
                share(task, parts, workers, bar)
            else:
                for part in parts:
                    scenes = range(part.block * BLOCK, part.block * BLOCK + part.count)
                    _fill(temporary, make_rows(pages, scenes, cutting), part)
                    bar.update(part.count)
            seal(temporary)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def _fill(path: Path, arrays: Row, part: Part) -> None:
    for name, values in arrays.items():
        put(path, name, part.digit if name in ("boxes", "labels") else part.row, values)


def fill_from_block(path: Path, folder: Path, cutting: Cutting, part: Part) -> None:
    """Write a part of the file, of a block of scenes that is read from its own."""
    pages = stored(folder, part.block, part.count)
    if pages is None:
        raise OSError(f"block {part.block} of the scenes has gone from {folder}: run this again, and it is made anew")
    _fill(path, make_rows(pages, range(part.count), cutting, part.block * BLOCK), part)

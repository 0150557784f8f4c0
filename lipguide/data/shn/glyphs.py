"""Distance fields of glyphs in one file a typeface, for all processes: to draw them all takes seconds."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
from PIL import Image

from lipguide.data.npz import DamagedFile, load_arrays, save_arrays
from lipguide.data.shn.typefaces import FACES, GLYPHS, Glyph, draw_glyph

__all__ = ["glyphs_missing", "keep_drawn", "keep_glyphs", "take_glyphs"]

SIGNS: tuple[int | str, ...] = (*range(10), *string.ascii_uppercase, "a", "b")
# Of all glyphs of a file, one after the other; signs: their places in SIGNS.
ARRAYS = ("signs", "cells", "sizes", "hulls", "corners", "places")


def _signs(face: int) -> tuple[int | str, ...]:
    return SIGNS if FACES[face].prints else SIGNS[:10]


def _path(folder: Path, face: int) -> Path:
    return folder / f"{face:03d}.npz"


def _read(folder: Path, face: int) -> dict[str, np.ndarray] | None:
    """The arrays of a face's file; None where there is none, or a damaged one."""
    try:
        return load_arrays(_path(folder, face), ARRAYS)
    except (OSError, DamagedFile):
        return None


def glyphs_missing(folder: Path) -> list[int]:
    """The faces of which the folder has not all glyphs."""
    kept = {face: _read(folder, face) for face in range(len(FACES))}
    return [face for face, arrays in kept.items() if arrays is None or len(arrays["signs"]) < len(_signs(face))]


def keep_glyphs(folder: Path, face: int) -> None:
    """Draw all glyphs of a face, and write them into its file."""
    _write(folder, face, {sign: draw_glyph(face, sign) for sign in _signs(face)})


def keep_drawn(folder: Path) -> None:
    """Write what glyphs this process has drawn, where it has more of a face than the file; nothing is drawn for it."""
    for face in range(len(FACES)):
        own = {sign: GLYPHS[face, sign] for sign in _signs(face) if (face, sign) in GLYPHS}
        kept = _read(folder, face)
        if len(own) > (0 if kept is None else len(kept["signs"])):
            _write(folder, face, own)


def _write(folder: Path, face: int, glyphs: dict[int | str, Glyph]) -> None:
    fields = [np.asarray(glyph.field) for glyph in glyphs.values()]
    arrays = {
        "signs": np.array([SIGNS.index(sign) for sign in glyphs]),
        "cells": np.concatenate([field.ravel() for field in fields]),
        "sizes": np.array([field.shape for field in fields]),
        "hulls": np.concatenate([glyph.hull for glyph in glyphs.values()]),
        "corners": np.array([len(glyph.hull) for glyph in glyphs.values()]),
        "places": np.array([(glyph.cell, *glyph.origin) for glyph in glyphs.values()]),
    }
    save_arrays(_path(folder, face), arrays)


def take_glyphs(folder: Path) -> None:
    """Have this process draw with the glyphs in the folder. What is missing there, or damaged, it draws itself."""
    for face in range(len(FACES)):
        arrays = _read(folder, face)
        if arrays is None:
            continue
        fields = np.split(arrays["cells"], np.cumsum(arrays["sizes"].prod(axis=1))[:-1])
        hulls = np.split(arrays["hulls"], np.cumsum(arrays["corners"])[:-1])
        for k, place in enumerate(arrays["signs"].tolist()):
            field = Image.fromarray(fields[k].reshape(arrays["sizes"][k]))
            cell, x, y = (float(value) for value in arrays["places"][k])
            GLYPHS.setdefault((face, SIGNS[place]), Glyph(field, hulls[k], cell, (x, y)))

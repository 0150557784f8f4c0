"""Distance fields of all glyphs in one file a typeface, made once for all processes: to draw them takes seconds."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
from PIL import Image

from lipguide.data.npz import DamagedFile, load_arrays, save_arrays
from lipguide.data.shn.typefaces import FACES, GLYPHS, Glyph, draw_glyph

__all__ = ["glyphs_missing", "keep_glyphs", "take_glyphs"]

SIGNS: tuple[int | str, ...] = (*range(10), *string.ascii_uppercase, "a", "b")
ARRAYS = ("cells", "sizes", "hulls", "corners", "places")  # of all glyphs of a face, one after the other


def _signs(face: int) -> tuple[int | str, ...]:
    return SIGNS if FACES[face].prints else SIGNS[:10]


def _path(folder: Path, face: int) -> Path:
    return folder / f"{face:03d}.npz"


def glyphs_missing(folder: Path) -> list[int]:
    """The faces of which the folder has no file."""
    return [face for face in range(len(FACES)) if not _path(folder, face).exists()]


def keep_glyphs(folder: Path, face: int) -> None:
    """Draw all glyphs of a face, and write them into its file."""
    glyphs = [draw_glyph(face, sign) for sign in _signs(face)]
    fields = [np.asarray(glyph.field) for glyph in glyphs]
    arrays = {
        "cells": np.concatenate([field.ravel() for field in fields]),
        "sizes": np.array([field.shape for field in fields]),
        "hulls": np.concatenate([glyph.hull for glyph in glyphs]),
        "corners": np.array([len(glyph.hull) for glyph in glyphs]),
        "places": np.array([(glyph.cell, *glyph.origin) for glyph in glyphs]),
    }
    save_arrays(_path(folder, face), arrays)


def take_glyphs(folder: Path) -> None:
    """Have this process draw with the glyphs in the folder. A face that is missing or damaged it draws itself."""
    for face in range(len(FACES)):
        try:
            arrays = load_arrays(_path(folder, face), ARRAYS)
        except (OSError, DamagedFile):
            continue
        fields = np.split(arrays["cells"], np.cumsum(arrays["sizes"].prod(axis=1))[:-1])
        hulls = np.split(arrays["hulls"], np.cumsum(arrays["corners"])[:-1])
        for k, sign in enumerate(_signs(face)):
            field = Image.fromarray(fields[k].reshape(arrays["sizes"][k]))
            cell, x, y = (float(value) for value in arrays["places"][k])
            GLYPHS[face, sign] = Glyph(field, hulls[k], cell, (x, y))

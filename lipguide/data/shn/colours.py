"""Colours of walls, plates and numbers, and how far a number must stand out from what it is on."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np

__all__ = ["Palette", "luminance", "sample_palette", "set_apart"]

WALLS = (  # name, sRGB, share
    ("white paint", (226, 224, 218), 8),
    ("cream", (214, 203, 178), 8),
    ("beige", (190, 174, 146), 9),
    ("sand", (168, 150, 122), 6),
    ("light grey", (182, 183, 184), 6),
    ("grey", (132, 133, 134), 6),
    ("dark grey", (78, 80, 85), 6),
    ("stone", (158, 149, 134), 6),
    ("red brick", (138, 78, 62), 7),
    ("dark brick", (102, 62, 52), 4),
    ("orange brick", (172, 112, 84), 4),
    ("brown", (108, 76, 52), 6),
    ("dark wood", (66, 46, 36), 5),
    ("green paint", (86, 106, 88), 3),
    ("dark green", (38, 58, 48), 4),
    ("navy", (40, 50, 82), 4),
    ("blue grey", (108, 124, 142), 5),
    ("pale blue", (158, 178, 194), 3),
    ("black", (34, 34, 38), 6),
    ("ochre", (198, 164, 102), 3),
    ("salmon", (198, 152, 138), 3),
    ("maroon", (94, 38, 38), 3),
    ("dark glass", (52, 58, 66), 5),
    ("pale green", (172, 184, 160), 2),
)
NUMBERS = (
    ("black", (26, 26, 29), 22),
    ("white", (236, 235, 230), 20),
    ("brass", (178, 142, 76), 7),
    ("gold", (214, 178, 98), 7),
    ("bronze", (82, 62, 44), 6),
    ("silver", (178, 180, 184), 7),
    ("chrome", (208, 211, 216), 4),
    ("navy", (32, 44, 92), 4),
    ("red", (158, 40, 38), 4),
    ("green", (32, 84, 56), 2),
    ("yellow", (222, 188, 74), 3),
    ("cream", (224, 212, 182), 5),
    ("copper", (158, 94, 64), 2),
    ("grey", (112, 113, 116), 4),
    ("blue", (40, 74, 150), 3),
)
PLATES = (  # plate and the number on it
    ((232, 231, 226), (28, 28, 32), 8),
    ((30, 46, 104), (236, 236, 234), 6),
    ((30, 30, 34), (232, 230, 224), 5),
    ((184, 150, 84), (30, 26, 22), 4),
    ((34, 74, 56), (234, 232, 222), 2),
    ((62, 64, 68), (222, 222, 222), 3),
    ((112, 78, 50), (226, 214, 186), 3),
    ((226, 214, 184), (58, 42, 34), 3),
    ((214, 214, 214), (36, 58, 128), 3),
    ((150, 34, 34), (236, 232, 226), 2),
    ((176, 178, 180), (40, 40, 44), 3),
    ((238, 236, 228), (148, 36, 34), 2),
    ((96, 100, 104), (30, 30, 32), 2),
    ((68, 52, 42), (204, 168, 92), 3),
)
METALS = ("brass", "gold", "silver", "chrome", "bronze", "copper")
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, eq=False)
class Palette:
    """Colours as (3,) float32 in [0, 1]; `material` names the wall, `metal` says whether the number is of metal.

    >>> sample_palette(np.random.default_rng(0)).wall.shape
    (3,)
    """

    wall: np.ndarray
    other: np.ndarray
    plate: np.ndarray
    number: np.ndarray
    on_plate: np.ndarray
    material: str
    metal: bool


def luminance(colour: np.ndarray) -> float:
    """Brightness 0.299 R + 0.587 G + 0.114 B as the eye weighs it.

    >>> round(luminance(np.ones(3)), 6)
    1.0
    """
    return float(LUMA[0] * colour[0] + LUMA[1] * colour[1] + LUMA[2] * colour[2])


@cache
def _shares(table: tuple) -> list[int]:
    """The shares of the rows, each added to those before it."""
    return list(accumulate(row[-1] for row in table))


def _choose(table: tuple, rng: np.random.Generator) -> tuple:
    shares = _shares(table)
    return table[bisect_right(shares, rng.random() * shares[-1])]


def _vary(colour: tuple[int, int, int], rng: np.random.Generator, amount: float) -> np.ndarray:
    """The colour with its brightness and its tint varied, in [0, 1]."""
    value = np.array(colour, dtype=np.float64) / 255.0
    value = value * (1 + amount * 1.4 * rng.standard_normal()) + amount * 0.5 * rng.standard_normal(3)
    return np.clip(value, 0.03, 0.97)


def set_apart(number: np.ndarray, ground: np.ndarray, least: float) -> np.ndarray:
    """The number's colour moved away from the ground's until their brightness differs by `least`.

    >>> grey = np.full(3, 0.5)
    >>> round(abs(luminance(set_apart(grey, grey, 0.2)) - 0.5), 3)
    0.2
    """
    level = luminance(ground)
    gap = luminance(number) - level
    if abs(gap) >= least:
        return number
    up = level < 0.25 or (gap >= 0 and level < 0.7)
    target = level + (least if up else -least)
    return np.clip(number + (target - luminance(number)), 0.02, 0.98).astype(number.dtype)


def sample_palette(rng: np.random.Generator) -> Palette:
    """Draw the colours of a scene; `set_apart` keeps the number visible once its ground is painted."""
    material, wall, _ = _choose(WALLS, rng)
    _, other, _ = _choose(WALLS, rng)
    name, number, _ = _choose(NUMBERS, rng)
    plate, on_plate, _ = _choose(PLATES, rng)
    wall, other, number = _vary(wall, rng, 0.07), _vary(other, rng, 0.07), _vary(number, rng, 0.05)
    plate, on_plate = _vary(plate, rng, 0.05), _vary(on_plate, rng, 0.05)
    colours = (c.astype(np.float32) for c in (wall, other, plate, number, on_plate))
    return Palette(*colours, material, name in METALS)

"""Colours of walls, plates and numbers, and how far a number must stand out from what it is on."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np

from lipguide.data.shn.looks import Look

__all__ = ["Palette", "luminance", "sample_palette", "set_apart"]

METALS = ("brass", "gold", "silver", "chrome", "bronze", "copper")
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, eq=False)
class Palette:
    """Colours as (3,) float32 in [0, 1]; `material` names the wall, `metal` says whether the number is of metal.

    >>> from lipguide.data.shn.looks import look_of
    >>> sample_palette(look_of(2), np.random.default_rng(0)).wall.shape
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


def sample_palette(look: Look, rng: np.random.Generator) -> Palette:
    """Draw the colours of a scene; `set_apart` keeps the number visible once its ground is painted."""
    material, wall, _ = _choose(look.walls, rng)
    _, other, _ = _choose(look.walls, rng)
    name, number, _ = _choose(look.numbers, rng)
    plate, on_plate, _ = _choose(look.plates, rng)
    wall, other, number = _vary(wall, rng, 0.07), _vary(other, rng, 0.07), _vary(number, rng, 0.05)
    plate, on_plate = _vary(plate, rng, 0.05), _vary(on_plate, rng, 0.05)
    colours = (c.astype(np.float32) for c in (wall, other, plate, number, on_plate))
    return Palette(*colours, material, name in METALS)

"""What house numbers hang on: plaster, brick, boards, wood, stone, tiles, sheet metal and glass.

Every wall is a function (shape, colour, unit, turn, rng) → picture (3, H, W); `unit` is the digits' height in pixels,
by which bricks and boards get their natural size, and `turn` the rotation of the scene.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lipguide.data.shn.arrays import Array, blend, coverage, fractal, soft_step
from lipguide.data.shn.looks import Look

__all__ = ["grid", "sample_wall"]

Wall = Callable[[tuple[int, int], Array, float, float, np.random.Generator], Array]


def grid(shape: tuple[int, int], turn: float = 0.0) -> tuple[Array, Array]:
    """Coordinates (x, y) of the pixels' centres turned by an angle, as (H, W), or (1, W) and (H, 1) when unturned.

    >>> [a.shape for a in grid((2, 3))]
    [(1, 3), (2, 1)]
    """
    y = np.arange(shape[0], dtype=np.float32)[:, None] + np.float32(0.5)
    x = np.arange(shape[1], dtype=np.float32)[None, :] + np.float32(0.5)
    if turn == 0.0:
        return x, y
    c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    return x * c + y * s, y * c - x * s


def _flat(shape: tuple[int, int], colour: Array) -> Array:
    return np.broadcast_to(colour[:, None, None], (3, *shape)).astype(np.float32)


def _uneven(picture: Array, amount: float, unit: float, rng: np.random.Generator) -> None:
    """Slow changes of brightness, as dirt and sun leave them."""
    shape = picture.shape[1:]
    picture *= np.float32(1.0) + np.float32(amount) * fractal(rng, shape, (2.5 * unit, 2.5 * unit), 2)


def plaster(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Paint or render, smooth to coarse."""
    picture = _flat(shape, colour)
    rough = 0.012 + 0.08 * float(rng.random()) ** 2.5
    size = unit * (0.03 + 0.12 * float(rng.random()) ** 2)
    picture *= np.float32(1.0) + np.float32(rough) * fractal(rng, shape, (size, size), 2, 0.8)
    _uneven(picture, 0.02 + 0.06 * float(rng.random()), unit, rng)
    return picture


def brick(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Courses of bricks, each with a brightness of its own, in running bond with mortar between."""
    u = rng.random(7)
    course = max(unit * (0.28 + 0.4 * u[0]), 3.0)
    length = course * (2.2 + 1.6 * u[1])
    joint = max(course * (0.07 + 0.1 * u[2]), 0.6)
    x, y = grid(shape, turn if turn else 1e-4)
    row = np.floor(y / np.float32(course) + np.float32(100 + u[3])).astype(np.int32)
    along = x / np.float32(length) + np.float32(100 + u[4]) + np.float32(0.5) * (row % 2)
    column = np.floor(along).astype(np.int32)
    table = rng.standard_normal((16, 16), dtype=np.float32)
    shade = table[row % 16, column % 16]
    down = (y / np.float32(course) + np.float32(100 + u[3]) - row) * np.float32(course)
    across = (along - column) * np.float32(length)
    level = np.minimum(down, np.float32(course) - down)
    upright = np.minimum(across, np.float32(length) - across)
    edge = np.minimum(level, upright) - np.float32(joint / 2)
    grain = fractal(rng, shape, (0.15 * unit, 0.15 * unit), 2, 0.8)
    own = np.float32(0.04 + 0.1 * u[5]) * shade
    fine = np.float32(0.05 + 0.05 * u[6]) * grain
    picture = colour[:, None, None] * (1.0 + own + fine)
    light = float(rng.random())
    mortar = np.clip(colour * 0.5 + np.float32(0.1 + 0.4 * light), 0.05, 0.9).astype(np.float32)
    if light < 0.3:
        mortar = colour * np.float32(0.55)
    painted = 0.25 if rng.random() < 0.3 else 0.85
    rough = mortar[:, None, None] * (1.0 + np.float32(0.06) * grain)
    blend(picture, rough, np.float32(painted) * coverage(-edge, 1.2))
    return picture


def boards(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Level siding or upright planks: each board shaded towards its edge, a dark gap between two."""
    u = rng.random(6)
    upright = u[0] < 0.45
    pitch = unit * (0.55 + 1.3 * u[1])
    x, y = grid(shape, turn)
    position = ((x if upright else y) / np.float32(pitch)) + np.float32(50 + u[2])
    index = np.floor(position).astype(np.int32)
    depth = (position - index) * np.float32(pitch)
    shade = (rng.standard_normal(64, dtype=np.float32) * np.float32(0.05 * u[3]))[index % 64]
    slope = np.float32(0.14 * (u[4] - 0.3)) * (depth / np.float32(pitch) - np.float32(0.5))
    gap = coverage(np.float32(max(0.03 * pitch, 0.7)) - depth, 1.3)
    stretch = (3.0 * unit, 0.1 * unit) if upright else (0.1 * unit, 3.0 * unit)
    grain = fractal(rng, shape, stretch, 2, 0.8) * np.float32(0.012 + 0.07 * u[5] ** 2)
    value = (1.0 + shade + slope) * (1.0 - np.float32(0.25 + 0.35 * u[0]) * gap) + grain
    picture = colour[:, None, None] * np.broadcast_to(value, shape)
    _uneven(picture, 0.03, unit, rng)
    return picture


def wood(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Stained or weathered wood with its grain upright or level."""
    upright = rng.random() < 0.5
    fine = unit * (0.05 + 0.12 * float(rng.random()))
    stretch = (4.0 * unit, fine) if upright else (fine, 4.0 * unit)
    amount = 0.05 + 0.13 * float(rng.random())
    grain = fractal(rng, shape, stretch, 3, 0.7)
    picture = colour[:, None, None] * (1.0 + np.float32(amount) * grain)
    _uneven(picture, 0.05, unit, rng)
    return picture


def stone(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Large blocks, or natural stone with blotches."""
    if rng.random() < 0.5:
        return brick(shape, colour, unit * (2.0 + 2.0 * float(rng.random())), turn, rng)
    picture = _flat(shape, colour)
    blotch = fractal(rng, shape, (0.6 * unit, 0.8 * unit), 3, 0.7)
    picture *= np.float32(1.0) + np.float32(0.06 + 0.1 * float(rng.random())) * blotch
    tint = fractal(rng, shape, (1.2 * unit, 1.2 * unit), 1)
    picture += np.array([0.025, 0.0, -0.025], dtype=np.float32)[:, None, None] * tint
    return picture


def tiles(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Small square tiles with pale joints and a gloss."""
    u = rng.random(4)
    size = max(unit * (0.22 + 0.9 * u[0]), 4.0)
    x, y = grid(shape, turn if turn else 1e-4)
    px = x / np.float32(size) + np.float32(80 + u[1])
    py = y / np.float32(size) + np.float32(80 + u[2])
    ix, iy = np.floor(px).astype(np.int32), np.floor(py).astype(np.int32)
    table = rng.standard_normal((16, 16), dtype=np.float32)
    ex, ey = px - ix, py - iy
    inside = np.minimum(np.minimum(ex, 1 - ex), np.minimum(ey, 1 - ey))
    edge = inside * np.float32(size) - np.float32(0.03 * size)
    picture = colour[:, None, None] * (1.0 + np.float32(0.05) * table[iy % 16, ix % 16])
    joint = np.clip(colour + np.float32(0.3 * (u[3] - 0.35)), 0.05, 0.95).astype(np.float32)
    blend(picture, joint, coverage(-edge, 1.2))
    return picture


def sheet(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """Painted metal or a smooth door: an even gradient, now and then a raised panel's edge."""
    x, y = grid(shape)
    u = rng.random(5)
    across, down = x / np.float32(shape[1]), y / np.float32(shape[0])
    fall = np.float32(0.3 * (u[0] - 0.5)) * across + np.float32(0.3 * (u[1] - 0.5)) * down
    picture = colour[:, None, None] * (1.0 + np.broadcast_to(fall, shape)).astype(np.float32)
    if u[2] < 0.5:
        edge = y - np.float32(shape[0] * (0.05 + 0.9 * u[3]))
        width = max(0.05 * unit, 0.8)
        lit = coverage(np.float32(width) - np.abs(edge), 1.2)
        shaded = coverage(np.float32(width) - np.abs(edge + 2 * width))
        line = lit - shaded
        picture *= 1.0 + np.float32(0.18 * (2 * u[4] - 1)) * line
    _uneven(picture, 0.025, unit, rng)
    return picture


def glass(shape: tuple[int, int], colour: Array, unit: float, turn: float, rng: np.random.Generator) -> Array:
    """A dark pane that mirrors the street, out of focus."""
    picture = _flat(shape, colour * np.float32(0.8))
    size = unit * (0.8 + 2.2 * float(rng.random()))
    mirror = soft_step(0.35 + 0.35 * fractal(rng, shape, (size, size * 0.8), 3))
    sky = np.array([0.62, 0.7, 0.78], dtype=np.float32) * np.float32(0.5 + 0.5 * float(rng.random()))
    blend(picture, sky, np.float32(0.12 + 0.4 * float(rng.random())) * mirror)
    return picture


MAKES: dict[str, Wall] = {make.__name__: make for make in (plaster, brick, boards, wood, stone, tiles, sheet, glass)}


def sample_wall(
    look: Look,
    material: str,
    shape: tuple[int, int],
    colour: Array,
    unit: float,
    turn: float,
    rng: np.random.Generator,
) -> Array:
    """A wall of the named colour, in one of the makes that suit it.

    >>> from lipguide.data.shn.looks import look_of
    >>> rng, brown = np.random.default_rng(0), np.full(3, 0.4, np.float32)
    >>> sample_wall(look_of(2), "red brick", (20, 40), brown, 10.0, 0.0, rng).shape
    (3, 20, 40)
    """
    choices = look.makes.get(material, look.makes[""])
    shares = np.cumsum([share for _, share in choices])
    make = choices[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))][0]
    picture = MAKES[make](shape, colour, unit, turn, rng)
    if look.texture < 1:
        blend(picture, colour, np.float32(1 - look.texture))
    return picture

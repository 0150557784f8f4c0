"""What surrounds a number and what gets in its way: frames and windows beside it, plates and tiles under it, bars,
wires, leaves and dirt before it, sun and shade over it."""

from __future__ import annotations

import math

import numpy as np

from lipguide.data.shn.arrays import (
    Array,
    blend,
    coverage,
    fractal,
    line_distance,
    rounded_rectangle,
    shifted,
    soft_step,
)
from lipguide.data.shn.colours import Palette, sample_palette
from lipguide.data.shn.layout import Layout
from lipguide.data.shn.looks import Look
from lipguide.data.shn.walls import grid, sample_wall

__all__ = ["add_plate", "add_surroundings", "light", "obstruct"]

SKY = np.array([0.72, 0.78, 0.84], dtype=np.float32)


def _number_box(layout: Layout) -> tuple[float, float, float, float]:
    left, top, width, height = layout.boxes.T
    return float(left.min()), float(top.min()), float((left + width).max()), float((top + height).max())


def add_surroundings(
    picture: Array, layout: Layout, palette: Palette, turn: float, look: Look, rng: np.random.Generator
) -> None:
    """Up to three neighbours of the wall: a frame, a window, a door, a hedge, beside, above or below the number."""
    shape = picture.shape[1:]
    unit = float(layout.boxes[0, 3])
    left, top, right, bottom = _number_box(layout)
    for _ in range(int(np.searchsorted([0.35, 0.7, 0.9], rng.random(), side="right"))):
        u = rng.random(6)
        lean = turn * 0.7 + 0.02 * float(rng.standard_normal())
        x, y = grid(shape, lean if abs(lean) > 0.01 else 0.0)
        gap = unit * (0.22 + 1.8 * u[0] ** 1.5)
        if u[1] < 0.38:
            inside = x - np.float32(right * math.cos(lean) + bottom * max(math.sin(lean), 0.0) + gap)
        elif u[1] < 0.76:
            inside = np.float32(left * math.cos(lean) + top * min(math.sin(lean), 0.0) - gap) - x
        elif u[1] < 0.88:
            inside = y - np.float32(bottom + abs(math.sin(lean)) * left + 0.5 * gap)
        else:
            inside = np.float32(top - abs(math.sin(lean)) * right - 0.5 * gap) - y
        if float(inside.max()) <= 0:
            continue
        inside = np.broadcast_to(inside, shape)
        if u[2] < 0.14:
            leaves = fractal(rng, shape, (0.5 * unit, 0.5 * unit), 4, 0.8)
            inside = inside + np.float32(0.25 * unit) * leaves - np.float32(0.3 * unit)
            green = np.array([0.2, 0.27, 0.12], dtype=np.float32) * np.float32(0.5 + 0.9 * u[3])
            blend(picture, green[:, None, None] * (1.0 + 0.5 * leaves), coverage(inside, 2.0))
            continue
        fresh = sample_palette(look, rng)
        colour = palette.other if u[2] < 0.5 else fresh.wall
        material = "dark glass" if u[2] > 0.85 else fresh.material
        cover = coverage(inside, 1.2)
        blend(picture, sample_wall(look, material, shape, colour, unit, lean, rng), cover)
        width = np.float32(unit * (0.05 + 0.25 * u[4]))
        if u[3] < 0.55:
            trim = np.clip(palette.wall * np.float32(0.6 + 0.7 * u[5]), 0.03, 0.95)
            blend(picture, trim, coverage(np.minimum(inside, width - inside), 1.2))
        shade = np.float32(0.45 * u[5]) * soft_step(1.0 - np.abs(inside) / np.float32(0.25 * unit))
        picture *= 1.0 - shade * (inside < 0)


def _sunk(distance: Array, softness: float, offset: tuple[float, float]) -> Array:
    """Soft shadow that a shape with this distance field throws on what lies behind it."""
    moved = shifted(distance, round(offset[1]), round(offset[0]), -1e3)
    return soft_step(moved / np.float32(max(softness, 1.0)) + np.float32(0.5))


def add_plate(
    picture: Array,
    layout: Layout,
    palette: Palette,
    turn: float,
    rise: float,
    look: Look,
    rng: np.random.Generator,
) -> None:
    """A sign under the whole number, or a tile under each digit: shadow, face, rim, and now and then its screws."""
    shape = picture.shape[1:]
    unit = float(layout.boxes[0, 3])
    left, top, right, bottom = _number_box(layout)
    u = rng.random(9)
    pad_x, pad_y = unit * (0.08 + 0.5 * u[0]), unit * (0.07 + 0.3 * u[1])
    each = u[2] < look.tiled
    boxes = [tuple(map(float, b)) for b in layout.boxes] if each else [(left, top, right - left, bottom - top)]
    x, y = grid(shape)
    c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    sheared = s + np.float32(rise)
    slope = math.tan(turn) + rise
    distance = np.full(shape, -1e3, dtype=np.float32)
    for bx, by, bw, bh in boxes:
        dx, dy = x - np.float32(bx + bw / 2), y - np.float32(by + bh / 2)
        half_w, half_h = bw / 2 + (0.1 * unit if each else pad_x), bh / 2 + pad_y
        if not each and slope:  # the box of a turned number is wider than the number's own rectangle
            half_h = max(half_h - abs(slope) * bw / 2, 0.5 * unit + pad_y)
        radius = half_h if u[3] < 0.12 and not each else unit * 0.3 * float(u[3]) ** 2
        plate = rounded_rectangle(dx * c + dy * s, dy * c - dx * sheared, half_w, half_h, radius)
        distance = np.maximum(distance, plate)
    depth = unit * (0.02 + 0.1 * u[4])
    shadow = _sunk(distance, 1.5 * depth + 1.0, (depth * (2 * u[5] - 1), depth))
    picture *= 1.0 - np.float32(0.2 + 0.4 * u[6]) * shadow
    face = palette.plate[:, None, None] * (1.0 + np.float32(0.02) * fractal(rng, shape, (unit, unit), 2))
    blend(picture, face, coverage(distance, 1.2))
    rim = unit * (0.025 + 0.05 * u[7])
    if u[8] < look.lined:
        inset = distance - np.float32(rim * (1.0 + 1.2 * (u[8] < look.lined / 2)))
        line = coverage(np.float32(rim / 2) - np.abs(inset), 1.2)
        blend(picture, palette.on_plate, np.float32(0.85) * line)
    else:
        tone = np.clip(palette.plate * np.float32(0.7 + 0.6 * u[7]), 0.02, 0.98)
        blend(picture, tone, np.float32(0.8) * coverage(np.minimum(distance, np.float32(rim) - distance), 1.2))
    if u[6] < 0.35 and not each:
        for side in (-1, 1):
            sx = (left + right) / 2 + side * ((right - left) / 2 + 0.55 * pad_x) * float(c)
            sy = (top + bottom) / 2 + side * ((right - left) / 2 + 0.55 * pad_x) * float(sheared)
            screw = line_distance(x, y, (sx, sy), (sx, sy))
            blend(picture, palette.other * np.float32(0.7), coverage(np.float32(0.05 * unit) - screw, 1.2))


def _leaf(x: Array, y: Array, centre: tuple[float, float], size: float, angle: float) -> Array:
    """Distance inside a pointed leaf: where two discs overlap."""
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    along, across = dx * c + dy * s, np.abs(dy * c - dx * s)
    lift = np.float32(0.75 * size)
    reach = np.float32(1.25 * size)
    return reach - np.sqrt(along * along + (across + lift) * (across + lift))


def _near(centre: float, reach: float, side: int) -> slice:
    """The pixels of a row of `side` that lie within reach of a place; there may be none."""
    start, stop = (min(max(math.floor(centre + way), 0), side) for way in (-reach, reach + 1.0))
    return slice(start, stop)


def _foliage(picture: Array, box: tuple[float, ...], unit: float, rng: np.random.Generator) -> None:
    """A twig that hangs over a corner of the number, with its leaves."""
    shape = picture.shape[1:]
    x, y = grid(shape)
    left, top, right, bottom = box
    cx = right if rng.random() < 0.5 else left
    cy = bottom if rng.random() < 0.4 else top
    start_x = cx + 0.7 * unit * float(rng.standard_normal())
    start_y = cy - unit * (0.3 + float(rng.random()))
    stop_x = cx + 0.25 * unit * float(rng.standard_normal())
    stop_y = cy + 0.2 * unit * float(rng.random())
    start, stop = (start_x, start_y), (stop_x, stop_y)
    green = np.array([0.24, 0.34, 0.14]) * (0.5 + 0.9 * rng.random()) + 0.03 * rng.standard_normal(3)
    twig = np.float32(0.018 * unit + 0.3) - line_distance(x, y, start, stop)
    blend(picture, np.clip(green * 0.5, 0, 1).astype(np.float32), coverage(twig))
    for _ in range(3 + int(4 * rng.random())):
        t = float(rng.random())
        spot_x = start_x + t * (stop_x - start_x) + 0.12 * unit * float(rng.standard_normal())
        spot_y = start_y + t * (stop_y - start_y) + 0.12 * unit * float(rng.standard_normal())
        size = unit * (0.06 + 0.08 * float(rng.random()))
        rows, columns = (_near(spot, size + 2.0, side) for spot, side in zip((spot_y, spot_x), shape, strict=True))
        angle = 6.28 * float(rng.random())
        leaf = coverage(_leaf(x[:, columns], y[rows], (spot_x, spot_y), size, angle), 1.3)
        tone = np.clip(green * (0.7 + 0.7 * rng.random()), 0.02, 0.95).astype(np.float32)
        blend(picture[:, rows, columns], tone, np.float32(0.95) * leaf)


def _bars(picture: Array, box: tuple[float, ...], unit: float, rng: np.random.Generator) -> None:
    """One to three bars of a railing or a gate, a glazing bar or a cable, across the number."""
    shape = picture.shape[1:]
    x, y = grid(shape)
    u = rng.random(4)
    lean = 0.12 * float(rng.standard_normal()) + (1.5708 if u[0] < 0.4 else 0.0)
    thick = unit * (0.02 + 0.06 * u[1])
    pitch = unit * (0.5 + 0.9 * u[2])
    cx = box[0] + (box[2] - box[0]) * float(rng.random())
    cy = box[1] + (box[3] - box[1]) * float(rng.random())
    c, s = math.cos(lean), math.sin(lean)
    grey = np.full(3, 0.1 + 0.75 * u[3] ** 2)
    tone = np.clip(grey + 0.03 * rng.standard_normal(3), 0, 1).astype(np.float32)
    across = (x - np.float32(cx)) * np.float32(c) + (y - np.float32(cy)) * np.float32(s)
    for k in range(1 + int(3 * rng.random() ** 2)):
        off_middle = np.abs(across - np.float32(k * pitch))
        blend(picture, tone, coverage(np.float32(thick / 2) - off_middle, 1.2))
        off_rim = np.abs(across - np.float32(k * pitch - 0.25 * thick))
        rim = coverage(np.float32(0.15 * thick) - off_rim, 1.2)
        blend(picture, np.clip(tone + np.float32(0.2), 0, 1), np.float32(0.6) * rim)


def _dirt(picture: Array, box: tuple[float, ...], unit: float, rng: np.random.Generator) -> None:
    """Streaks that rain has left, or flaked spots."""
    shape = picture.shape[1:]
    streaks = rng.random() < 0.6
    scale = (2.5 * unit, 0.2 * unit) if streaks else (0.35 * unit, 0.35 * unit)
    amount = soft_step(0.9 * fractal(rng, shape, scale, 3, 0.7) - np.float32(0.5 + 0.5 * float(rng.random())))
    tone = np.array([0.3, 0.27, 0.23], dtype=np.float32) * np.float32(0.5 + 1.5 * float(rng.random()))
    blend(picture, tone, np.float32(0.35 + 0.4 * float(rng.random())) * amount)


def _glare(picture: Array, box: tuple[float, ...], unit: float, rng: np.random.Generator) -> None:
    """A bright reflection with soft edges, near the number."""
    x, y = grid(picture.shape[1:])
    cx = box[0] + (box[2] - box[0]) * float(rng.random())
    cy = box[1] + (box[3] - box[1]) * float(rng.random())
    rx, ry = (unit * (0.3 + 0.9 * float(rng.random())) for _ in range(2))
    dx = (x - np.float32(cx)) * np.float32(1 / rx)
    dy = (y - np.float32(cy)) * np.float32(1 / ry)
    away = 1.0 + dx * dx + dy * dy
    spot = 1.0 / (away * away)
    bright = np.minimum(SKY * 1.25, np.float32(1.0))
    blend(picture, bright, np.float32(0.25 + 0.5 * float(rng.random())) * spot)


HINDRANCES = (_foliage, _bars, _dirt, _glare)


def obstruct(picture: Array, layout: Layout, strength: float, look: Look, rng: np.random.Generator) -> None:
    """Cover parts of the number; `strength` scales how often that happens."""
    box = _number_box(layout)
    unit = float(layout.boxes[0, 3])
    for hide, share in zip(HINDRANCES, look.hindrances, strict=True):
        if rng.random() < share * strength:
            hide(picture, box, unit, rng)


def light(picture: Array, unit: float, strength: float, look: Look, rng: np.random.Generator) -> None:
    """Sun and shade in place: a gradient, now and then the edge of a shadow or dappled light under a tree."""
    shape = picture.shape[1:]
    x, y = grid(shape)
    u = rng.random(8)
    tilt = (0.5 * (u[0] - 0.5) / shape[1], 0.45 * (u[1] - 0.5) / shape[0])
    field = (
        1.0
        + np.float32(tilt[0]) * (x - np.float32(shape[1] / 2))
        + np.float32(tilt[1]) * (y - np.float32(shape[0] / 2))
    )
    picture *= field
    if u[2] < look.shades[0] * strength:
        angle = 6.2832 * u[3]
        c, s = math.cos(angle), math.sin(angle)
        middle_x = shape[1] * (0.2 + 0.6 * u[4])
        middle_y = shape[0] * (0.2 + 0.6 * u[5])
        middle = middle_x * c + middle_y * s
        soft = unit * (0.03 + 0.3 * u[6] ** 2) + 1.0
        shade = coverage(x * np.float32(c) + y * np.float32(s) - np.float32(middle), soft)
    elif u[2] < look.shades[1] * strength:
        spots = fractal(rng, shape, (0.8 * unit, 1.1 * unit), 3, 0.6)
        shade = np.float32(0.75) * coverage(spots, 0.8 + 1.2 * float(u[4]))
    else:
        return
    depth = np.float32(0.25 + 0.4 * u[7])
    cool = np.array([1.0, 0.97, 0.9], dtype=np.float32)[:, None, None]
    picture *= 1.0 - depth * cool * shade

"""One scene of Synthetic House Numbers, from its seed to its JPEG: wall, surroundings, plate, number, what hides it,
light, camera."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from lipguide.data.shn.arrays import Array, blend, coverage, fractal, shifted, soft_step
from lipguide.data.shn.camera import develop, expose, focus
from lipguide.data.shn.colours import LUMA, luminance, sample_palette, set_apart
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.ink import FAR, Hand, Ink, draw_number, draw_strangers, sample_hand
from lipguide.data.shn.layout import Layout, sample_layout
from lipguide.data.shn.looks import DEFAULT, Look, look_of
from lipguide.data.shn.scenery import add_plate, add_surroundings, light, obstruct
from lipguide.data.shn.walls import sample_wall

__all__ = ["SPLITS", "Encoded", "render"]

SPLITS = {"train": 0, "test": 1}


class Encoded(NamedTuple):
    """A scene as it is stored.

    Args:
        picture: a JPEG file.
        mask: zlib of H·W bytes, 0 for background and k + 1 for the digit of box k.
        width: of the picture in pixels.
        height: of the picture in pixels.
        boxes: (n, 4) integers left, top, width, height in pixels.
        labels: (n,) 0 to 9.
    """

    picture: bytes
    mask: bytes
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray


def _ground(picture: Array, ink: Ink) -> tuple[Array, float]:
    """Mean colour, and spread of the brightness, of what the number will be painted on."""
    red, green, blue = picture[ink.window][:, ink.distance > -0.12 * ink.height].astype(np.float64)
    mean = np.array([red.mean(), green.mean(), blue.mean()], dtype=np.float32)
    return mean, float((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).std())


def _throw_shadow(picture: Array, ink: Ink, u: np.ndarray) -> None:
    depth = ink.height * (0.015 + 0.06 * u[0])
    dx = round(depth * (2 * u[1] - 1) * 1.5)
    dy = max(round(depth), 1 if u[0] > 0.3 else 0)
    moved = shifted(ink.distance, dy, dx, FAR)
    soft = 1.2 + 2.2 * depth * float(u[2])
    picture[ink.window] *= 1.0 - np.float32(0.25 + 0.45 * u[3]) * coverage(moved, soft)


def _body(ink: Ink, colour: Array, metal: bool, rng: np.random.Generator) -> Array:
    """The ink's own colour (3, h, w): flat paint, or metal that mirrors the sky in bands, with lit and shaded rims."""
    shape = ink.distance.shape
    u = rng.random(6)
    body = np.broadcast_to(colour[:, None, None], (3, *shape)).astype(np.float32)
    if u[0] < 0.4:
        body *= np.float32(1.0) + np.float32(0.03 + 0.08 * u[1]) * fractal(rng, shape, (0.5 * ink.height,) * 2, 2)
    if metal:
        bands = fractal(rng, (shape[0], 2), (0.35 * ink.height, 9.0), 2)[:, :1]
        body *= np.float32(1.0) + np.float32(0.08 + 0.22 * u[2]) * bands
    if metal or u[3] < 0.3:
        rim = np.float32(max(ink.height * (0.02 + 0.04 * u[4]), 1.0))
        slope_y, slope_x = np.gradient(np.maximum(ink.distance, -2 * rim))
        angle = -1.2 + 1.6 * u[5]
        lit = slope_x * np.float32(angle) + slope_y * np.float32(0.8)
        near = soft_step(1.0 - np.abs(ink.distance) / (2 * rim))
        body += (np.float32(0.1 + 0.25 * u[2]) * near) * lit
    return body


def _paint_number(
    picture: Array, ink: Ink, colour: Array, ground: Array, metal: bool, rng: np.random.Generator
) -> None:
    """Put the number on the picture in one of its makes: cut-out, raised, sunk, outlined, hollow, worn."""
    u = rng.random(10)
    view = picture[ink.window]
    height, distance = ink.height, ink.distance
    raised = u[0] < (0.75 if metal else 0.35)
    if raised:
        _throw_shadow(picture, ink, u[1:5])
        if u[5] < 0.3 and height > 18:  # thickness seen from the side
            steps = 1 + int(height * 0.04 * (0.3 + u[6]))
            side = -1 if u[7] < 0.5 else 1
            for k in range(steps, 0, -1):
                flank = shifted(distance, k if u[8] < 0.5 else -k, side * k, FAR)
                blend(view, colour * np.float32(0.35 + 0.3 * u[9]), coverage(flank))
    body = _body(ink, colour, metal, rng)
    v = rng.random(5)
    alpha = coverage(distance, 1.0 + (0.05 * height * v[0] if v[1] < 0.06 else 0.0))
    if not raised and v[1] > 0.86:  # flaked paint
        flakes = fractal(rng, distance.shape, (0.2 * height,) * 2, 3, 0.8)
        worn = soft_step(0.5 + 1.6 * flakes + np.float32(1.2 * v[0]))
        alpha = alpha * (np.float32(0.3) + np.float32(0.7) * worn)
    ring = max(height * (0.015 + 0.05 * v[2]), 0.8)
    if v[3] < 0.07:  # a contour in another colour
        other = np.float32(1.0) - colour if v[4] < 0.5 else np.clip(ground * np.float32(0.5), 0, 1)
        blend(view, other.astype(np.float32), coverage(distance + np.float32(ring)))
    elif v[3] < 0.10 and height > 22:  # hollow: the contour only
        alpha = coverage(np.minimum(distance, np.float32(2 * ring) - distance))
    blend(view, body, alpha)
    if not raised and v[3] > 0.93:  # sunk into the wall: its upper edge in shadow
        inner = coverage(distance) * (1.0 - coverage(shifted(distance, max(1, round(0.03 * height)), 1, FAR), 2.0))
        view *= 1.0 - np.float32(0.5) * inner


def _screws(picture: Array, ink: Ink, layout: Layout, rng: np.random.Generator) -> None:
    """Heads of the two screws that hold a cut-out digit, where its ink is thickest near the top and the bottom."""
    rows, columns = ink.distance.shape
    tone = np.float32(0.15 + 0.6 * float(rng.random()))
    for k in range(len(layout.labels)):
        own = np.where(ink.owner == k + 1, ink.distance, np.float32(FAR))
        top = layout.boxes[k, 1] - ink.top
        for start, stop in ((0.02, 0.3), (0.7, 0.98)):
            a, b = (min(max(int(top + s * ink.height), 0), rows) for s in (start, stop))
            if b <= a:
                continue
            spot = int(own[a:b].argmax())
            sy, sx = a + spot // columns, spot % columns
            y, x = np.ogrid[max(sy - 6, 0) : min(sy + 7, rows), max(sx - 6, 0) : min(sx + 7, columns)]
            away = np.sqrt(((y - sy) ** 2 + (x - sx) ** 2).astype(np.float32))
            view = picture[ink.window][:, y[0, 0] : y[-1, 0] + 1, x[0, 0] : x[0, -1] + 1]
            radius = np.float32(min(0.03 * ink.height, 5.0))
            blend(view, np.full(3, tone, dtype=np.float32), coverage(radius - away, 1.2))


def compose(
    layout: Layout, hand: Hand, ink: Ink, difficulty: Difficulty, look: Look, rng: np.random.Generator
) -> tuple[Array, float]:
    """The scene in sharp focus (3, H, W), and by how much the number's brightness differs from its ground's."""
    palette = sample_palette(look, rng)
    unit = ink.height
    shape, along = (layout.height, layout.width), hand.turn + hand.rise
    picture = sample_wall(look, palette.material, shape, palette.wall, unit, along, rng)
    add_surroundings(picture, layout, palette, hand.turn, look, rng)
    plated = rng.random() < look.plated
    if plated:
        add_plate(picture, layout, palette, hand.turn, hand.rise, look, rng)
    colour, metal = (palette.on_plate, False) if plated else (palette.number, palette.metal)
    ground, spread = _ground(picture, ink)
    u = rng.random(2)
    least = 0.11 + 0.09 * u[1] if u[0] < 0.2 * difficulty.contrast else look.apart[0] + look.apart[1] * u[1]
    colour = set_apart(colour, ground, max(least, min(2.4 * spread, 0.4)))
    strangers = draw_strangers(layout, hand, rng)
    if strangers is not None:
        _paint_number(picture, strangers, colour, ground, metal, rng)
    _paint_number(picture, ink, colour, ground, metal, rng)
    if rng.random() < 0.12 and unit > 24:
        _screws(picture, ink, layout, rng)
    obstruct(picture, layout, difficulty.occlusion, look, rng)
    light(picture, unit, difficulty.occlusion, look, rng)
    return picture, abs(luminance(colour) - luminance(ground))


def render(split: str, seed: int, index: int, difficulty: Difficulty, version: int = DEFAULT) -> Encoded:
    """Scene `index` of a split: it depends on its arguments alone, not on what was drawn before.

    >>> first, again = (render("train", 0, 7, Difficulty()) for _ in range(2))
    >>> first.picture == again.picture and first.mask == again.mask
    True
    """
    look = look_of(version, index)
    rng = np.random.default_rng(np.random.SeedSequence((seed, SPLITS[split], index)))
    layout = sample_layout(split, rng)
    hand = sample_hand(split, layout.slope, look, rng)
    ink = draw_number(layout, hand, rng)
    picture, stands_out = compose(layout, hand, ink, difficulty, look, rng)
    picture = expose(picture, difficulty.contrast, stands_out, look, rng)
    picture = focus(picture, ink.height, difficulty.blur, look, rng)
    mask = np.zeros((layout.height, layout.width), dtype=np.uint8)
    mask[ink.window[1:]] = np.where(ink.distance > 0, ink.owner, 0)
    return Encoded(
        develop(picture, difficulty, look, rng),
        zlib.compress(mask.tobytes(), 3),
        layout.width,
        layout.height,
        layout.boxes,
        layout.labels,
    )

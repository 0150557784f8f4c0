"""A number as one distance field: every digit of a layout drawn in the same hand, each inside its box."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from lipguide.data.shn.arrays import fractal
from lipguide.data.shn.layout import Layout
from lipguide.data.shn.looks import Look
from lipguide.data.shn.typefaces import FACES, OFFSET, glyph

__all__ = ["FAR", "Hand", "Ink", "draw_number", "draw_strangers", "sample_hand"]

FAR = -1e4  # distance, in pixels, where there is no ink at all


@dataclass(frozen=True)
class Hand:
    """What the digits of one number share.

    Args:
        face: number of the typeface in `FACES`.
        weight: thickness added, in digit heights.
        slant: shear.
        turn: rotation in radians.
        keystone: (x, y) perspective a digit height.
        fill: share of the box's (height, width) that ink takes.
        growth: relative change of the digits' height along the number.
        rough: how far a brush strays, in digit heights.
        rise: of level strokes to the right, while uprights stay upright: as on a wall seen from down the street, or
            whatever their line does where digits are askew.

    >>> from lipguide.data.shn.looks import look_of
    >>> sample_hand("train", 0.1, look_of(2), np.random.default_rng(0)).face < len(FACES)
    True
    """

    face: int
    weight: float
    slant: float
    turn: float
    keystone: tuple[float, float]
    fill: tuple[float, float]
    growth: float
    rough: float = 0.0
    rise: float = 0.0


@dataclass(frozen=True, eq=False)
class Ink:
    """The number's field on a region of the picture.

    Args:
        distance: (h, w) in pixels, positive in the ink.
        owner: (h, w) index of the nearest digit + 1.
        top: row where the region starts.
        left: column where the region starts.
        height: of the digits in pixels.

    >>> from lipguide.data.shn.layout import sample_layout
    >>> from lipguide.data.shn.looks import look_of
    >>> rng = np.random.default_rng(0)
    >>> layout = sample_layout("train", rng)
    >>> ink = draw_number(layout, sample_hand("train", layout.slope, look_of(2), rng), rng)
    >>> bool((ink.distance > 0).any())
    True
    """

    distance: np.ndarray
    owner: np.ndarray
    top: int
    left: int
    height: float

    @property
    def window(self) -> tuple[slice, slice, slice]:
        """Index of the region in a picture (3, H, W)."""
        rows, columns = self.distance.shape
        return slice(None), slice(self.top, self.top + rows), slice(self.left, self.left + columns)


@cache
def _shares(look: Look) -> np.ndarray:
    """Shares of the typefaces, each added to those before it."""
    shares = np.array([face.weight * look.faces[face.kind] for face in FACES])
    return np.cumsum(shares) / sum(shares)


def sample_hand(split: str, slope: float, look: Look, rng: np.random.Generator) -> Hand:
    """Draw a hand; a number whose line rises is turned as a whole, sheared, or climbs like stairs; some are askew."""
    face = int(np.searchsorted(_shares(look), rng.random(), side="right"))
    u = rng.random(8)
    weight = FACES[face].thin + (FACES[face].heavy - FACES[face].thin) * u[0]
    turn = math.atan(slope) * (0.9 if u[1] < 0.6 else 0.1) + 0.03 * float(rng.standard_normal())
    strong = 0.22 if u[2] < 0.25 else 0.06
    keystone = (strong * (2 * u[3] - 1), strong * (2 * u[4] - 1))
    slant = look.slant * float(rng.standard_normal()) + (0.16 * u[5] if u[6] < 0.1 else 0.0)
    tight = look.tight[split]
    high = tight[0] + 0.12 * float(rng.random())
    wide = tight[1] + 0.14 * float(rng.random())
    rough = 0.003 + 0.012 * float(rng.random()) if rng.random() < 0.35 else 0.0
    turn, rise = (0.0, turn) if u[1] < look.sheared else (turn, 0.0)
    often, slanted, risen = look.askew
    if often and rng.random() < often:  # no draw where it never happens: SHN 1 and 2 are frozen
        slant += slanted * float(rng.standard_normal())
        rise += risen * float(rng.standard_normal())
    return Hand(
        face=face,
        weight=weight,
        slant=slant,
        turn=min(max(turn, -0.45), 0.45),
        keystone=keystone,
        fill=(high, wide),
        growth=0.12 * (2 * u[7] - 1),
        rough=rough,
        rise=min(max(rise, -0.45), 0.45),
    )


def _linear(hand: Hand, condense: float) -> np.ndarray:
    c, s = math.cos(hand.turn), math.sin(hand.turn)
    return np.array([[c, -s], [s, c]]) @ np.array([[condense, -hand.slant], [hand.rise * condense, 1.0]])


def _extent(hull: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Size and centre of the bounding box of the transformed hull."""
    points = linear[:, :1] * hull[:, 0] + linear[:, 1:] * hull[:, 1]  # (2, k)
    low, high = points.min(axis=1), points.max(axis=1)
    return high - low, (low + high) / 2


def _condensation(layout: Layout, hand: Hand) -> float:
    """How much narrower than its design the face must be for its digits to fill their boxes on average."""
    wanted, natural = 0.0, 0.0
    plain = _linear(hand, 1.0)
    for label, (_, _, width, height) in zip(layout.labels, layout.boxes, strict=True):
        size, _ = _extent(glyph(hand.face, int(label)).hull, plain)
        share = 0.35 if label == 1 else 1.0  # the box of a 1 says little about the face
        scale = size[1] + 2 * hand.weight
        wanted += share * (hand.fill[1] * width / (hand.fill[0] * height) * scale - 2 * hand.weight)
        natural += share * size[0]
    return min(max(wanted / natural, 0.5), 1.5)


def _draw_glyph(
    sign: int | str, hand: Hand, linear: np.ndarray, scale: float, centre: tuple[float, float], tile: np.ndarray
) -> np.ndarray:
    """Distance field, in pixels, of one glyph on a tile (left, top, right, bottom) of the picture.

    The glyph's point u lands on centre + v / (1 + g·v), v = scale · linear · u, with g the keystone a digit height;
    the tile is filled by the inverse map, which is a perspective again.
    """
    shape = glyph(hand.face, sign)
    a = linear * scale
    det = a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]
    adjugate = [
        [a[1, 1], -a[0, 1]],
        [-a[1, 0], a[0, 0]],
    ]
    inverse = np.array(adjugate) / det
    gx, gy = hand.keystone[0] / scale, hand.keystone[1] / scale
    cx, cy = centre[0] - tile[0], centre[1] - tile[1]
    (ox, oy), cell = shape.origin, shape.cell
    rows = [
        (cell * inverse[0, 0] - ox * gx, cell * inverse[0, 1] - ox * gy, ox),
        (cell * inverse[1, 0] - oy * gx, cell * inverse[1, 1] - oy * gy, oy),
        (-gx, -gy, 1.0),
    ]
    full = [(p, q, r - p * cx - q * cy) for p, q, r in rows]
    norm = full[2][2]
    data = [value / norm for row in full for value in row][:8]
    size = (int(tile[2] - tile[0]), int(tile[3] - tile[1]))
    field = shape.field.transform(size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR)
    unit = np.float32(math.sqrt(abs(det)))
    return (np.asarray(field) - np.float32(OFFSET - hand.weight)) * unit


def _place(
    sign: int | str, box: tuple[float, ...], hand: Hand, condense: float, growth: float, shake: np.ndarray
) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Linear part, scale and centre that put a glyph into its box (left, top, width, height)."""
    left, top, width, tall = box
    hull = glyph(hand.face, sign).hull
    linear = _linear(hand, condense)
    size, offset = _extent(hull, linear)
    scale = hand.fill[0] * tall * growth / (size[1] + 2 * hand.weight)
    wide = scale * (size[0] + 2 * hand.weight)
    if wide > width:
        linear = _linear(hand, max(condense * width / wide, 0.3))
        size, offset = _extent(hull, linear)
    x = left + width / 2 + 0.04 * tall * float(shake[0]) - scale * float(offset[0])
    y = top + tall / 2 + 0.03 * tall * float(shake[1]) - scale * float(offset[1])
    return linear, scale, (x, y)


def _blank(boxes: np.ndarray, margin: float, layout: Layout, height: float) -> Ink:
    """An ink without ink, on the part of the picture that the boxes and a margin around them cover."""
    left, top, width, tall = np.asarray(boxes, dtype=float).T
    x0, y0 = max(int(left.min() - margin), 0), max(int(top.min() - margin), 0)
    x1 = min(int((left + width).max() + margin) + 1, layout.width)
    y1 = min(int((top + tall).max() + margin) + 1, layout.height)
    shape = (max(y1 - y0, 1), max(x1 - x0, 1))
    return Ink(np.full(shape, FAR, dtype=np.float32), np.zeros(shape, dtype=np.uint8), y0, x0, height)


def _write(ink: Ink, sign: int | str, owner: int, box: tuple[float, ...], hand: Hand, placed: tuple) -> None:
    """Add a placed glyph to the ink: every pixel keeps the larger distance and whose it is."""
    left, top, width, tall = box
    reach = 0.4 * tall
    rows, columns = ink.distance.shape
    tile = np.array([left - reach, top - reach, left + width + reach, top + tall + reach]).round()
    low = np.array([ink.left, ink.top] * 2)
    tile = np.clip(tile, low, low + [columns, rows] * 2).astype(int)
    if (tile[2:] <= tile[:2]).any():
        return
    new = _draw_glyph(sign, hand, *placed, tile)
    left, top, right, bottom = tile - low
    part = slice(top, bottom), slice(left, right)
    closer = new > ink.distance[part]
    np.copyto(ink.distance[part], new, where=closer)
    np.copyto(ink.owner[part], np.uint8(owner), where=closer)


def _free_boxes(boxes: np.ndarray) -> np.ndarray:
    """The boxes without what two neighbours share: boxes overlap because they were drawn roughly, ink does not."""
    free = boxes.astype(float)
    for k in range(len(boxes) - 1):
        shared = free[k, 0] + free[k, 2] - free[k + 1, 0]
        narrower = min(free[k, 2], free[k + 1, 2])
        over = min(shared, 0.75 * narrower)
        if over > 0:
            free[k, 2] -= over / 2
            free[k + 1, 0] += over / 2
            free[k + 1, 2] -= over / 2
    return free


def draw_number(layout: Layout, hand: Hand, rng: np.random.Generator) -> Ink:
    """Draw every digit of the layout into its box, as wide as the common face allows."""
    height = float(layout.boxes[0, 3])
    hand = replace(hand, weight=hand.weight + 0.3 / height)  # no stroke is finer than the pixels can show
    ink = _blank(layout.boxes, 0.45 * height, layout, height)
    condense = _condensation(layout, hand)
    middle = float(layout.boxes[:, 0].mean())
    span = max(float(np.ptp(layout.boxes[:, 0])), 1.0)
    for k, (label, row) in enumerate(zip(layout.labels, _free_boxes(layout.boxes), strict=True)):
        box = tuple(float(v) for v in row)
        growth = 1 - abs(hand.growth) / 2 + hand.growth * (box[0] - middle) / span
        placed = _place(int(label), box, hand, condense, growth, rng.standard_normal(2))
        _write(ink, int(label), k + 1, box, hand, placed)
    if hand.rough:
        stray = fractal(rng, ink.distance.shape, (0.3 * height, 0.3 * height), 2)
        ink.distance[...] += np.float32(hand.rough * height) * stray
    return ink


def draw_strangers(layout: Layout, hand: Hand, rng: np.random.Generator) -> Ink | None:
    """Signs that carry no label: a letter after the number, a line of small print under or over it, or a digit of
    another number that the picture's edge cuts in two. None in most scenes."""
    u = rng.random(6)
    left, top, width, tall = (layout.boxes[:, k].astype(float) for k in range(4))
    height, right = float(tall[0]), float((left + width).max())
    printed = hand.face if FACES[hand.face].prints else 0
    hand = Hand(printed, 0.0, hand.slant, hand.turn, (0.0, 0.0), (1.0, 1.0), 0.0, rise=hand.rise)
    signs: list[int | str] = []
    boxes: list[tuple[float, ...]] = []
    if u[0] < 0.05:
        size = height * (0.5 + 0.5 * u[1])
        start = right + height * (0.06 + 0.2 * u[2])
        signs.append("ABCDEFGHab"[int(10 * u[3])])
        boxes.append((start, float(top[-1]) + height - size, 0.62 * size, size))
    elif u[0] < 0.13:
        size = height * (0.7 + 0.6 * u[1])
        wide = 0.55 * size
        cut = wide * (0.35 + 0.4 * u[2])
        signs.append(int(10 * u[3]))
        start = -cut if u[4] < 0.5 else layout.width - wide + cut
        boxes.append((start, float(top[0]) + 0.3 * height * (u[5] - 0.5), wide, size))
    elif u[0] < 0.17:
        size = max(height * (0.13 + 0.13 * u[1]), 4.0)
        below = float(top.max()) + height * (1.12 + 0.1 * u[2])
        above = float(top.min()) - 1.6 * size
        line = below if u[3] < 0.6 else above
        count = 4 + int(9 * u[4])
        start = (float(left.min()) + right) / 2 - count * 0.4 * size
        for k, letter in enumerate(rng.integers(26, size=count)):
            signs.append(chr(ord("A") + int(letter)))
            boxes.append((start + 0.8 * size * k, line, 0.62 * size, size))
    kept = [(sign, box) for sign, box in zip(signs, boxes, strict=True) if _is_seen(box, layout)]
    is_other_number = 0.05 <= u[0] < 0.13
    if not kept or (is_other_number and _touches(kept[0][1], layout.boxes)):
        return None
    tall = kept[0][1][3]
    ink = _blank(np.array([box for _, box in kept]), 0.45 * tall, layout, tall)
    for sign, box in kept:
        _write(ink, sign, 0, box, hand, _place(sign, box, hand, 0.85, 1.0, np.zeros(2)))
    return ink


def _is_seen(box: tuple[float, ...], layout: Layout) -> bool:
    """Does any part of a box lie in the picture?"""
    left, top, width, tall = box
    return left < layout.width and left + width > 0 and -tall < top < layout.height


def _touches(box: tuple[float, ...], boxes: np.ndarray) -> bool:
    """Does a box reach into any of the number's own, or nearly?"""
    margin = 0.1 * float(boxes[0, 3])
    left, right = box[0], box[0] + box[2]
    begins_before = boxes[:, 0] < right + margin
    ends_after = boxes[:, 0] + boxes[:, 2] > left - margin
    return bool((begins_before & ends_after).any())

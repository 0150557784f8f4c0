"""Digits drawn with a pen: skeletons of lines and arcs, the way a smith or a sign painter makes house numbers.

Every digit is a list of strokes, every stroke a polyline (k, 2) in a frame one unit high, y down. A `Pen` says how
wide the digit is, how square its bowls are and which form of 1, 3, 4, 6, 7 and 9 it has. `typefaces` turns the
skeleton into a signed distance by giving the line a thickness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["ENAMEL", "FLAT", "PENS", "Pen", "skeleton"]


@dataclass(frozen=True)
class Pen:
    """One hand: the proportions and forms that its ten digits share.

    Args:
        width: of a digit, in units of its height.
        half: half the line's thickness, likewise.
        square: exponent of the bowls (2 is an ellipse, 4 nearly a rectangle).
        contrast: how much thinner the horizontal parts are (0 to 0.6).
        cap: "round" or "flat" ends.
        slab: length of a bar across the free ends.
        ball: whether curves end in a ball.
        stencil: width of the gap that a stencil leaves.
        waist: height at which 3, 4, 6, 8 and 9 are narrowest.
        one: form of the digit; three, four, six and seven likewise.

    >>> Pen(width=0.6, half=0.06).square
    2.0
    """

    width: float
    half: float
    square: float = 2.0
    contrast: float = 0.0
    cap: str = "round"
    slab: float = 0.0
    ball: bool = False
    stencil: float = 0.0
    waist: float = 0.5
    one: str = "flag"
    three: str = "round"
    four: str = "closed"
    six: str = "curved"
    seven: str = "plain"


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, square: float) -> np.ndarray:
    """Part of a superellipse; degrees grow clockwise from three o'clock, as y points down."""
    count = max(6, round(abs(stop - start) / 14))
    angle = np.radians(np.linspace(start, stop, count + 1))
    c, s = np.cos(angle), np.sin(angle)
    power = 2.0 / square
    x = cx + rx * np.sign(c) * np.abs(c) ** power
    y = cy + ry * np.sign(s) * np.abs(s) ** power
    return np.stack([x, y], axis=1)


def _curve(*points: tuple[float, float]) -> np.ndarray:
    """A Bezier curve of any degree through its end points."""
    t = np.linspace(0.0, 1.0, 11)[:, None]
    degree = len(points) - 1
    terms = [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) * np.array(p) for k, p in enumerate(points)]
    return np.sum(terms, axis=0)


def _line(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


def _one(pen: Pen) -> list[np.ndarray]:
    reach = 0.27 / max(pen.width, 0.35)
    stem = _line((0.5, 0.0), (0.5, 1.0))
    if pen.one == "stem":
        return [stem]
    flag = _line((0.5 - reach, 0.2), (0.5, 0.0))
    if pen.one == "based":
        return [stem, flag, _line((0.5 - reach, 1.0), (0.5 + reach, 1.0))]
    if pen.one == "hooked":
        return [stem, _curve((0.5 - reach, 0.2), (0.5 - 0.2 * reach, 0.17), (0.5, 0.0))]
    return [stem, flag]


def _three(pen: Pen) -> list[np.ndarray]:
    w, q = pen.waist, pen.square
    if pen.three == "flat":
        lower = _arc(0.46, 1 - (1 - w + 0.1) / 2, 0.54, (1 - w + 0.1) / 2, 262, 505, q)
        return [_line((0.04, 0.0), (0.94, 0.0), (0.42, w - 0.1)), np.concatenate([[(0.42, w - 0.1)], lower])]
    upper = _arc(0.46, w / 2, 0.46, w / 2, 205, 450, q)
    lower = _arc(0.46, (1 + w) / 2, 0.54, (1 - w) / 2, 270, 515, q)
    return [upper, lower]


def _four(pen: Pen) -> list[np.ndarray]:
    bar = 0.66 + 0.1 * (pen.waist - 0.5) + max(0.0, pen.half - 0.07)
    if pen.four == "open":
        return [_line((0.22, 0.0), (0.0, bar), (1.0, bar)), _line((0.74, 0.3), (0.74, 1.0))]
    if pen.four == "square":
        return [_line((0.0, 0.0), (0.0, bar - 0.1), (1.0, bar - 0.1)), _line((0.82, 0.0), (0.82, 1.0))]
    return [_line((0.74, 1.0), (0.74, 0.0), (0.0, bar), (1.0, bar))]


def _six(pen: Pen) -> list[np.ndarray]:
    top = 2 * pen.waist - 0.62
    centre, radius = (1 + top) / 2, (1 - top) / 2
    bowl = _arc(0.5, centre, 0.5, radius, 180, 540, pen.square)
    if pen.six == "straight":
        return [bowl, _line((0.05, centre - 0.45 * radius), (0.68, 0.0))]
    if pen.six == "hooked":
        return [bowl, np.concatenate([_line((0.0, centre)), _arc(0.5, 0.3, 0.5, 0.3, 180, 325, pen.square)])]
    return [bowl, _curve((0.0, centre), (0.0, 0.12), (0.42, 0.0), (0.9, 0.02))]


def _seven(pen: Pen) -> list[np.ndarray]:
    top = _line((0.02, 0.0), (0.98, 0.0))
    leg = _line((0.98, 0.0), (0.34, 1.0))
    if pen.seven == "curved":
        leg = _curve((0.98, 0.0), (0.55, 0.4), (0.4, 1.0))
    strokes = [np.concatenate([top, leg[1:]])]
    if pen.seven == "crossed":
        strokes.append(_line((0.26, 0.5), (0.94, 0.5)))
    return strokes


def _balls(digit: int, strokes: list[np.ndarray], pen: Pen) -> list[np.ndarray]:
    """A small upright loop, which the pen fills, at every end of a curve."""
    ends = {2: [(0, 0)], 3: [(0, 0), (-1, -1)], 5: [(-1, -1)], 6: [(1, -1)], 9: [(1, -1)]}.get(digit, [])
    reach = 0.5 * pen.half * np.array([(-1, -1), (-1, 1), (1, 1), (1, -1), (-1, -1)]) / [pen.width, 1.0]
    return [strokes[stroke][point] + reach for stroke, point in ends]


def skeleton(digit: int, pen: Pen) -> list[np.ndarray]:
    """The strokes of a digit in the given hand, x in [0, pen.width] and y in [0, 1] before the line has thickness.

    >>> len(skeleton(8, Pen(width=0.6, half=0.06)))
    2
    """
    w, q = pen.waist, pen.square
    if digit == 0:
        strokes = [_arc(0.5, 0.5, 0.5, 0.5, -90, 270, q)]
    elif digit == 1:
        strokes = _one(pen)
    elif digit == 2:
        bowl = _arc(0.5, 0.29, 0.5, 0.29, 188, 395, q)
        strokes = [np.concatenate([bowl, _line((0.0, 1.0), (1.0, 1.0))])]
    elif digit == 3:
        strokes = _three(pen)
    elif digit == 4:
        strokes = _four(pen)
    elif digit == 5:
        bowl = _arc(0.45, 1 - (1.12 - w) / 2, 0.55, (1.12 - w) / 2, 228, 510, q)
        strokes = [np.concatenate([_line((0.9, 0.0), (0.14, 0.0), (0.08, w - 0.04)), bowl])]
    elif digit == 6:
        strokes = _six(pen)
    elif digit == 7:
        strokes = _seven(pen)
    elif digit == 8:
        upper = _arc(0.5, w * 0.48, 0.44, w * 0.48, 90, 450, q)
        lower = _arc(0.5, (1 + 0.96 * w) / 2, 0.5, (1 - 0.96 * w) / 2, -90, 270, q)
        strokes = [upper, lower]
    elif digit == 9:
        strokes = [1.0 - stroke for stroke in _six(pen)]
    else:
        raise ValueError(f"digit must be 0 to 9, not {digit}")
    strokes = strokes + _balls(digit, strokes, pen) if pen.ball else strokes
    scale = np.array([pen.width * (0.8 if digit == 1 else 1.0), 1.0])
    return [stroke * scale for stroke in strokes]


def _varied(count: int) -> list[Pen]:
    """More hands, put together at random (the same ones every time) from the same proportions and forms."""
    rng = np.random.default_rng(2011)
    choices = {
        "cap": ("round", "flat"),
        "one": ("flag", "flag", "stem", "based", "hooked"),
        "three": ("round", "round", "flat"),
        "four": ("closed", "closed", "open"),
        "six": ("curved", "hooked", "straight"),
        "seven": ("plain", "plain", "curved", "crossed"),
    }
    pens = []
    for _ in range(count):
        u = rng.random(5)
        forms = {name: kinds[int(rng.integers(len(kinds)))] for name, kinds in choices.items()}
        half = 0.04 + 0.075 * float(u[1])
        pens.append(
            Pen(
                width=round(0.42 + 0.28 * float(u[0]), 3),
                half=round(half, 3),
                square=round(2.0 + 1.6 * float(u[2]) ** 2, 2),
                contrast=round(0.5 * max(0.0, float(u[3]) - 0.5), 2),
                waist=round(0.45 + 0.08 * float(u[4]), 3),
                slab=round(2.0 * half, 3) if forms["one"] == "based" else 0.0,
                **forms,
            )
        )
    return pens


PENS: tuple[Pen, ...] = (
    Pen(0.50, 0.055, one="stem", four="closed", six="straight"),
    Pen(0.62, 0.050, cap="flat", one="flag", six="straight", seven="plain"),
    Pen(0.44, 0.070, square=2.8, cap="flat", one="flag", six="curved"),
    Pen(0.56, 0.085, square=2.4, cap="flat", one="flag", six="curved", contrast=0.15),
    Pen(0.60, 0.100, square=2.3, cap="flat", one="flag", three="round", contrast=0.2, six="hooked"),
    Pen(0.42, 0.090, square=3.4, cap="flat", one="stem", six="hooked", four="closed"),
    Pen(0.48, 0.060, square=3.8, cap="round", one="flag", six="hooked", four="square"),
    Pen(0.55, 0.045, one="hooked", six="curved", seven="curved", waist=0.46),
    Pen(0.58, 0.065, one="based", slab=0.12, cap="flat", six="curved", contrast=0.35),
    Pen(0.54, 0.080, one="based", slab=0.14, cap="flat", six="hooked", contrast=0.5, seven="curved"),
    Pen(0.60, 0.055, one="flag", slab=0.10, six="curved", contrast=0.4, three="flat", seven="curved"),
    Pen(0.52, 0.070, one="flag", seven="crossed", four="open", six="curved"),
    Pen(0.64, 0.055, one="flag", seven="crossed", four="closed", six="straight", three="flat"),
    Pen(0.40, 0.050, square=2.6, one="stem", four="open", six="curved", waist=0.44),
    Pen(0.66, 0.075, square=2.0, cap="flat", one="stem", six="straight", waist=0.55),
    Pen(0.50, 0.095, square=2.6, cap="flat", one="flag", stencil=0.07, six="hooked"),
    Pen(0.58, 0.120, square=2.2, cap="flat", one="flag", six="curved", contrast=0.3),
    Pen(0.46, 0.110, square=2.9, cap="round", one="flag", six="hooked", contrast=0.1),
    Pen(0.52, 0.060, cap="round", one="hooked", six="curved", seven="curved", contrast=0.45, waist=0.47),
    Pen(0.56, 0.065, square=2.1, cap="flat", one="based", six="hooked", seven="plain", four="closed"),
    Pen(0.48, 0.080, square=2.2, cap="flat", one="flag", three="flat", six="straight", seven="plain"),
    Pen(0.70, 0.090, square=2.5, cap="flat", one="flag", six="hooked", contrast=0.25),
    *_varied(22),
)
ENAMEL: tuple[Pen, ...] = (  # of enamelled plates: narrow and heavy, with thin level parts, feet and balls
    Pen(0.46, 0.090, square=2.3, cap="flat", one="based", slab=0.14, contrast=0.7, six="hooked", ball=True),
    Pen(0.52, 0.095, square=2.2, cap="flat", one="based", slab=0.15, contrast=0.7, six="hooked", ball=True),
    Pen(0.42, 0.080, square=2.5, cap="flat", one="based", slab=0.12, contrast=0.6, six="hooked", ball=True),
    Pen(0.58, 0.100, square=2.1, cap="flat", one="based", slab=0.16, contrast=0.65, six="hooked", ball=True),
    Pen(0.50, 0.060, square=2.1, cap="flat", one="based", slab=0.10, contrast=0.5, six="hooked", ball=True),
    Pen(0.48, 0.075, square=2.2, cap="flat", one="based", slab=0.11, contrast=0.5, six="curved", three="flat"),
    Pen(0.40, 0.075, square=2.9, cap="flat", one="flag", contrast=0.2, six="hooked"),
    Pen(0.44, 0.090, square=3.0, cap="flat", one="flag", contrast=0.15, six="hooked"),
    Pen(0.36, 0.065, square=2.8, cap="flat", one="flag", contrast=0.15, six="hooked"),
    Pen(0.50, 0.080, square=2.6, cap="flat", one="flag", contrast=0.2, six="curved"),
)
FLAT: tuple[Pen, ...] = (  # whose 3 has a flat top
    Pen(0.46, 0.085, 2.3, 0.6, "flat", 0.14, ball=True, one="based", three="flat"),
    Pen(0.54, 0.075, 2.1, 0.5, "flat", 0.13, ball=True, one="based", three="flat", seven="curved"),
    Pen(0.50, 0.055, 2.1, 0.4, "flat", ball=True, three="flat", seven="curved"),
    Pen(0.44, 0.065, 2.6, 0.2, "flat", three="flat", four="open", six="straight"),
)

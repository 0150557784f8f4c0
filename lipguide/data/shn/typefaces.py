"""Glyphs as signed distances: positive inside the ink, negative outside, in units of the glyph's height.

One bilinear look-up then gives a glyph at any size, slant and weight: the ink of a heavier cut is where the distance
exceeds a negative threshold, an outline is where it is near zero, a bevel is its gradient. The outlines are those of
the typefaces that matplotlib carries; the drawn ones come from `strokes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lipguide.data.shn.strokes import ENAMEL, FLAT, PENS, Pen, skeleton

__all__ = ["FACES", "GLYPHS", "MARGIN", "RESOLUTION", "Face", "Glyph", "draw_glyph", "glyph"]

RESOLUTION = 56  # cells of the distance field per glyph height
MARGIN = 0.34  # of the field around the ink, in glyph heights: room for weight, outlines and shadows
OFFSET = 0.5  # added to the stored distance, so that 0 (what lies beyond the field) means far outside


@dataclass(frozen=True)
class Face:
    """A typeface: a font file with the characters that stand for its digits, or a pen; weight = its share among those
    of its kind.

    >>> FACES[0].source
    'DejaVuSans-Bold.ttf'
    """

    source: str | Pen
    weight: float = 1.0
    zero: str = "0"
    thin: float = -0.025
    heavy: float = 0.03
    kind: str = "print"

    @property
    def prints(self) -> bool:
        """Whether the face has letters too."""
        return isinstance(self.source, str)

    def character(self, sign: int | str) -> str:
        """The character that draws a digit 0 to 9 in this face; a letter stands for itself."""
        return chr(ord(self.zero) + sign) if isinstance(sign, int) else sign


@dataclass(frozen=True, eq=False)
class Glyph:
    """One glyph.

    Args:
        field: mode-F picture of distance + OFFSET.
        hull: convex hull (k, 2) of the ink, y down, height 1, centred on the ink.
        cell: field cells per unit.
        origin: position of the ink's centre in the field, in cells.

    >>> round(float(np.ptp(glyph(0, 3).hull[:, 1])), 3)
    1.0
    """

    field: Image.Image
    hull: np.ndarray
    cell: float
    origin: tuple[float, float]


SANS_BOLD = chr(0x1D7EC)
SANS = chr(0x1D7E2)
FACES: tuple[Face, ...] = (
    Face("DejaVuSans-Bold.ttf", 3.0, thin=-0.05, heavy=0.01, kind="poster"),
    Face("DejaVuSans.ttf", 3.0, thin=-0.02, heavy=0.04),
    Face("DejaVuSans-Oblique.ttf", 0.6, kind="italic"),
    Face("DejaVuSans-BoldOblique.ttf", 0.5, thin=-0.05, heavy=0.01, kind="italic"),
    Face("DejaVuSerif.ttf", 1.2, kind="book"),
    Face("DejaVuSerif-Bold.ttf", 1.5, thin=-0.04, heavy=0.01, kind="poster"),
    Face("DejaVuSerif-Italic.ttf", 0.4, kind="italic"),
    Face("DejaVuSerif-BoldItalic.ttf", 0.4, thin=-0.04, heavy=0.01, kind="italic"),
    Face("STIXGeneral.ttf", 1.5, thin=-0.005, heavy=0.03, kind="book"),
    Face("STIXGeneralBol.ttf", 1.5, heavy=0.02, kind="poster"),
    Face("STIXGeneralItalic.ttf", 0.5, thin=-0.005, heavy=0.03, kind="italic"),
    Face("STIXGeneralBolIta.ttf", 0.4, kind="italic"),
    Face("STIXGeneral.ttf", 2.0, SANS, thin=-0.015, heavy=0.04),
    Face("STIXGeneralBol.ttf", 3.0, SANS_BOLD, heavy=0.02, kind="poster"),
    Face("cmss10.ttf", 2.0, thin=-0.01, heavy=0.04),
    Face("cmr10.ttf", 0.8, thin=0.0, heavy=0.04, kind="book"),
    Face("cmb10.ttf", 1.2, heavy=0.02, kind="poster"),
    Face("cmmi10.ttf", 0.4, thin=0.0, heavy=0.04, kind="italic"),
    Face("cmtt10.ttf", 0.6, thin=0.0, heavy=0.04),
    *(Face(pen, 0.5, thin=max(-0.025, 0.038 - pen.half), kind="pen") for pen in PENS),
    *(Face(pen, 1.0, thin=-0.02, kind="enamel") for pen in ENAMEL),
    *(Face(pen, 1.0, thin=-0.02, kind="flat") for pen in FLAT),
)


def _outline(name: str, character: str) -> list[np.ndarray]:
    """Closed contours of a character, height 1, y down, first and last points equal."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    path = TextPath((0, 0), character, size=100, prop=FontProperties(fname=str(file)))
    contours = [polygon * np.array([1.0, -1.0]) for polygon in path.to_polygons()]
    points = np.concatenate(contours)
    low, height = points.min(axis=0), np.ptp(points[:, 1])
    return [(contour - low) / height for contour in contours]


def _grid(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(low[0] - MARGIN, high[0] + MARGIN, 1 / RESOLUTION, dtype=np.float64)
    y = np.arange(low[1] - MARGIN, high[1] + MARGIN, 1 / RESOLUTION, dtype=np.float64)
    return x, y


def _to_segment(x: np.ndarray, y: np.ndarray, a: np.ndarray, run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance of every grid point to the segment from a to a + run, and where along it: (Y, X) each."""
    squared = run[0] * run[0] + run[1] * run[1]
    unit = run / np.maximum(squared, np.float32(1e-12))
    px, py = x - a[0], (y - a[1])[:, None]
    along = px * unit[0] + py * unit[1]
    np.clip(along, 0.0, 1.0, out=along)
    dx = along * run[0]
    dy = along * run[1]
    np.subtract(px, dx, out=dx)
    np.subtract(py, dy, out=dy)
    dx *= dx
    dy *= dy
    dx += dy
    return dx, along


def _outline_distance(contours: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to filled contours; the sign is the non-zero winding rule."""
    a = np.concatenate([c[:-1] for c in contours])
    b = np.concatenate([c[1:] for c in contours])
    fine_x, fine_y, starts, stops = (v.astype(np.float32) for v in (x, y, a, b))
    squared = np.full((len(y), len(x)), np.inf, dtype=np.float32)
    for start, run in zip(starts, stops - starts, strict=True):
        np.minimum(squared, _to_segment(fine_x, fine_y, start, run)[0], out=squared)
    distance = np.sqrt(squared)
    return np.where(_winding(a, b, x, y) != 0, distance, -distance)


def _winding(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How often the segments a to b turn around each grid point: (Y, X)."""
    ax, ay = a[:, :1], a[:, 1:]  # (S, 1)
    bx, by = b[:, :1], b[:, 1:]
    up = (ay <= y) & (by > y)  # (S, Y)
    down = (by <= y) & (ay > y)
    rise = np.where(by == ay, 1.0, by - ay)
    crossing = ax + (y - ay) / rise * (bx - ax)  # (S, Y): where a segment meets a row
    turns = up.astype(np.int64) - down
    segment, row = np.nonzero(turns)
    column = np.searchsorted(x, crossing[segment, row], side="right")  # the first that lies beyond
    steps = np.zeros((len(y), len(x) + 1), dtype=np.int64)
    np.add.at(steps, (row, column), turns[segment, row])
    return steps.cumsum(axis=1)[:, :-1]


def _slabs(strokes: list[np.ndarray], length: float) -> list[np.ndarray]:
    """A short bar across every end that stands on the ground line, as slab serifs have."""
    ends = [point for stroke in strokes for point in (stroke[0], stroke[-1]) if point[1] > 0.99]
    return [np.array([end - [length, 0.0], end + [length, 0.0]]) for end in ends]


def _pen_distance(strokes: list[np.ndarray], pen: Pen, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to strokes of a pen whose half thickness falls by `contrast` where it runs level."""
    best = np.full((len(y), len(x)), -np.inf)
    for stroke in strokes:
        a, b = stroke[:-1], stroke[1:]
        run = b - a
        level = np.abs(run[:, 0]) / np.maximum(np.hypot(run[:, 0], run[:, 1]), 1e-9)
        half = pen.half * (1 - pen.contrast * level**2)
        ends = np.concatenate([half[:1], (half[:-1] + half[1:]) / 2, half[-1:]])
        fine_x, fine_y, starts, stops = (v.astype(np.float32) for v in (x, y, a, b))
        found = [_to_segment(fine_x, fine_y, *each) for each in zip(starts, stops - starts, strict=True)]
        distance, along = np.sqrt([squared for squared, _ in found]), np.array([along for _, along in found])
        thick = ends[:-1, None, None] * (1 - along) + ends[1:, None, None] * along
        ink = thick - distance
        if pen.cap == "flat" and not np.allclose(stroke[0], stroke[-1]):
            for row, end, inward in ((0, stroke[0], run[0]), (-1, stroke[-1], -run[-1])):
                unit = inward / max(np.hypot(*inward), 1e-9)
                beyond = (x - end[0])[None, :] * unit[0] + (y - end[1])[:, None] * unit[1]
                ink[row] = np.minimum(ink[row], beyond + 0.2 * pen.half)
        best = np.maximum(best, ink.max(axis=0))
    return best


GLYPHS: dict[tuple[int, int | str], Glyph] = {}  # that are drawn already, by face and sign


def glyph(face: int, sign: int | str) -> Glyph:
    """The glyph of a digit 0 to 9, or of a letter, in `FACES[face]`, drawn once a process; pens draw no letters.

    >>> shape = glyph(0, 8).field.size
    >>> shape[1] > RESOLUTION
    True
    """
    found = GLYPHS.get((face, sign))
    if found is None:
        found = GLYPHS[face, sign] = draw_glyph(face, sign)
    return found


def draw_glyph(face: int, sign: int | str) -> Glyph:
    """What `glyph` remembers. The libraries that know outlines and hulls are imported here: who has all glyphs already
    needs neither."""
    from scipy.spatial import ConvexHull

    source = FACES[face].source
    if isinstance(source, Pen):
        digit = int(sign)
        strokes = skeleton(digit, source)
        strokes += _slabs(strokes, source.slab) if source.slab and digit in (1, 4, 7) else []
        points = np.concatenate(strokes)
        reach = source.half * np.array([[c, s] for c in (-1, 0, 1) for s in (-1, 0, 1)])
        x, y = _grid(points.min(axis=0) - source.half, points.max(axis=0) + source.half)
        distance = _pen_distance(strokes, source, x, y)
        if source.stencil:
            middle = (points[:, 0].min() + points[:, 0].max()) / 2
            gap = np.abs(x - middle) - source.stencil / 2
            distance = np.minimum(distance, gap[None, :]) if digit in (0, 6, 8, 9) else distance
        inked = np.argwhere(distance >= 0)
        ink = np.stack([x[inked[:, 1]], y[inked[:, 0]]], axis=1)
        ink = ink if len(ink) else (points[:, None] + reach).reshape(-1, 2)
    else:
        contours = _outline(source, FACES[face].character(sign))
        ink = np.concatenate(contours)
        x, y = _grid(ink.min(axis=0), ink.max(axis=0))
        distance = _outline_distance(contours, x, y)
    low, high = ink.min(axis=0), ink.max(axis=0)
    height = high[1] - low[1]
    centre = (low + high) / 2
    hull = (ink - centre) / height
    stored = np.maximum(distance / height + OFFSET, 0.0).astype(np.float32)
    cells = ((centre[0] - x[0]) * RESOLUTION + 0.5, (centre[1] - y[0]) * RESOLUTION + 0.5)
    return Glyph(Image.fromarray(stored), hull[ConvexHull(hull).vertices], RESOLUTION * height, cells)

"""The few array operations that pictures are made of.

Pictures are float32 arrays (3, H, W), soft masks (H, W). Everything a pixel goes through is elementwise +, -, x, /
and square root, which every machine rounds alike, or is computed in float64 first: so a picture does not depend on
the processor that made it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import correlate1d

__all__ = [
    "blend",
    "coverage",
    "fractal",
    "gaussian_blur",
    "line_distance",
    "rounded_rectangle",
    "shifted",
    "soft_step",
]

Array = np.ndarray


def coverage(distance: Array, softness: float = 1.0) -> Array:
    """Share of a pixel that ink covers, from its signed distance in pixels: a ramp of the given width.

    >>> coverage(np.array([-1.0, 0.0, 1.0], dtype=np.float32)).tolist()
    [0.0, 0.5, 1.0]
    """
    ramp = distance * np.float32(1.0 / softness)
    ramp += np.float32(0.5)
    return np.clip(ramp, 0.0, 1.0, out=ramp)


def soft_step(value: Array) -> Array:
    """Smooth step 3t² - 2t³ of a value clipped to [0, 1]."""
    t = np.clip(value, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def blend(picture: Array, colour: Array, alpha: Array) -> None:
    """In place: picture ← picture + alpha (colour - picture); colour is (3,), or a picture itself.

    >>> white = np.ones((3, 1, 1), dtype=np.float32)
    >>> blend(white, np.zeros(3, dtype=np.float32), np.full((1, 1), 0.25, dtype=np.float32))
    >>> float(white[0, 0, 0])
    0.75
    """
    full = colour if colour.ndim == 3 else colour[:, None, None]
    change = full - picture
    change *= alpha
    picture += change


def shifted(field: Array, dy: int, dx: int, fill: float) -> Array:
    """The field moved by (dy, dx) pixels; what moves in has the value `fill`.

    >>> shifted(np.array([[1.0, 2.0]]), 0, 1, 9.0).tolist()
    [[9.0, 1.0]]
    """
    height, width = field.shape
    out = np.full_like(field, fill)
    if abs(dy) < height and abs(dx) < width:
        source = field[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
        out[max(dy, 0) : height - max(-dy, 0), max(dx, 0) : width - max(-dx, 0)] = source
    return out


def _resized(grid: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def fractal(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scale: tuple[float, float],
    octaves: int = 3,
    roughness: float = 0.5,
) -> Array:
    """Smooth noise with mean about 0 and deviation about 1: random grids of ever finer mesh, each enlarged to size.

    Args:
        scale: (vertical, horizontal) size in pixels of the coarsest features; unequal sizes give grain.

    >>> fractal(np.random.default_rng(0), (8, 12), (4.0, 4.0)).shape
    (8, 12)
    """
    height, width = shape
    total: Array | None = None
    amplitude, power = 1.0, 0.0
    sy, sx = scale
    for _ in range(octaves):
        rows, columns = (max(2, int(n / max(s, 1.0)) + 2) for n, s in ((height, sy), (width, sx)))
        grid = rng.standard_normal((rows, columns), dtype=np.float32)
        octave = np.float32(amplitude) * _resized(grid, height, width)
        total = octave if total is None else np.add(total, octave, out=total)
        power += amplitude**2
        amplitude *= roughness
        sy, sx = sy / 2, sx / 2
        if max(sy, sx) < 1.0:
            break
    total *= np.float32(1.3 / power**0.5)
    return total


def gaussian_blur(picture: Array, sigma_y: float, sigma_x: float) -> Array:
    """Separable Gaussian blur of the last two axes; edges repeat.

    >>> flat = np.full((1, 5, 5), 0.5, dtype=np.float32)
    >>> bool(np.allclose(gaussian_blur(flat, 1.0, 2.0), 0.5))
    True
    """
    for axis, sigma in ((-2, sigma_y), (-1, sigma_x)):
        if sigma > 0.15:
            radius = max(1, int(2.6 * sigma + 0.5))
            x = np.arange(-radius, radius + 1, dtype=np.float64)
            kernel = np.exp(-0.5 * (x / sigma) ** 2)
            picture = correlate1d(picture, kernel / kernel.sum(), axis=axis, mode="nearest")
    return picture


def rounded_rectangle(x: Array, y: Array, half_width: float, half_height: float, radius: float) -> Array:
    """Signed distance (positive inside) to a rectangle around the origin with rounded corners.

    >>> float(rounded_rectangle(np.zeros(1), np.zeros(1), 3.0, 2.0, 0.5)[0])
    2.0
    """
    radius = min(radius, half_width, half_height)
    dx = np.abs(x) - np.float32(half_width - radius)
    dy = np.abs(y) - np.float32(half_height - radius)
    ox, oy = np.maximum(dx, 0.0), np.maximum(dy, 0.0)
    return np.float32(radius) - np.sqrt(ox * ox + oy * oy) - np.minimum(np.maximum(dx, dy), 0.0)


def line_distance(x: Array, y: Array, start: tuple[float, float], stop: tuple[float, float]) -> Array:
    """Distance of the points (x, y) to a segment.

    >>> float(line_distance(np.array([3.0]), np.array([4.0]), (0.0, 0.0), (0.0, 0.0))[0])
    5.0
    """
    ux, uy = stop[0] - start[0], stop[1] - start[1]
    px, py = x - np.float32(start[0]), y - np.float32(start[1])
    share = np.float32(1.0 / max(ux * ux + uy * uy, 1e-6))
    along = (px * np.float32(ux) + py * np.float32(uy)) * share
    along = np.clip(along, 0.0, 1.0)
    dx = px - along * np.float32(ux)
    dy = py - along * np.float32(uy)
    return np.sqrt(dx * dx + dy * dy)

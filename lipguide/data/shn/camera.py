"""From the wall to the file: exposure, haze, lens, motion, sensor and JPEG."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image
from scipy.ndimage import correlate

from lipguide.data.shn.arrays import Array, gaussian_blur
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.looks import Look

__all__ = ["develop", "expose", "focus"]

HAZE = np.array([0.43, 0.44, 0.47], dtype=np.float32)  # about SVHN's mean colour


def expose(picture: Array, contrast: float, stands_out: float, look: Look, rng: np.random.Generator) -> Array:
    """Exposure, white balance and haze: the picture fades towards grey, the more the larger `contrast`, but not
    beyond what leaves the number, which differs from its ground by `stands_out`, just visible."""
    u = rng.random(3)
    gain = math.exp(look.exposure[1] * float(rng.standard_normal()) + look.exposure[0])
    warm = look.warmth[1] * float(rng.standard_normal()) + look.warmth[0]
    balance = np.array([gain * (1 + warm), gain, gain * (1 - warm)], dtype=np.float32)
    visible = (0.055 + 0.12 * u[2]) / max(contrast, 0.25)
    faded = 1.0 - contrast * (look.haze[0] + look.haze[1] * u[0] ** 1.5)
    least = min(visible / max(gain * stands_out, 1e-3), 1.0)
    kept = np.float32(max(faded, least))
    haze = HAZE * np.float32(0.8 + 0.5 * u[1])
    seen = picture * (balance * kept)[:, None, None]
    seen += (haze * (1 - kept))[:, None, None]
    return seen.astype(np.float32, copy=False)


def _motion(picture: Array, length: float, angle: float) -> Array:
    """Average along a line of the given length, by a small kernel whose taps share between pixels."""
    radius = int(math.ceil(length / 2))
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    steps = 8 * radius + 1
    for k in range(steps):
        t = (k / (steps - 1) - 0.5) * length
        px, py = radius + t * math.cos(angle), radius + t * math.sin(angle)
        ix, iy = min(int(px), 2 * radius - 1), min(int(py), 2 * radius - 1)
        fx, fy = px - ix, py - iy
        kernel[iy, ix] += (1 - fx) * (1 - fy)
        kernel[iy, ix + 1] += fx * (1 - fy)
        kernel[iy + 1, ix] += (1 - fx) * fy
        kernel[iy + 1, ix + 1] += fx * fy
    return correlate(picture, (kernel / kernel.sum())[None], mode="nearest")


def focus(picture: Array, unit: float, blur: float, look: Look, rng: np.random.Generator) -> Array:
    """Lens and motion blur in proportion to the digits' height `unit`, at least that of the picture's own pixels;
    now and then sharpened afterwards, as cameras do."""
    u = rng.random(6)
    own = 0.35 + 0.35 * u[0]
    least, more, far, often = look.defocus
    relative = unit * (least + more * u[1] ** 1.3 + (far * u[2] if u[2] > 1 - often else 0.0))
    sigma = blur * math.sqrt(own * own + relative * relative)
    oval = 1.0 + 0.35 * (u[3] - 0.5)
    picture = gaussian_blur(picture, sigma * oval, sigma / oval)
    length = blur * unit * 0.16 * float(rng.random())
    if u[4] < look.shaken and length > 1.2:
        picture = _motion(picture, min(length, 25.0), math.pi * float(rng.random()))
    if u[5] < look.sharpened[0]:
        edges = picture - gaussian_blur(picture, sigma + 0.4, sigma + 0.4)
        edges *= np.float32(0.3 + look.sharpened[1] * u[5])
        picture = np.add(edges, picture, out=edges)
    return picture


def develop(picture: Array, difficulty: Difficulty, look: Look, rng: np.random.Generator) -> bytes:
    """Sensor noise, rounding to 8 bits, JPEG: the bytes of the file."""
    shape = picture.shape
    u = rng.random(4)
    sigma = difficulty.noise * (look.grain[0] + look.grain[1] * u[0] ** 2)
    noise = rng.standard_normal(shape[1:], dtype=np.float32)[None] * np.float32(sigma)
    if u[1] < 0.5:
        coloured = rng.standard_normal(shape, dtype=np.float32)
        coloured *= np.float32(0.6 * sigma)
        noise = np.add(coloured, noise, out=coloured)
    if u[2] < 0.5:
        noise = gaussian_blur(noise, 0.6, 0.6)
        noise *= np.float32(1.7)
    values = picture + noise
    values *= np.float32(255.0)
    values += np.float32(0.5)
    np.clip(values, 0.0, 255.0, out=values)
    pixels = np.empty((*shape[1:], 3), dtype=np.uint8)
    for channel, level in enumerate(values):
        pixels[:, :, channel] = level
    quality = 96.0 - difficulty.noise * (look.loss[0] + look.loss[1] * float(u[3]) ** 1.3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, "JPEG", quality=round(min(max(quality, 20.0), 96.0)), subsampling=2 if u[3] > 0.3 else 0
    )
    return file.getvalue()

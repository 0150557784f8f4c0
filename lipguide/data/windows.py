"""Windows cut out of pictures and scaled to a square of pixels."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor, uint8

__all__ = ["cut", "to_pixels"]


def cut(pixels: np.ndarray, window: tuple[float, float, float, float], size: int, smooth: bool = True) -> np.ndarray:
    """The window (left, top, right, bottom) of (H, W) or (H, W, 3) uint8 pixels, scaled to size x size.

    Bicubic with anti-aliasing, or the nearest pixel if not `smooth` (for masks). Where the window sticks out, the
    picture's edge is repeated.

    >>> cut(np.full((4, 6), 7, dtype=np.uint8), (-2.0, -1.0, 4.0, 5.0), 3).tolist()
    [[7, 7, 7], [7, 7, 7], [7, 7, 7]]
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = window
    above, before = max(0, math.ceil(-top)), max(0, math.ceil(-left))
    below, after = max(0, math.ceil(bottom - height)), max(0, math.ceil(right - width))
    if above or before or below or after:
        edges = [(above, below), (before, after)] + [(0, 0)] * (pixels.ndim - 2)
        pixels = np.pad(pixels, edges, mode="edge")
    box = (left + before, top + above, right + before, bottom + above)
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size), method, box=box))


def to_pixels(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a picture (3, H, W) in [0, 1].

    >>> import torch
    >>> to_pixels(torch.ones(3, 1, 2)).tolist()
    [[[255, 255, 255], [255, 255, 255]]]
    """
    return (image * 255).round().to(uint8).permute(1, 2, 0).contiguous().numpy()

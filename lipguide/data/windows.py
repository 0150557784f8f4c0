"""Windows cut out of pictures and scaled to a square of pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["check_dtype", "cut", "pictures", "to_pixels"]


def cut(pixels: np.ndarray, window: tuple[float, float, float, float], side: int, smooth: bool = True) -> np.ndarray:
    """The window (left, top, right, bottom) of (H, W) or (H, W, 3) uint8 pixels, scaled to side x side.

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
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), method, box=box))


def to_pixels(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a picture (3, H, W): of bytes, or of floats in [0, 1].

    >>> to_pixels(torch.ones(3, 1, 2)).tolist()
    [[[255, 255, 255], [255, 255, 255]]]
    """
    if image.dtype != torch.uint8:
        image = (image * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse another type than the two that pictures come in."""
    if dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"dtype must be torch.uint8 (bytes) or torch.float32 (floats in [0, 1]), not {dtype}")


def pictures(windows: list[np.ndarray], side: int, dtype: torch.dtype) -> Tensor:
    """Windows (side, side, 3) of bytes as one tensor (N, 3, side, side), of bytes or of float32 in [0, 1].

    >>> pictures([np.full((2, 2, 3), 255, dtype=np.uint8)], 2, torch.float32).unique().tolist()
    [1.0]
    """
    check_dtype(dtype)
    stack = np.empty((len(windows), 3, side, side), dtype=np.uint8)
    for own, window in zip(stack, windows, strict=True):
        own[...] = window.transpose(2, 0, 1)
    images = torch.from_numpy(stack)
    return images if dtype == torch.uint8 else images.float().div_(255)

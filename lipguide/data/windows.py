"""Pictures as bytes and as tensors, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_pictures", "check_dtype", "to_pixels"]


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


def as_pictures(squares: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Squares (N, 3, side, side) of bytes as a tensor of bytes, of the same memory, or of float32 in [0, 1].

    >>> as_pictures(np.full((1, 3, 2, 2), 255, dtype=np.uint8), torch.float32).unique().tolist()
    [1.0]
    """
    check_dtype(dtype)
    images = torch.from_numpy(squares)
    return images if dtype == torch.uint8 else images.float().div_(255)

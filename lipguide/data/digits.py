"""Single digits for classification: 32 x 32 crops, made as SVHN's "format 2" is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lipguide.data.items import Scene
from lipguide.data.windows import check_dtype, cut, pictures, to_pixels

__all__ = ["Digits", "digits"]

SIDE = 32


class Digits(NamedTuple):
    """Single digits.

    Args:
        images: (N, 3, 32, 32) float32 in [0, 1], or bytes where they were asked for.
        labels: (N,) int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor


def _crops(scene: Scene) -> list[np.ndarray]:
    """A square around every box, as high or as wide as the box is, whichever is more: nothing is distorted."""
    pixels = to_pixels(scene.pixels)
    height, width = pixels.shape[:2]
    crops = []
    for x0, y0, x1, y1 in scene.boxes.double().numpy() * [width, height, width, height]:
        side = max(x1 - x0, y1 - y0)
        left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
        crops.append(cut(pixels, (left, top, left + side, top + side), SIDE))
    return crops


def _labelled(item: tuple, index: int) -> tuple[np.ndarray, int]:
    """Pixels and label of an item (picture, label), as torchvision's SVHN and CIFAR10 hand out."""
    image, label = item
    if isinstance(image, Image.Image):
        pixels = np.asarray(image.convert("RGB"))
    else:
        image = torch.as_tensor(image)
        if image.is_floating_point() and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"item {index}: digits need pictures in [0, 1], not normalised ones")
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise ValueError(f"item {index}: digits need bytes or floats in [0, 1], not {image.dtype}")
        pixels = to_pixels(image)
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"item {index} is {pixels.shape}: digits takes scenes, or pictures of 32 x 32 with a label")
    return pixels, int(label)


def digits(dataset: Dataset, dtype: torch.dtype = torch.float32) -> Digits:
    """All digits of a data set of scenes, each in the square window of SVHN's format 2 (the box extended to a square
    around its middle, scaled to 32 x 32; the neighbours that it then contains are part of the task).

    A data set of 32 x 32 pictures with labels, such as torchvision's `SVHN` or `CIFAR10`, is taken as it is.

    Args:
        dtype: of the pictures: `torch.float32` in [0, 1], or `torch.uint8`, a quarter of the memory.

    >>> from lipguide.data.shn import SyntheticHouseNumbers
    >>> images, labels = digits(SyntheticHouseNumbers("train", size=3, cache=False))
    >>> images.shape[1:], len(images) == len(labels)
    (torch.Size([3, 32, 32]), True)
    """
    check_dtype(dtype)
    crops: list[np.ndarray] = []
    labels: list[int] = []
    for index in range(len(dataset)):
        item = dataset[index]
        if isinstance(item, Scene):
            crops += _crops(item)
            labels += item.labels.tolist()
        else:
            pixels, label = _labelled(item, index)
            crops.append(pixels)
            labels.append(label)
    return Digits(pictures(crops, SIDE, dtype), torch.tensor(labels, dtype=torch.int64))

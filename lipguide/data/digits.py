"""Single digits for classification: 32 x 32 crops, made as SVHN's "format 2" is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lipguide.data.crops import Cutting, stacked
from lipguide.data.items import Scene
from lipguide.data.scenes import scene_rows
from lipguide.data.windows import as_pictures, check_dtype, to_pixels

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

    Those of `SyntheticHouseNumbers` are kept in a file, as those of `scenes` are.

    A data set of 32 x 32 pictures with labels, such as torchvision's `SVHN` or `CIFAR10`, is taken as it is.

    Args:
        dtype: of the pictures: `torch.float32` in [0, 1], or `torch.uint8`, a quarter of the memory.

    >>> from lipguide.data.shn import SyntheticHouseNumbers
    >>> images, labels = digits(SyntheticHouseNumbers("train", size=3, cache=False))
    >>> images.shape[1:], len(images) == len(labels)
    (torch.Size([3, 32, 32]), True)
    """
    check_dtype(dtype)
    cutting = Cutting("digits", SIDE)
    kept = getattr(dataset, "cuttings", None)
    if kept is not None:
        rows = kept(cutting)
        return Digits(as_pictures(rows["images"], dtype), torch.from_numpy(rows["labels"].astype(np.int64)))
    crops: list[dict[str, np.ndarray]] = []
    labels: list[int] = []
    for index in range(len(dataset)):
        item = dataset[index]
        if isinstance(item, Scene):
            crops.append(scene_rows(item, cutting, index))
            labels += item.labels.tolist()
        else:
            pixels, label = _labelled(item, index)
            crops.append({"images": pixels.transpose(2, 0, 1)[None], "labels": np.zeros(1, dtype=np.uint8)})
            labels.append(label)
    images = stacked(cutting, crops)["images"]
    return Digits(as_pictures(images, dtype), torch.tensor(labels, dtype=torch.int64))

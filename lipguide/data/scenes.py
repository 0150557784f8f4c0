"""Whole numbers for detection and segmentation: square pictures with boxes, labels and class maps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipguide.data.arguments import whole
from lipguide.data.items import BACKGROUND, Scene
from lipguide.data.windows import check_dtype, cut, pictures, to_pixels

__all__ = ["Scenes", "number_window", "scenes"]

ENLARGE = 0.3  # of the square around the number, both sides together


class Scenes(NamedTuple):
    """Square pictures of numbers.

    Args:
        images: (N, 3, size, size) float32 in [0, 1], or bytes where they were asked for.
        boxes: N tensors (n, 4), xyxy in [0, 1].
        labels: N tensors (n,) int64, 0 to 9.
        masks: (N, size, size) int64 class maps, the digit of every pixel, or `BACKGROUND` = 10 where there is none;
            None for a data set without masks.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    masks: Tensor | None


def number_window(
    width: int, height: int, corners: np.ndarray, rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """The Tinier SSD recipe's window (left, top, side) around a number in a picture.

    The smallest square that holds all boxes slides at random along its free direction, then grows by 30 %, by half
    of that, a quarter and so on until it fits the picture. None where no square around the number fits: the recipe
    drops such scenes (3 or 4 digits across a low picture). Unlike the recipe, the slide is drawn among the positions
    that fit, so no scene is lost by chance, and nothing is dropped because a box starts at a negative coordinate.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        corners: (n, 4) xyxy in pixels.
        rng: where the slide comes from.

    >>> number_window(100, 60, np.array([[40, 20, 50, 40], [50, 20, 60, 40]]), np.random.default_rng(0))
    (37, 17, 26)
    """
    x0, y0 = (int(v) for v in np.floor(corners[:, :2].min(axis=0)))
    x1, y1 = (int(v) for v in np.ceil(corners[:, 2:].max(axis=0)))
    side = max(x1 - x0, y1 - y0)
    low = max(0, x1 - side), max(0, y1 - side)
    high = min(x0, width - side), min(y0, height - side)
    if high[0] < low[0] or high[1] < low[1]:
        return None
    left, top = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
    more = round(side * ENLARGE / 2)
    while more > 1 and (min(left, top) < more or left + side + more > width or top + side + more > height):
        more //= 2
    more = more if more > 1 else 0
    return left - more, top - more, side + 2 * more


def _window(scene: Scene, view: str, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in pixels of what a view shows of a scene; None if it drops it."""
    height, width = scene.pixels.shape[1:]
    if view == "frame":
        return 0, 0, width, height
    if not len(scene.boxes):
        return None
    found = number_window(width, height, scene.boxes.double().numpy() * ([width, height] * 2), rng)
    return None if found is None else (found[0], found[1], found[0] + found[2], found[1] + found[2])


def scenes(
    dataset: Dataset[Scene],
    size: int = 74,
    view: str = "number",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Scenes:
    """All scenes of a data set as square pictures.

    Args:
        size: side of the pictures in pixels.
        view: "number" is the Tinier SSD recipe's square around the number (`number_window`), which drops scenes that
            it does not suit, about one in nine of train; "frame" is the whole picture, stretched to the square as SSD
            does, and drops none.
        seed: of the windows' random place, drawn for each scene by itself.
        dtype: of the pictures: `torch.float32` in [0, 1], or `torch.uint8`, a quarter of the memory.

    >>> from lipguide.data.shn import SyntheticHouseNumbers
    >>> images, boxes, labels, masks = scenes(SyntheticHouseNumbers("train", size=3, cache=False), view="frame")
    >>> images.shape, masks.shape, int(masks.max())
    (torch.Size([3, 3, 74, 74]), torch.Size([3, 74, 74]), 10)
    """
    if view not in ("number", "frame"):
        raise ValueError(f'view must be "number" or "frame", not {view!r}')
    check_dtype(dtype)
    size, seed = whole("size", size, 1), whole("seed", seed, 0)
    images, boxes, labels, masks = [], [], [], []
    for index in range(len(dataset)):
        scene = dataset[index]
        window = _window(scene, view, np.random.default_rng((seed, index)))
        if window is None:
            continue
        images.append(cut(to_pixels(scene.pixels), window, size))
        height, width = scene.pixels.shape[1:]
        corners = scene.boxes.double().numpy() * [width, height, width, height]
        left, top, right, bottom = window
        inside = (corners - [left, top, left, top]) / [right - left, bottom - top, right - left, bottom - top]
        boxes.append(torch.from_numpy(np.clip(inside, 0.0, 1.0).astype(np.float32)))
        labels.append(scene.labels)
        if scene.mask is not None:
            classes = np.array([BACKGROUND, *scene.labels.tolist()], dtype=np.uint8)[scene.mask.numpy()]
            masks.append(cut(classes, window, size, smooth=False))
    if masks and len(masks) != len(images):
        raise ValueError(f"{len(masks)} of {len(images)} scenes have a mask: all need one, or none")
    class_maps = torch.from_numpy(np.stack(masks)).long() if masks else None
    return Scenes(pictures(images, size, dtype), boxes, labels, class_maps)

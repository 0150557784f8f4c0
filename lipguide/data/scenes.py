"""Whole numbers for detection and segmentation: square pictures with boxes, labels and class maps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipguide.arguments import whole
from lipguide.data.crops import Cutting, stacked
from lipguide.data.items import Scene
from lipguide.data.windows import as_pictures, check_dtype, to_pixels

__all__ = ["Scenes", "scene_rows", "scenes"]


class Scenes(NamedTuple):
    """Square pictures of numbers.

    Args:
        images: (N, 3, size, size) float32 in [0, 1], or bytes where they were asked for.
        boxes: N tensors (n, 4), xyxy in [0, 1].
        labels: N tensors (n,) int64, 0 to 9.
        masks: (N, size, size) class maps, the digit of every pixel, or `BACKGROUND` = 10 where there is none; int64, or
            bytes where bytes were asked for; None for a data set without masks.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    masks: Tensor | None


def scene_rows(scene: Scene, cutting: Cutting, index: int) -> dict[str, np.ndarray]:
    """What is cut out of a scene, for `lipguide.data.crops.stacked`."""
    mask = None if scene.mask is None else scene.mask.numpy()
    return cutting.rows(to_pixels(scene.pixels), scene.boxes.numpy(), scene.labels.numpy(), mask, index)


def scenes(
    dataset: Dataset[Scene],
    size: int = 74,
    view: str = "number",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Scenes:
    """All scenes of a data set as square pictures.

    Those of `SyntheticHouseNumbers` are kept in a file, if the data set keeps its scenes. As bytes they are that file
    itself, mapped into memory: the next process has them at once, and they take up no memory of its own.

    Args:
        size: side of the pictures in pixels.
        view: "number" is the Tinier SSD recipe's square around the number (`lipguide.data.crops.number_window`), which
            drops scenes that it does not suit, about one in nine of train; "frame" is the whole picture, stretched to
            the square as SSD does, and drops none.
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
    cutting = Cutting(view, whole("size", size), whole("seed", seed, least=0))
    kept = getattr(dataset, "cuttings", None)
    if kept is not None:
        rows = kept(cutting)
    else:
        rows = stacked(cutting, (scene_rows(dataset[k], cutting, k) for k in range(len(dataset))))
    counts = rows["digits"].tolist()
    boxes = torch.from_numpy(np.array(rows["boxes"])).split(counts) if counts else ()
    labels = torch.from_numpy(rows["labels"].astype(np.int64)).split(counts) if counts else ()
    masks = None
    if "masks" in rows:
        masks = torch.from_numpy(rows["masks"])
        masks = masks if dtype == torch.uint8 else masks.long()
    return Scenes(as_pictures(rows["images"], dtype), list(boxes), list(labels), masks)

"""What a data set of house numbers hands out: annotations in pixels, scenes as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipguide.data.crops import BACKGROUND, visible

__all__ = ["BACKGROUND", "Annotation", "Scene", "make_scene"]


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture with its digits; the same whether it comes from SVHN or from Synthetic House Numbers.

    `image, boxes, labels, mask = scene` unpacks it, with the picture as floats.

    Args:
        pixels: the picture, (3, H, W) bytes.
        boxes: (n, 4) float32, x and y of the upper left, then of the lower right corner, in [0, 1] of the picture's
            width and height.
        labels: (n,) int64, 0 to 9.
        mask: (H, W) uint8, 0 for background and k + 1 for the pixels of digit k; None where the data set has none.

    >>> scene = Scene(torch.full((3, 20, 40), 255, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0).long())
    >>> scene.image.dtype, float(scene.image.max())
    (torch.float32, 1.0)
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 3 or len(self.pixels) != 3:
            kind = f"{self.pixels.dtype} {tuple(self.pixels.shape)}"
            raise ValueError(
                f"the pixels of a scene are bytes (3, H, W), not {kind}; of floats in [0, 1]: (255 * x).round().byte()"
            )

    @property
    def image(self) -> Tensor:
        """The picture, (3, H, W) float32 in [0, 1]."""
        return self.pixels.float() / 255

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.image, self.boxes, self.labels, self.mask))


@dataclass(frozen=True, eq=False)
class Annotation:
    """What is known of a picture without opening it.

    Args:
        name: of its file.
        width: of the picture in pixels.
        height: of the picture in pixels.
        boxes: (n, 4) left, top, width, height in pixels, as published.
        labels: (n,) 0 to 9.
    """

    name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray


def make_scene(pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, mask: np.ndarray | None) -> Scene:
    """Tensors of a picture (H, W, 3) uint8 and its boxes in pixels. What sticks out of the picture is cut off; a
    digit that lies outside it altogether is left out, as no box in [0, 1] could say where it is.

    >>> pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    >>> make_scene(pixels, np.array([[-4, 5, 14, 10]]), np.array([7]), None).boxes.tolist()
    [[0.0, 0.25, 0.25, 0.75]]
    """
    height, width = pixels.shape[:2]
    corners, labels, mask = visible(boxes, labels, mask, width, height)
    return Scene(
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        torch.from_numpy(corners),
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
        None if mask is None else torch.from_numpy(np.array(mask, dtype=np.uint8)),
    )

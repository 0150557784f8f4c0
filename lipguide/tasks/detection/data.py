"""Scenes for detectors: pictures as bytes, boxes and labels as padded tensors, of SVHN or of its synthetic twin."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.data import SVHN, SyntheticHouseNumbers, scenes
from lipguide.data.shn.looks import DEFAULT
from lipguide.tasks.detection.boxes import Targets, pad_targets
from lipguide.tasks.detection.tinier_ssd import PICTURE
from lipguide.tasks.weights import fingerprint

__all__ = ["Split", "load_split"]


class Split(NamedTuple):
    """Scenes on one device: images (N, 3, 74, 74) of bytes, their targets, and a name and a hash of their content."""

    images: Tensor
    targets: Targets
    name: str
    hash: str

    def part(self, where: slice) -> Split:
        """Some of the scenes, under the name and the hash of all.

        >>> split = load_split("test", 4, 0, torch.device("cpu"))
        >>> len(split.part(slice(2)).images), split.part(slice(2)).targets.labels.shape[0]
        (2, 2)
        """
        targets = Targets(self.targets.boxes[where], self.targets.labels[where])
        return Split(self.images[where], targets, self.name, self.hash)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, boxes and labels, as `lipguide.training.fit` takes them."""
        return self.images, *self.targets


def load_split(
    split: str,
    count: int | None,
    seed: int,
    device: torch.device,
    svhn: str | Path | None = None,
    version: int = DEFAULT,
) -> Split:
    """The first scenes of a split, cut around the number: of SVHN, or of its synthetic twin.

    Args:
        split: "train" or "test".
        count: how many pictures are looked at; scenes without room around the number are left out. None: all.
        seed: of the synthetic pictures, and of the windows around the numbers.
        svhn: the folder of SVHN; None for the twin.
        version: of the twin.

    >>> images = load_split("test", 4, 0, torch.device("cpu")).images
    >>> images.shape[1:], images.dtype
    (torch.Size([3, 74, 74]), torch.uint8)
    """
    if svhn is None:
        whole = SyntheticHouseNumbers(split, count, seed, version=version)
        origin = whole.name
    else:
        whole, origin = SVHN(svhn, split), "SVHN"
    cut = scenes(whole, PICTURE, seed=seed, dtype=torch.uint8)
    images = cut.images[:count]
    boxes, labels = pad_targets(cut.boxes[:count], cut.labels[:count])
    name = f"{origin}, {split}, {len(images)} scenes"
    return Split(images.to(device), Targets(boxes.to(device), labels.to(device)), name, fingerprint(images))

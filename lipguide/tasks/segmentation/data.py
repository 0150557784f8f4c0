"""The pictures that the networks learn to label: windows around house numbers, and a class for each pixel."""

from __future__ import annotations

from torch import Tensor

from lipguide.data import BACKGROUND, SyntheticHouseNumbers, scenes

__all__ = ["CLASSES", "pictures"]

CLASSES = {"digits": BACKGROUND + 1, "ink": 2}  # how many there are, by what the labels are


def pictures(
    split: str = "train", items: int | None = None, pixels: int = 40, labels: str = "digits", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Windows around house numbers: images (N, 3, pixels, pixels) in [0, 1] and masks (N, pixels, pixels).

    Scenes in which no window fits around the number are left out.

    Args:
        labels: "digits", the digit of every pixel or 10 where there is none; or "ink", 1 on a digit and 0 elsewhere.

    >>> images, masks = pictures("test", items=3, pixels=16, labels="ink")
    >>> images.shape[1:], masks.shape[1:], masks.unique().tolist()
    (torch.Size([3, 16, 16]), torch.Size([16, 16]), [0, 1])
    """
    if labels not in CLASSES:
        raise ValueError(f"no labels {labels!r}; there are: {', '.join(CLASSES)}")
    images, _, _, masks = scenes(SyntheticHouseNumbers(split, items, seed), pixels)
    if masks is None:
        raise ValueError(f"none of {items} scenes of {split!r} has a window around its number: take more")
    return images, (masks != BACKGROUND).long() if labels == "ink" else masks

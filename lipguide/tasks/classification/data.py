"""The pictures that the classifiers learn from: digits of house numbers, of SVHN, and CIFAR-10."""

from __future__ import annotations

from pathlib import Path

from lipguide.data import REAL, Digits, SyntheticHouseNumbers, digits, first, real
from lipguide.data.shn import TWINS

__all__ = ["DATA", "pictures"]

DATA = ("house-numbers", *REAL)


def pictures(
    data: str = "house-numbers",
    split: str = "train",
    items: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> Digits:
    """Pictures of 32×32 with their labels: images (N, 3, 32, 32) in [0, 1] and labels (N,).

    Args:
        data: "house-numbers", made on the spot, or a version of them, such as "house-numbers-1"; "svhn", the digits of
            SVHN's scenes; or "cifar10".
        split: "train" or "test".
        items: the first so many scenes of house numbers, or pictures of CIFAR-10; all of them when None.
        seed: of the house numbers.
        root: the folder that holds SVHN or CIFAR-10, as `python -m lipguide data svhn` and torchvision leave it; None
            for `lipguide.data.folder_of(data)`.

    >>> pictures("house-numbers", "test", items=2).images.shape[1:]
    torch.Size([3, 32, 32])
    """
    known = dict.fromkeys((*DATA, *TWINS))
    if data not in known or split not in ("train", "test"):
        raise ValueError(f"no data {data!r}, {split!r}; there are {', '.join(known)}, each with train and test")
    if data in TWINS:
        return digits(SyntheticHouseNumbers(split, items, seed, version=TWINS[data]))
    return digits(first(real(data, split, root), items))

"""Data sets that are not made here but lie in a folder: where they are looked for, and how they are opened."""

from __future__ import annotations

import operator
from collections.abc import Sized
from pathlib import Path

from torch.utils.data import Dataset, Subset

from lipguide.data.svhn import SVHN

__all__ = ["REAL", "first", "folder_of", "real"]

REAL = ("svhn", "cifar10")


def folder_of(name: str) -> Path:
    """Where a data set is looked for: data/NAME, seen from the checkout or from one of its folders.

    >>> folder_of("svhn").parts[-2:]
    ('data', 'svhn')
    """
    places = Path("data", name), Path("../data", name)
    return next((place for place in places if place.is_dir()), places[0])


def real(name: str, split: str = "train", root: str | Path | None = None) -> Dataset:
    """A real data set, which `digits` takes, and `scenes` too if it is SVHN.

    Args:
        name: "svhn" for the scenes of SVHN, or "cifar10".
        split: "train" or "test".
        root: the folder that holds it, as `python -m lipguide data svhn` and torchvision leave it; None for
            `folder_of(name)`.

    >>> real("svhn", "test", root="nowhere")
    Traceback (most recent call last):
    FileNotFoundError: nowhere/test is missing: get SVHN with `python -m lipguide data svhn --root nowhere`
    """
    if name not in REAL or split not in ("train", "test"):
        raise ValueError(f"no data {name!r}, {split!r}; there are {', '.join(REAL)}, each with train and test")
    root = folder_of(name) if root is None else Path(root)
    return SVHN(root, split) if name == "svhn" else _cifar10(root, split)


def _cifar10(root: Path, split: str) -> Dataset:
    from torchvision.datasets import CIFAR10  # here, for it takes longer to import than all the rest

    try:
        return CIFAR10(root, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"CIFAR-10 is missing or damaged in {root}: get it with torchvision.datasets.CIFAR10({str(root)!r}, "
            "download=True)"
        ) from error


def first(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` items of a data set; all of them if None. More than there are is an error.

    >>> len(first([3, 5, 8], 2)), len(first([3, 5, 8], None))
    (2, 3)
    """
    if count is None:
        return dataset
    if not isinstance(dataset, Sized) or not 0 <= operator.index(count) <= len(dataset):
        has = len(dataset) if isinstance(dataset, Sized) else "an unknown number of"
        raise ValueError(f"the first {count} items are asked for, and the data set has {has}")
    return Subset(dataset, range(count))

"""Batches of columns that lie on the device: which samples make a batch follows from the seed and the step alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_indices", "mixed", "on_device", "samples_in", "taken"]


def samples_in(data: Sequence[Any]) -> int:
    """How many samples the columns hold; columns that do not fit together are an error.

    >>> samples_in((torch.zeros(3, 2), ["a", "b", "c"]))
    3
    """
    if isinstance(data, Tensor) or not isinstance(data, Sequence):
        raise ValueError(
            f"data must be a tuple of columns, such as (images, labels), not {type(data).__name__}: write (images,) "
            "for a single one"
        )
    for column in data:
        if not hasattr(column, "__len__") or (isinstance(column, Tensor) and column.ndim == 0):
            raise ValueError(f"a column of data must be a tensor or a list with one item a sample, not {column!r}")
    lengths = {len(column) for column in data}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the columns of data must be of one length, and not empty; they have {sorted(lengths)} samples"
        )
    return lengths.pop()


def on_device(column: Any, device: torch.device) -> Any:
    """A tensor, or the tensors in a list, on the device.

    >>> on_device([torch.zeros(1), "a"], torch.device("cpu"))
    [tensor([0.]), 'a']
    """
    if isinstance(column, Tensor):
        return column.to(device)
    return [part.to(device) if isinstance(part, Tensor) else part for part in column]


def taken(column: Tensor | list[Any], indices: Tensor) -> Tensor | list[Any]:
    """The samples with these indices.

    >>> taken(["a", "b", "c"], torch.tensor([2, 0]))
    ['c', 'a']
    """
    if not isinstance(column, Tensor):
        return [column[index] for index in indices.tolist()]
    if column.is_cuda and not indices.is_cuda:  # from pinned memory the copy waits for nothing
        indices = indices.pin_memory().to(column.device, non_blocking=True)
    return column[indices]


def mixed(*numbers: int) -> int:
    """One seed out of several. torch's generator on the CPU reads only 32 bits of it, so all of them have to count.

    >>> mixed(0, 1) != mixed(1, 0)
    True
    """
    return zlib.crc32(repr(numbers).encode())


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(mixed(seed, epoch)), device="cpu")


def batch_indices(step: int, batch_size: int, samples: int, seed: int) -> Tensor:
    """Entries [step * batch_size, (step + 1) * batch_size) of all the epochs' permutations, one after the other.

    >>> sorted(torch.cat([batch_indices(step, 2, 4, seed=0) for step in range(2)]).tolist())
    [0, 1, 2, 3]
    """
    start = step * batch_size
    stop = start + batch_size
    epochs = range(start // samples, (stop - 1) // samples + 1)
    indices = torch.cat([_permutation(samples, seed, epoch) for epoch in epochs])
    return indices[start - epochs[0] * samples :][:batch_size]

"""What a step costs: seconds of several candidates, measured in turn, and the peak of memory.

A busy machine can only slow things down, and does so in bursts. Candidates that take turns in every round meet the same
bursts, and the lower quartile of the rounds is a time that most of them did not touch: ratios of such times are worth
more than the times themselves.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Cost", "compare", "peak_memory"]


class Cost(NamedTuple):
    """The cost of one candidate beside the others."""

    seconds: float
    """The lower quartile over the rounds."""
    ratio: float
    """To the seconds of the first candidate."""
    mebibytes: float
    """The largest total of tensors that were alive at once during a step, beyond those that were before."""


def compare(candidates: dict[str, Callable[[], Any]], rounds: int = 11) -> dict[str, Cost]:
    """The cost of each candidate, run in turn, beginning with another one in each round.

    Args:
        candidates: functions without arguments by name; the first one is what the others are compared with.
        rounds: how often each is run, after three to warm up.

    >>> costs = compare({"a vector": lambda: torch.zeros(10), "a matrix": lambda: torch.zeros(10, 1000)})
    >>> costs["a vector"].ratio, round(costs["a matrix"].mebibytes, 4)
    (1.0, 0.0381)
    """
    names, seconds = list(candidates), {name: [] for name in candidates}
    memory = {name: peak_memory(step) for name, step in candidates.items()}
    for number in range(rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_seconds(candidates[name]))
    quartile = {name: statistics.quantiles(times[1:] * 2, n=4)[0] for name, times in seconds.items()}
    first = quartile[names[0]]
    return {name: Cost(quartile[name], quartile[name] / first, memory[name] / 2**20) for name in names}


def _seconds(step: Callable[[], Any]) -> float:
    _wait()
    began = time.perf_counter()
    step()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], Any]) -> int:
    """Bytes of tensors that a step adds at its peak. What an operation uses inside itself is seen on CUDA only.

    >>> peak_memory(lambda: torch.zeros(1000) + 1)
    8000
    """
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Watch() as watch:
        step()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations return until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in known | self.alive.keys():
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.total)
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: weakref.ref) -> None:
            del self.alive[key]
            self.total -= size

        self.alive[key] = weakref.ref(storage, freed)
        self.total += size

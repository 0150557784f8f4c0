"""A CUDA graph on a CPU: the operations of a function, repeated on the memory that they first ran on.

What a real graph would not do, this one does not either: Python code runs once, so a number that it took from the host
stays what it was, and a tensor that it bound to a name later is not the one that the operations write to. What a real
one refuses, a number read back or a tensor whose size depends on values, is an error here.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Graph", "recording"]

REFUSED = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount", "_linalg_check_errors"}


class Graph(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` is on a GPU. There nothing runs while it is recorded; here it does, so the first call
    that repeats it has been made already."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in REFUSED:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _fresh(result, (args, kwargs))))
        return result

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        with torch.no_grad():
            for func, args, kwargs, written in self.calls:
                again = _fresh(func(*args, **kwargs), (args, kwargs))
                for own, new in zip(written, again, strict=True):
                    own.copy_(new)


def _fresh(result: Any, given: Any) -> list[Tensor]:
    """The tensors of a result that lie in memory of their own: no views, and nothing changed in place."""
    known = {part.untyped_storage()._cdata for part in tree_leaves(given) if isinstance(part, Tensor)}
    made = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
    return [part.detach() for part in made if part.untyped_storage()._cdata not in known]


class _Stream(types.SimpleNamespace):
    def wait_stream(self, other: Any) -> None:
        pass


@contextmanager
def recording() -> Iterator[list[Graph]]:
    """Within it steps are recorded on the CPU; the graphs that were made."""
    graphs: list[Graph] = []

    def made() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    cuda = {
        "CUDAGraph": made,
        "graph": lambda graph: graph,
        "Stream": lambda device: _Stream(),
        "current_stream": lambda device: _Stream(),
        "stream": lambda stream: nullcontext(),
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch("lipguide.training.can_record", lambda device: True),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        # On a CPU these two look at labels in each call, on CUDA they do not.
        mock.patch("lipguide.losses.base._expect", lambda ok, message: None),
        mock.patch.object(F, "one_hot", lambda index, number: (index[..., None] == torch.arange(number)).long()),
    ):
        yield graphs

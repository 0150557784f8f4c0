"""A training step that a GPU records once and then repeats by itself.

A step of many small kernels takes as long as the CPU needs to start them, one by one. A CUDA graph starts them all in
one call. What it repeats is what was recorded: the same kernels on the same memory. So a step may be recorded if it
asks the device for no number and takes none from the host that changes from step to step, but for its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipguide.finite import Guard

__all__ = ["Recorded", "can_record", "make_recordable", "set_rates"]

WARM_UP = 3  # calls before the recording, in which libraries choose their kernels and optimizers make their state


def can_record(device: torch.device) -> bool:
    """Whether steps on a device can be recorded.

    >>> can_record(torch.device("cpu"))
    False
    """
    return device.type == "cuda"


class Recorded:
    """A function of tensors on CUDA, recorded at one of its first calls and repeated by all later ones.

    Random numbers are drawn anew at each call, from the seed that is set then. What it returns is overwritten by the
    next call.

    Args:
        function: called as it is three times, and once to be recorded; the tensors that it is given are its own copies.
        device: that it computes on.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._device = function, device
        self._calls = 0
        self._given: tuple[Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        if not self._calls:
            self._given = tuple(tensor.to(self._device) for tensor in tensors)
        else:
            for own, tensor in zip(self._given, tensors, strict=True):
                own.copy_(tensor if tensor.is_cuda else tensor.pin_memory(), non_blocking=True)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._beside()
        if self._graph is None:
            self._record()
        self._graph.replay()
        return self._result

    def _beside(self) -> Any:
        """A call on a stream of its own, as whoever records later has to."""
        stream, here = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = self._function(*self._given)
        here.wait_stream(stream)
        return result

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self._function(*self._given)
        except RuntimeError as error:
            raise RuntimeError(
                f"this step cannot be recorded ({str(error).splitlines()[0]}): it asks the device for a number, or "
                "needs memory of the host; train it with recorded=False"
            ) from error
        self._graph = graph


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """The learning rates of a step; where a step is recorded, in the memory from which it reads them."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_recordable(optimizer: torch.optim.Optimizer, guard: Guard, data: Sequence[Any]) -> None:
    """Let the optimizer read its rates from the device; ValueError for what no recording can repeat."""
    if guard.reads or not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(
            "a step is recorded only with one of torch's fused optimizers, capturable=True, without float16 and "
            "without after_step: take lipguide.training.adam, or recorded=False"
        )
    if not all(isinstance(column, Tensor) for column in data):
        raise ValueError("a step is recorded only if all columns of data are tensors: pass recorded=False")
    for group in optimizer.param_groups:
        rates = torch.as_tensor(group["lr"], dtype=torch.float32)
        group["lr"] = rates.to(next(iter(group["params"])).device, copy=True)

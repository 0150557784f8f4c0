"""Several processes that train one network: who they are, and what they tell each other.

Under `DistributedDataParallel` the gradients are *averaged* over the processes (ranks). A mean over the whole batch,
split unevenly, is therefore computed as ranks · (sum over this rank's entries) / (entries on all ranks): the average of
that over the ranks is the mean over the whole batch, and so is its gradient.

Ranks talk about a batch only where a gradient will flow, so that one rank may evaluate alone under `torch.no_grad()`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "DEVICES",
    "choose_device",
    "finish",
    "first_rank_first",
    "gathered",
    "mean_over_ranks",
    "number_of_ranks",
    "rank_and_ranks",
    "share_buffers",
    "start",
    "sum_over_ranks",
]

DEVICES = ("auto", "cpu", "cuda")


def choose_device(device: str = "auto") -> torch.device:
    """The device of a name: "cpu", "cuda", or "auto" for CUDA where torch sees it.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; valid: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available: torch sees no CUDA device; valid here: auto, cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def start(device: str = "auto") -> torch.device:
    """The device of this process; under `torchrun`, joins the other processes first.

    Args:
        device: "auto", "cpu" or "cuda". Without `torchrun` nothing but the choice happens.

    >>> start("cpu")
    device(type='cpu')
    """
    chosen = choose_device(device)
    if "LOCAL_RANK" not in os.environ:
        return chosen
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def finish() -> None:
    """Leave the other processes, if there are any.

    >>> finish()
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_ranks() -> tuple[int, int]:
    """Which of how many processes this one is; the first of one without `torchrun`.

    >>> rank_and_ranks()
    (0, 1)
    """
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gathered(own: Any) -> list[Any]:
    """What each process has, in the order of the ranks. Every process must ask.

    >>> gathered("mine")
    ['mine']
    """
    _, ranks = rank_and_ranks()
    shares = [own] * ranks
    if ranks > 1:
        dist.all_gather_object(shares, own)
    return shares


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first process runs the block alone, then all others: they find what it has put into a cache.

    >>> with first_rank_first():
    ...     print("loading")
    loading
    """
    rank, ranks = rank_and_ranks()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and ranks > 1:
        dist.barrier()


def number_of_ranks(logits: Tensor) -> int:
    """How many processes share the batch that `logits` is a part of: one, where no gradient will flow.

    >>> number_of_ranks(torch.zeros(2, 3))
    1
    """
    return rank_and_ranks()[1] if logits.requires_grad else 1


def sum_over_ranks(counts: Tensor, logits: Tensor) -> Tensor:
    """`counts` of this rank's part of a batch, added up over the ranks that share it.

    >>> sum_over_ranks(torch.tensor(4), torch.zeros(2, 3))
    tensor(4)
    """
    if number_of_ranks(logits) > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def mean_over_ranks(total: Tensor, count: Tensor, logits: Tensor) -> Tensor:
    """What the ranks' average of is the mean over the whole batch. The mean over no entry is 0.

    Args:
        total, count: the sum of this rank's entries, and how many they are.
        logits: what they were computed from; see `number_of_ranks`.

    >>> mean_over_ranks(torch.tensor(6.0), torch.tensor(4), torch.zeros(2, 3))
    tensor(1.5000)
    """
    entries = sum_over_ranks(count, logits)
    return total * number_of_ranks(logits) / entries.clamp(min=1)


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as the running statistics of batch norm.

    >>> share_buffers(nn.BatchNorm2d(3))
    """
    if rank_and_ranks()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

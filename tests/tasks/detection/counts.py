"""How many operators a piece of code calls, and how often it waits for a device: counted on a CPU, alike everywhere."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# These end in a number or a shape that the host has to know before it goes on. So does an index that is a mask.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal"}
VIEWS = {"detach", "view", "t", "transpose", "permute", "expand", "slice", "select", "as_strided", "unsqueeze"}
VIEWS |= {"squeeze", "split", "split_with_sizes", "alias", "empty", "empty_strided", "empty_like", "new_empty"}


class Counts(NamedTuple):
    """operators: those that compute something; synchronisations: how often the host waits."""

    operators: int
    synchronisations: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.synchronisations = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.split("::")[1].rstrip("_")
        masks = name in ("index", "index_put") and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        self.operators += name not in VIEWS
        self.synchronisations += name in WAITS or masks
        return function(*arguments, **(options or {}))


def counts(call: Callable[[], Any]) -> Counts:
    """What one call costs, once the first one has filled whatever caches there are."""
    call()
    with _Counting() as counting:
        call()
    return Counts(counting.operators, counting.synchronisations)

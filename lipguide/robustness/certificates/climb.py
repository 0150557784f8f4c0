"""The search for multipliers: the highest of many concave functions at once, each with variables of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["highest"]

MOMENTUM = 0.9


def highest(
    function: Callable[..., Sequence[Tensor]],
    start: Sequence[Tensor],
    rates: Sequence[float],
    steps: int,
    memory: float,
) -> list[Tensor]:
    """Where M functions are highest of all that Adam meets, each row by itself.

    Args:
        function: of variables (M, ...), gives the values (M,) and the slopes in each variable.
        start: the variables.
        rates: of each.
        steps: so many.
        memory: Adam's β₂.

    >>> peak = torch.tensor([[1.0], [3.0]])
    >>> hill = lambda x: (-(x - peak).square().sum(1), -2 * (x - peak))
    >>> highest(hill, [torch.zeros(2, 1)], [0.2], 200, 0.99)[0].round()
    tensor([[1.],
            [3.]])
    """
    variables = [variable.clone() for variable in start]
    moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in variables]
    best, most = [v.clone() for v in variables], start[0].new_full((len(start[0]),), -math.inf)
    for step in range(1, steps + 1):
        value, *slopes = function(*variables)
        most, best = _better(value, variables, most, best)
        for v, slope, rate, (mean, square) in zip(variables, slopes, rates, moments, strict=True):
            mean.lerp_(slope, 1 - MOMENTUM)
            square.lerp_(slope.square(), 1 - memory)
            spread = (square / (1 - memory**step)).sqrt() + 1e-12
            v += rate * mean / (1 - MOMENTUM**step) / spread
    return best


def _better(
    value: Tensor, variables: Sequence[Tensor], most: Tensor, best: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The larger of a new value (M,) and the largest so far, row by row, and where it was."""
    higher = value > most
    best = [torch.where(_beside(higher, new), new, old) for new, old in zip(variables, best, strict=True)]
    return torch.where(higher, value, most), best


def _beside(rows: Tensor, values: Tensor) -> Tensor:
    """Rows (M,), so that they go with values (M, ...)."""
    return rows.reshape(-1, *[1] * (values.ndim - 1))

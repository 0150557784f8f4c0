"""Tinier SSD, 1-Lipschitz throughout, seven times: as the case study has it, one change at a time, and all at once.

============== ====================================================================================
network        what differs from *spectral-norm*, the case study's
============== ====================================================================================
spectral-norm  nothing
sll            SLL inside, at one width, between a spectral entry and spectral heads
orthogonal     every layer keeps the length of what it can, heads included
pooling        the L2 norm of a window, which keeps the gradient's norm, in place of its maximum
unit-rows      heads whose filters have norm 1 one by one, in place of a head of norm 1 as a whole
temperature    scores and loss multiply a logit by τ, and the loss asks for a margin
together       orthogonal inside, L2 norms, heads of unit filters, temperature and margin
============== ====================================================================================

The activation is not among the changes: *spectral-norm* has GroupSort2, which keeps the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import orthogonal, spectral, unit_rows
from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.layers.sll import SLL
from lipguide.tasks.detection.tinier_ssd import STAGES, Parts, TinierSSD

__all__ = ["CHANGES", "unlearnt"]

# What a layer, a head and a pooling are, and whether a temperature is in the loss.
CHANGES: dict[str, tuple[str, str, str, bool]] = {
    "spectral-norm": ("spectral", "spectral", "max", False),
    "sll": ("sll", "spectral", "max", False),
    "orthogonal": ("orthogonal", "orthogonal", "max", False),
    "pooling": ("spectral", "spectral", "l2", False),
    "unit-rows": ("spectral", "unit rows", "max", False),
    "temperature": ("spectral", "spectral", "max", True),
    "together": ("orthogonal", "unit rows", "l2", True),
}
CONSTRAINTS = {"spectral": spectral, "orthogonal": orthogonal, "unit rows": unit_rows}
POOLS = {"max": nn.MaxPool2d, "l2": ScaledL2NormPool2d}


def unlearnt(change: str, tau: float = 1.0, offset: float = 0.0, width: int = 32) -> TinierSSD:
    """The network of one change, untrained.

    Args:
        change: one of `CHANGES`.
        tau, offset: temperature and margin, of the networks that have them.
        width: of the SLL layers, which cannot change it.

    >>> unlearnt("together", tau=20.0).tau, unlearnt("orthogonal", tau=20.0).tau
    (20.0, 1.0)
    """
    if change not in CHANGES:
        raise ValueError(f"no change {change!r}; there are: {', '.join(CHANGES)}")
    inside, heads, pool, tempered = CHANGES[change]
    head = _convolution(CONSTRAINTS[heads])
    if inside == "sll":
        entry, inner = _convolution(spectral), _sll
        stages = tuple(tuple(item if isinstance(item, str) else width for item in stage) for stage in STAGES)
    else:
        entry = inner = _sorted(CONSTRAINTS[inside])
        stages = STAGES
    # Windows of 2×2 do not overlap, and give the maps that those of 3×3 would.
    parts = Parts(entry, inner, head, head, lambda _: POOLS[pool](2))
    return TinierSSD(parts, stages, tau=tau, offset=offset) if tempered else TinierSSD(parts, stages)


def _convolution(constraint: Callable[[nn.Module], nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: constraint(nn.Conv2d(inputs, outputs, 3, padding=1))


def _sorted(constraint: Callable[[nn.Module], nn.Module]) -> Callable[[int, int], nn.Module]:
    make = _convolution(constraint)
    return lambda inputs, outputs: nn.Sequential(make(inputs, outputs), GroupSort2())


def _sll(inputs: int, outputs: int) -> nn.Module:
    return SLL(inputs, outputs, 3)

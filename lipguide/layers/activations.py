"""Activations that keep the norm of the gradient: they sort or reflect channels instead of cutting them off.

Wherever it is differentiable, each of them is an orthogonal map, so a gradient keeps its norm on the way back. The one
exception is `MaxMinDouble`, an isometry into twice as many channels: it keeps the norm of the signal but not that of a
gradient. ReLU, sigmoid and tanh are 1-Lipschitz too, but they only ever shrink it (Anil, Lucas and Grosse, 2019).

Channels are dimension 1, as everywhere in torch: inputs are (N, C) or (N, C, ...).
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipguide.arguments import whole
from lipguide.checks import HALF
from lipguide.layers.brick import Brick, Through

__all__ = ["FullSort", "GroupSort", "GroupSort2", "Householder", "MaxMin", "MaxMinDouble"]


def _check_channels(module: nn.Module, x: Tensor, multiple: int) -> None:
    if x.dim() < 2:
        raise ValueError(
            f"{type(module).__name__} sorts dimension 1, the channels, but the input has shape {tuple(x.shape)}; "
            "give it (N, C) or (N, C, ...)"
        )
    if x.shape[1] % multiple:
        raise ValueError(
            f"{type(module).__name__} takes channels by {multiple}, but the input has {x.shape[1]} of them "
            f"(shape {tuple(x.shape)}); {multiple * math.ceil(x.shape[1] / multiple)} would do"
        )


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their bytes
BRANCHES = {"cpu"}  # devices whose torch.where takes a branch for each number


def _swapped(swap: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(b, a) where `swap` holds and (a, b) elsewhere, to the last bit.

    Of a branch for each number a CPU foresees half wrongly: exchanging bits is five to ten times as fast.

    >>> _swapped(torch.tensor([True, False]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    (tensor([3., 2.]), tensor([1., 4.]))
    """
    if a.device.type in BRANCHES:
        with suppress(RuntimeError):  # batches of gradients, as torch.autograd has them, know no view of their bits
            first, second = (part.view(BITS[part.element_size()]) for part in (a, b))
            change = (first ^ second) & swap.to(first.dtype).neg()  # −1 is all ones
            return (first ^ change).view(a.dtype), (second ^ change).view(b.dtype)
    return torch.where(swap, b, a), torch.where(swap, a, b)


class _Swap(torch.autograd.Function):
    """`_swapped`, which is its own inverse and its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(swap: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _swapped(swap, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *_Swap.apply(*ctx.saved_tensors, a, b)

    @staticmethod
    def jvp(ctx: Any, _: None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _Swap.apply(*ctx.saved_tensors, a, b)


class _SortPair(torch.autograd.Function):
    """(min, max) that remembers one bit a pair."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.minimum(a, b), torch.maximum(a, b), a > b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        swap = output[2]
        ctx.mark_non_differentiable(swap)
        ctx.save_for_backward(swap)
        ctx.save_for_forward(swap)

    @staticmethod
    def backward(ctx: Any, low: Tensor, high: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return _Swap.apply(*ctx.saved_tensors, low, high)

    @staticmethod
    def jvp(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_Swap.apply(*ctx.saved_tensors, a, b), None


def _sort_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(min, max), as a permutation for the gradient even where a = b.

    There torch.maximum shares the gradient out in halves, which shrinks it, and keeps twin channels twins for ever:
    two channels of zeros, say, over a black background.
    """
    if not (torch.is_grad_enabled() and a.requires_grad):
        return torch.minimum(a, b), torch.maximum(a, b)
    if torch.compiler.is_compiling():  # the compiler makes this one pass by itself, and takes no function with a jvp
        swap = a > b
        return torch.where(swap, b, a), torch.where(swap, a, b)
    return _SortPair.apply(a, b)[:2]


class GroupSort(Brick):
    """Sorts each group of neighbouring channels: y_g = sort(x_g), the smallest first.

    The values are permuted, never changed, so the Jacobian is a permutation matrix. The guide sorts downwards; the two
    differ by a fixed order of the channels, which the next affine layer absorbs, and upwards is what torchlip does.

    Args:
        group_size: how many neighbouring channels make a group, 2 or more; the channels must be a multiple of it.

    >>> GroupSort(4)(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    tensor([[1., 2., 3., 4.]])
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = whole("group_size", group_size, "sorting needs groups of 2 channels or more", least=2)

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(self, x, self.group_size)
        groups = x.unflatten(1, (-1, self.group_size))
        if self.group_size == 2:  # a comparison is faster than a general sort
            return torch.stack(_sort_pair(*groups.unbind(2)), 2).flatten(1, 2)
        return groups.sort(2).values.flatten(1, 2)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainGroupSort(self.group_size)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


class _PlainGroupSort(nn.Module):
    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, self.group_size))
        if self.group_size > 2:
            return groups.sort(2).values.flatten(1, 2)
        a, b = groups.unbind(2)
        return torch.stack((torch.minimum(a, b), torch.maximum(a, b)), 2).flatten(1, 2)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class GroupSort2(GroupSort):
    """`GroupSort` with groups of two, the guide's first choice: (x₁, x₂) becomes (min, max).

    >>> GroupSort2()(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    tensor([[3., 4., 1., 2.]])
    """

    def __init__(self) -> None:
        super().__init__(2)


class MaxMin(Brick):
    """y = (max(a, b), min(a, b)) with a and b the two halves of the channels; the shape is kept.

    `GroupSort2` with another choice of pairs: channel i with channel i + C/2, which lie contiguous in memory.

    >>> MaxMin()(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    tensor([[3., 2., 1., 0.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(self, x, 2)
        low, high = _sort_pair(*x.chunk(2, 1))
        return torch.cat((high, low), 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainMaxMin()


class _PlainMaxMin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unflatten(1, (2, -1)).unbind(1)  # fails on an odd number of channels
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class MaxMinDouble(Brick):
    """y = (relu(x), relu(−x)): the guide's MaxMin, also called CReLU; it doubles the channels.

    One of the two copies of a channel has slope ±1 and the other slope 0, so the map is an isometry. But a layer that
    brings the 2C channels back to C cannot be one: stacked like that, it loses gradients as fast as ReLU does.

    >>> MaxMinDouble()(torch.tensor([[1.0, -2.0]]))
    tensor([[1., 0., 0., 2.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(self, x, 1)
        positive = F.relu(x)
        # relu(−x) = relu(x) − x, exactly; written so, an x of zero has slopes 0 and −1 instead of twice 0.
        return torch.cat((positive, positive - x), 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainMaxMinDouble()


class _PlainMaxMinDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.relu(x), F.relu(-x)), 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class FullSort(Brick):
    """Sorts all the channels, the smallest first: `GroupSort` with a single group.

    >>> FullSort()(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[1., 2., 3.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(self, x, 1)
        return x.sort(1).values

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainFullSort()


class _PlainFullSort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class Householder(Brick):
    """y = z − 2 relu(vᵀz) v on each pair z of channels: the half-plane vᵀz > 0 is reflected onto the other.

    v = (sin θ/2, −cos θ/2) with an angle θ learned for each pair; channel i pairs with channel i + C/2. At θ = π/2,
    where it starts, the pair becomes (min, max). It is the smallest SLL block: `lip.SLL` with orthonormal filters.

    Args:
        channels: an even number C; there are C/2 angles.

    >>> Householder(2)(torch.tensor([[3.0, 1.0]])).round(decimals=4)
    tensor([[1., 3.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = whole("channels", channels, "Householder reflects pairs of channels", least=2)
        if self.channels % 2:
            raise ValueError(f"channels is {channels}: Householder needs an even number, it reflects pairs")
        self.theta = nn.Parameter(torch.full((self.channels // 2,), math.pi / 2))

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(self, x, 2)
        if x.shape[1] != self.channels:
            raise ValueError(f"Householder({self.channels}) got {x.shape[1]} channels: shape {tuple(x.shape)}")
        z1, z2 = x.chunk(2, 1)
        v = self._directions(x.dtype)
        v1, v2 = v.view(2, self.channels // 2, *[1] * (x.dim() - 2))
        beyond = 2 * F.relu(v1 * z1 + v2 * z2)
        return torch.cat((z1 - beyond * v1, z2 - beyond * v2), 1)

    def _directions(self, dtype: torch.dtype) -> Tensor:
        """The first entries of all v, then the second ones; in half precision computed in float32 and then rounded."""
        half_angle = self.theta.to(torch.promote_types(self.theta.dtype, torch.float32)) / 2
        return torch.cat((half_angle.sin(), -half_angle.cos())).to(dtype)

    def lipschitz(self, constant: float, through: Through) -> float:
        # In half precision a rounded v may be longer than one, and the reflection stretches.
        if self.theta.dtype in HALF:
            return constant * _stretch_of_reflections(self._directions(self.theta.dtype))
        return constant

    def plain(self) -> nn.Module:
        return _PlainHouseholder(self._directions(self.theta.dtype).detach())

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def _stretch_of_reflections(v: Tensor) -> float:
    """max(1, 2|v|² − 1) over the pairs, of which the first half of v holds the first entries."""
    if v.dim() != 1 or len(v) % 2:
        raise ValueError(f"directions of shape {tuple(v.shape)} are not one vector of two numbers for each pair")
    squares = v.detach().double().square().reshape(2, -1).sum(0)
    return max(1.0, float(2 * squares.max() - 1))


class _PlainHouseholder(nn.Module):
    """y = z − 2 relu(vᵀz) v with the vectors v themselves, as (all their first entries, all their second ones)."""

    v: Tensor

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("v", v)

    def forward(self, x: Tensor) -> Tensor:
        # A product would repeat values where there are more or fewer channels: `unflatten` fails there, with the shape
        # of the trace, and `expand_as` with that of now.
        z = x.movedim(1, -1).unflatten(-1, self.v.shape)
        v = self.v.expand_as(z)
        z1, z2 = (z * v).chunk(2, -1)
        beyond = 2 * F.relu(z1 + z2)
        return (z - torch.cat((beyond, beyond), -1) * v).movedim(-1, 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant * _stretch_of_reflections(self.v)

"""Constrained weights of one kind in one call: on a GPU, many small kernels cost more than few large ones.

A step of the case study's detectors with eleven SLL blocks of one shape calls a third of the operators then. Where the
shapes differ, zeros fill them up, if the constraint does not mind and the device computes faster than it is told to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from lipguide.layers.constraints import Constraint
from lipguide.layers.export import remembered

__all__ = ["together"]

EXTENDS = {"cuda"}  # devices on which a hundred small kernels cost more than multiplying zeros
MOST = 2**23  # numbers of a stack, zeros included: beyond, they do cost more
Held = parametrize.ParametrizationList
Named = dict[str, Tensor]


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Within it, each constrained weight of a model in training mode is computed once, and those alike in one call.

    It is for one forward: within it, as within `torch.nn.utils.parametrize.cached()`, weights do not follow what
    becomes of the parameters.

    >>> from lipguide.layers.sll import SLLLinear
    >>> model = nn.Sequential(SLLLinear(4, 4), SLLLinear(4, 4))
    >>> with together(model):
    ...     y = model(torch.randn(2, 4))
    >>> y.shape
    torch.Size([2, 4])
    """
    with remembered(model):
        for alike in _groups(model):
            weights = _in_one_call([layer.parametrizations.weight for layer in alike])
            for layer, weight in zip(alike, weights, strict=True):
                parametrize._cache[id(layer), "weight"] = weight  # where torch itself looks for it
        yield


def _groups(model: nn.Module) -> list[list[nn.Module]]:
    """Layers whose weights can be computed in one call, two or more at a time."""
    layers = [layer for layer in model.modules() if _can_join(layer)]
    groups = []
    for alike in _grouped(layers, _kind):
        groups += [alike] if _extended(alike) <= MOST else _grouped(alike, _shape)
    return [alike for alike in groups if len(alike) > 1]


def _can_join(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    return all(
        isinstance(part, Constraint) and part.batches and part.training for part in layer.parametrizations.weight
    )


def _grouped(layers: list[nn.Module], key: Callable[[Held], Hashable]) -> list[list[nn.Module]]:
    groups: defaultdict[Hashable, list[nn.Module]] = defaultdict(list)
    for layer in layers:
        groups[key(layer.parametrizations.weight)].append(layer)
    return list(groups.values())


def _shape(held: Held) -> torch.Size:
    """That of the first parameter; the others follow from it."""
    return next(held.parameters()).shape


def _extended(alike: list[nn.Module]) -> int:
    """How many numbers a stack of the weights has."""
    shapes = [_shape(layer.parametrizations.weight) for layer in alike]
    return len(shapes) * math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _kind(held: Held) -> Hashable:
    """What two constrained weights must have in common."""
    free = _free_axes(held)
    tensors = []
    for name, x in (*held.named_parameters(), *held.named_buffers()):
        fixed = tuple(size for axis, size in enumerate(x.shape) if axis not in free.get(name, ()))
        tensors.append((name, x.dim(), fixed, x.dtype, x.device))
    settings = [(type(part), part.settings()) for part in held]
    return tuple(tensors), tuple(settings)


def _free_axes(held: Held) -> dict[str, tuple[int, ...]]:
    """Of parameters and buffers, the axes along which they may be extended by zeros."""
    if len(held) > 1 or next(held.parameters()).device.type not in EXTENDS:
        return {}
    axes = held[0].extendable()
    return {name if name == "original" else f"0.{name}": free for name, free in axes.items()}


def _in_one_call(alike: list[Held]) -> tuple[Tensor, ...]:
    """The weights; what the constraints keep in buffers is renewed, as by a call of each."""
    first = alike[0]
    parameters = _stacked([dict(held.named_parameters()) for held in alike])
    kept = [dict(held.named_buffers()) for held in alike]
    buffers = {name: stack.contiguous() for name, stack in _stacked(kept).items()}  # also of layers in channels_last

    def weight(parameters: Named, buffers: Named) -> Tensor:
        return functional_call(first, (parameters, buffers), ())

    weights = vmap(weight)(parameters, buffers)
    with torch.no_grad():
        for name, stack in buffers.items():
            own = [each[name] for each in kept]
            torch._foreach_copy_(own, _corners(stack, [one.shape for one in own]))
    if len(set(map(_shape, alike))) == 1:
        return weights.unbind()
    return _Apart.apply(weights, *(held.original for held in alike))


def _stacked(named: list[Named]) -> Named:
    return {name: _stack([each[name] for each in named]) for name in named[0]}


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if len({part.shape for part in parts}) == 1 else _InZeros.apply(*parts)


def _corners(stack: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The part of each tensor of a stack that has the shape of its own."""
    return [one[tuple(map(slice, shape))] for one, shape in zip(stack.unbind(), shapes, strict=True)]


class _InZeros(torch.autograd.Function):
    """Tensors of several shapes as one stack, zeros behind them."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.shapes = [part.shape for part in parts]
        most = [max(sizes) for sizes in zip(*ctx.shapes, strict=True)]
        stack = parts[0].new_zeros(len(parts), *most)
        torch._foreach_copy_(_corners(stack, ctx.shapes), parts)
        return stack

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(_corners(gradient, ctx.shapes))


class _Apart(torch.autograd.Function):
    """The other way: tensors of the shapes of the originals, which lie in memory as these do."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, *originals: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = stack.shape
        parts = [torch.empty_like(original) for original in originals]
        torch._foreach_copy_(parts, _corners(stack, [part.shape for part in parts]))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stack = gradients[0].new_zeros(ctx.shape)
        torch._foreach_copy_(_corners(stack, [gradient.shape for gradient in gradients]), gradients)
        return stack, *(None for _ in gradients)

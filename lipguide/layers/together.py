"""Constrained weights of one kind and shape in one call: on a GPU, many small kernels cost more than few large ones.

A step of the case study's detectors with eleven SLL blocks of one shape calls a third of the operators then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from lipguide.layers.constraints import Constraint
from lipguide.layers.export import own_weights

__all__ = ["together"]

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
    own_weights(model)
    with parametrize.cached():
        for alike in _groups(model):
            weights = _in_one_call([layer.parametrizations.weight for layer in alike])
            for layer, weight in zip(alike, weights, strict=True):
                parametrize._cache[id(layer), "weight"] = weight  # where torch itself looks for it
        yield


def _groups(model: nn.Module) -> list[list[nn.Module]]:
    """Layers whose weights can be computed in one call, two or more at a time."""
    groups: defaultdict[Hashable, list[nn.Module]] = defaultdict(list)
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            held = layer.parametrizations.weight
            if all(isinstance(part, Constraint) and part.batches and part.training for part in held):
                groups[_kind(held)].append(layer)
    return [alike for alike in groups.values() if len(alike) > 1]


def _kind(held: Held) -> Hashable:
    """What two constrained weights must have in common."""
    tensors = [(name, x.shape, x.dtype, x.device) for name, x in (*held.named_parameters(), *held.named_buffers())]
    settings = [(type(part), part.settings()) for part in held]
    return tuple(tensors), tuple(settings)


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
            torch._foreach_copy_([each[name] for each in kept], list(stack.unbind()))
    return weights.unbind()


def _stacked(named: list[Named]) -> Named:
    return {name: torch.stack([each[name] for each in named]) for name in named[0]}

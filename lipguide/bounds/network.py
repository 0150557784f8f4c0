"""The Lipschitz constant of a whole network, from above and from below.

*Above*: constants of layers multiply along a chain, add at a sum, and add in squares at a concatenation. The product
holds for every input, but is reached only if one input excites the worst direction of every layer at once.

*Below*: whatever two inputs really do is a lower bound. A search looks for the two that the network pulls apart most.
The truth lies between.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from lipguide.bounds.below import lipschitz_lower_bound
from lipguide.bounds.calls import NoBound
from lipguide.bounds.rules import known
from lipguide.bounds.walk import LayerBound, Unbounded, Walk, check_hooks, own_tensors, record
from lipguide.checks import check_eval
from lipguide.layers.export import fresh_weights

__all__ = ["Bound", "LayerBound", "Unbounded", "lipschitz_bound", "lipschitz_lower_bound"]


class Bound(NamedTuple):
    """An upper bound of the Lipschitz constant in the L2 norm; printed, it is a table with one row a layer."""

    value: float
    """For all outputs together, √(Σ L²) over the heads; for a single output its constant."""
    heads: dict[str, float]
    """The constant of each output by itself; empty where there is only one."""
    layers: list[LayerBound]
    input_shape: tuple[int, ...]
    """Of the inputs that it speaks of, without the batch: an average over a smaller picture has a larger constant."""

    def __str__(self) -> str:
        rows = [("layer", "kind", "output", "constant", "so far")]
        rows += [
            (r.name, r.kind, "×".join(map(str, r.shape)), f"{r.lipschitz:.4g}", f"{r.total:.4g}") for r in self.layers
        ]
        rows += [(f"head {name}", "", "", "", f"{value:.4g}") for name, value in self.heads.items()]
        rows.append(("network", "", "", "", f"{self.value:.4g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        aligned = [[cell.ljust(w) for cell, w in zip(row[:3], widths, strict=False)] for row in rows]
        numbers = [[cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)] for row in rows]
        return "\n".join("  ".join(a + n).rstrip() for a, n in zip(aligned, numbers, strict=True))


def lipschitz_bound(model: nn.Module, input_shape: tuple[int, ...]) -> Bound:
    """A sound upper bound of a network's Lipschitz constant in the L2 norm, in eval mode, with one row a layer.

    It knows torch's layers and activations with a bounded slope, lipguide's bricks, `nn.Sequential`, what `lip.export`
    made of them, and any module of your own whose forward `torch.fx` can trace through sums, concatenations, slices,
    reshapings and functions that are layers, such as `F.max_pool2d`. Several outputs (a tuple, a list or a dict) are
    several heads. Where a forward cannot be traced, give its class a method that is the forward with constants instead
    of tensors:

        def forward(self, x): ...
        def lipschitz(self, constant, through):
            return through(self.head, through(self.trunk, constant))

    A class speaks for a module only where no subclass has changed what the forward computes. Samples of a batch must
    stay apart, along dimension 0. Whatever is not known is an error that names it. The bound is about exact arithmetic
    with the weights at hand: the rounding of a forward pass comes on top of it (TF32 above all).

    {known}

    Args:
        model: a network in eval mode.
        input_shape: that of one input, without the batch. The bound is for inputs of this shape and for no others: an
            average over a smaller picture, for one, has a larger constant. `lip.certificates.checked_logits` notices
            pictures of another shape if it is given the `Bound` itself; a number does not remember what it was for.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()).eval()
    >>> _ = nn.init.eye_(model[1].weight)
    >>> bound = lipschitz_bound(model, (1, 2, 2))
    >>> round(bound.value, 4), [row.kind for row in bound.layers]
    (1.0, ['Flatten', 'Linear', 'ReLU'])
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    _check_shape(input_shape)
    _check(names)
    check_eval(model, "bounding it")
    # Constrained weights are computed anew, and once for all that looks at them.
    with torch.inference_mode(False), fresh_weights(model), parametrize.cached():
        walk = Walk(names, record(model, input_shape))
        outcome = walk(model, 1.0)
        walk.check(input_shape)
    heads = dict(_leaves(outcome, ""))
    value = math.sqrt(sum(constant**2 for constant in heads.values()))
    return Bound(value, heads if len(heads) > 1 else {}, walk.rows, tuple(input_shape))


if lipschitz_bound.__doc__:  # python -OO has none
    _lines = textwrap.fill(known(), 112, break_on_hyphens=False).replace("\n", "\n    ")
    lipschitz_bound.__doc__ = lipschitz_bound.__doc__.replace("{known}", _lines)


def _check_shape(input_shape: tuple[int, ...]) -> None:
    whole = isinstance(input_shape, tuple | list) and all(
        isinstance(side, int) and not isinstance(side, bool) for side in input_shape
    )
    if not whole:
        raise ValueError(
            f"input_shape is {input_shape!r}: give the sides of one input as a tuple of whole numbers, (3, 32, 32) for "
            "a picture and (4,) for a vector of four"
        )


def _check(names: dict[nn.Module, str]) -> None:
    """The model is one whose forward and whose numbers a bound can speak of."""
    try:
        check_hooks(chain(_global_forward_hooks.values(), _global_forward_pre_hooks.values()), "every module carries")
    except NoBound as error:
        raise Unbounded(str(error)) from error
    for module, name in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise Unbounded(
                f"{name} was compiled by torch.jit, which hides what it computes: bound the module that it was made of"
            )
        _check_numbers(module, name)


def _check_numbers(module: nn.Module, name: str) -> None:
    for tensor_name, tensor in own_tensors(module):
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(f"{tensor_name} of {name} has no values yet: call the model on a batch first")
        if tensor.is_meta:
            raise ValueError(f"{tensor_name} of {name} has no values: it is on the device meta; load the weights first")
        if tensor.is_complex():
            raise ValueError(f"{tensor_name} of {name} is complex, and only real layers are bounded")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(
                f"{tensor_name} of {name} holds NaN or infinite values: nothing can be certified; the training that "
                "made it has diverged"
            )


def _leaves(outcome: Any, name: str) -> Iterator[tuple[str, float]]:
    """The heads of an outcome by name; a position in a tuple is a name as well, and what is no tensor has none."""
    if hasattr(outcome, "_asdict"):
        outcome = outcome._asdict()
    if isinstance(outcome, dict | list | tuple):
        for key, value in outcome.items() if isinstance(outcome, dict) else enumerate(outcome):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif outcome is not None:
        yield name, outcome

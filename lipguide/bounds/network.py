"""The Lipschitz constant of a whole network, from above and from below.

*Above*: constants of layers multiply along a chain, add at a sum, and add in squares at a concatenation. The product
holds for every input, but is reached only if one input excites the worst direction of every layer at once.

*Below*: whatever two inputs really do is a lower bound. A search looks for the two that the network pulls apart most.
The truth lies between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from lipguide.bounds.below import lipschitz_lower_bound
from lipguide.bounds.forwards import only_shrinks, travel, versions
from lipguide.bounds.torch_layers import LAYERS, Call, NoBound
from lipguide.checks import check_eval
from lipguide.layers.brick import own_rule, voucher
from lipguide.layers.export import equation_of

__all__ = ["Bound", "LayerBound", "Unbounded", "lipschitz_bound", "lipschitz_lower_bound"]


class Unbounded(ValueError):
    """A network has a part whose constant is not known; the text names the part, says why, and what would do."""


class LayerBound(NamedTuple):
    """One row of a `Bound`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of the output, without the batch."""
    lipschitz: float
    """Of this layer by itself."""
    total: float
    """Of the network from its input up to and including this layer."""


class Bound(NamedTuple):
    """An upper bound of the Lipschitz constant in the L2 norm; printed, it is a table with one row a layer."""

    value: float
    """For all outputs together, √(Σ L²) over the heads; for a single output its constant."""
    heads: dict[str, float]
    """The constant of each output by itself; empty where there is only one."""
    layers: list[LayerBound]

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
    made of them, and any module of your own whose forward `torch.fx` can trace through sums, concatenations, slices and
    reshapings. Several outputs (a tuple, a list or a dict) are several heads. Where a forward cannot be traced, give
    its class a method that is the forward with constants instead of tensors:

        def forward(self, x): ...
        def lipschitz(self, constant, through):
            return through(self.head, through(self.trunk, constant))

    Whatever is not known is an error that names it. The bound is about exact arithmetic with the weights at hand: the
    rounding of a forward pass comes on top of it (TF32 above all).

    Args:
        model: a network in eval mode.
        input_shape: that of one input, without the batch; convolutions on small pictures are bounded for their size.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()).eval()
    >>> _ = nn.init.eye_(model[1].weight)
    >>> bound = lipschitz_bound(model, (1, 2, 2))
    >>> round(bound.value, 4), [row.kind for row in bound.layers]
    (1.0, ['Flatten', 'Linear', 'ReLU'])
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    check_eval(model, "bounding it")
    _check(names)
    with torch.inference_mode(False):
        walk = _Walk(names, *_record(model, input_shape))
        outcome = walk(model, 1.0)
        walk.check_complete()
    heads = dict(_leaves(outcome, ""))
    value = math.sqrt(sum(constant**2 for constant in heads.values()))
    return Bound(value, heads if len(heads) > 1 else {}, walk.rows)


def _check(names: dict[nn.Module, str]) -> None:
    for module, name in names.items():
        for tensor_name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if isinstance(tensor, UninitializedTensorMixin):
                raise ValueError(f"{tensor_name} of {name} has no values yet: call the model on a batch first")
            if tensor.is_complex():
                raise ValueError(f"{tensor_name} of {name} is complex, and only real layers are bounded")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{tensor_name} of {name} holds NaN or infinite values: nothing can be certified; the training "
                    "that made it has diverged"
                )


def _record(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[dict[nn.Module, set[Call]], set[nn.Module]]:
    """The shapes that each module meets in a forward pass of one input, and the modules that change their input."""
    calls: dict[nn.Module, set[Call]] = {}
    entered: list[list[int]] = []
    changing: set[nn.Module] = set()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(versions((args, kwargs)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if versions((args, kwargs)) != entered.pop():
            changing.add(module)
        if args and isinstance(args[0], Tensor):
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            calls.setdefault(module, set()).add(Call(tuple(args[0].shape), shape))

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    hooks += [module.register_forward_hook(leave, with_kwargs=True) for module in model.modules()]
    before = _state(model)
    try:
        with torch.no_grad():
            model(_probe((1, *input_shape), model))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model does not take an input of shape {(1, *input_shape)} ({error}); input_shape is that of one "
            "input, without the batch"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for name, (tensor, version) in _state(model).items():
        if name not in before or tensor is not before[name][0] or version != before[name][1]:
            raise Unbounded(f"{name} is changed by the forward pass itself, so it is no constant that a bound may use")
    return calls, changing


def _state(model: nn.Module) -> dict[str, tuple[Tensor, list[int]]]:
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: (tensor, versions(tensor)) for name, tensor in named}


def _probe(shape: tuple[int, ...], *modules: nn.Module) -> Tensor:
    """An input of the type and on the device of the first weight that there is."""
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)


def _leaves(outcome: Any, name: str) -> Iterator[tuple[str, float]]:
    """The heads of an outcome by name; a position in a tuple is a name as well."""
    if hasattr(outcome, "_asdict"):
        outcome = outcome._asdict()
    if isinstance(outcome, dict | list | tuple):
        for key, value in outcome.items() if isinstance(outcome, dict) else enumerate(outcome):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif outcome is not None:
        yield name, outcome


class _Walk:
    """Takes a constant through a module: `walk(module, L)` bounds x ↦ module(f(x)) for every f of constant L."""

    def __init__(
        self, names: dict[nn.Module, str], calls: dict[nn.Module, set[Call]], changing: set[nn.Module]
    ) -> None:
        self.names, self.calls, self.changing = names, calls, changing
        self.model = next(iter(names))
        self.rows: list[LayerBound] = []
        self.accounted: set[nn.Module] = set()

    def __call__(self, module: nn.Module, constant: float) -> Any:
        self.accounted.add(module)
        where = f"{self.names.get(module, 'a module')} ({type(module).__module__}.{type(module).__qualname__})"
        if not isinstance(constant, float | int):
            raise Unbounded(f"{where} gets several values at once, of which only single ones have a constant")
        if not self.calls.get(module):
            raise Unbounded(f"{where} was not called with one tensor in the forward pass, so its input is not known")
        try:
            _check_untouched(module)
            outcome = self._through(module, float(constant))
            if any(isinstance(part, float) and math.isnan(part) for part in tree_leaves(outcome)):
                raise NoBound("its constant is no number")
            return outcome
        except NoBound as error:
            raise Unbounded(f"{where} has no bound that is known here: {error}. {_advice(module)}") from error

    def _through(self, module: nn.Module, constant: float) -> Any:
        if rule := _rule_of(module):
            return self._by_its_own_rule(module, rule, constant)
        if kind := voucher(module, LAYERS.__contains__):
            return self._layer(module, LAYERS[kind], constant)
        if voucher(module, {nn.Sequential}.__contains__):
            for part in module:
                constant = self(part, constant)
            return constant
        return self._followed(module, constant)

    def _by_its_own_rule(self, module: nn.Module, rule: Callable[..., Any], constant: float) -> Any:
        handed: list[Any] = []

        def through(part: nn.Module, constant: float) -> Any:
            handed.append(self.kept(part, constant))
            return handed[-1]

        outcome = rule(constant, through)
        # What a part gave and the module hands on as it is stands in the part's row already.
        if isinstance(outcome, float) and not any(outcome is part for part in handed):
            self.row(module, constant, outcome)
        return outcome

    def _layer(self, module: nn.Module, rule: Callable[[nn.Module, Call], float], constant: float) -> float:
        for part in module.modules():
            _check_untouched(part)
        self.accounted.update(module.modules())
        own = [rule(module, call) for call in self.calls[module]]
        if not all(map(math.isfinite, own)):
            raise NoBound(f"its constant would be {max(own)}")
        return self.row(module, constant, constant * max(own))

    def _followed(self, module: nn.Module, constant: float) -> Any:
        inputs = [_probe(call.input, module, self.model) for call in self.calls[module]]
        outcomes = [travel(module, x, constant, self) for x in inputs]
        if len(outcomes) > 1 and not all(isinstance(outcome, float) for outcome in outcomes):
            raise NoBound("it has several outputs and is used on inputs of several shapes")
        return outcomes[0] if len(outcomes) == 1 else max(outcomes)

    def kept(self, module: nn.Module, constant: float) -> Any:
        """The same for a module whose input may be used again: it must not change it in place."""
        outcome = self(module, constant)
        if module in self.changing and not only_shrinks(module, constant, outcome):
            raise NoBound(
                f"{self.names[module]} changes its input in place, which may be used again after it; set inplace=False"
            )
        return outcome

    def row(self, module: nn.Module, before: float, after: float) -> float:
        shape = max(call.output for call in self.calls[module])
        kind = parametrize.type_before_parametrizations(module).__name__
        if parametrize.is_parametrized(module, "weight"):
            kind += f" ({', '.join(type(p).__name__ for p in module.parametrizations.weight)})"
        own = after / before if before else 0.0
        self.rows.append(LayerBound(self.names[module], kind, shape[1:], own, after))
        return after

    def check_complete(self) -> None:
        """A `lipschitz` method of somebody's own may have forgotten a part."""
        for module in self.calls:
            name = self.names[module]
            if module not in self.accounted and "parametrizations" not in name.split("."):
                raise Unbounded(
                    f"{name} ({type(module).__qualname__}) runs in the forward pass, but no lipschitz method took a "
                    "constant through it"
                )


def _check_untouched(module: nn.Module) -> None:
    """A layer whose forward somebody has changed is not the layer that its class says."""
    replaced = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if replaced:
        raise NoBound(f"its {replaced[0]} was replaced")
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        owner = getattr(hook, "__module__", "")
        if not owner.startswith(("lipguide.", "torch.nn.utils.")):
            raise NoBound(f"it carries a hook ({owner}.{getattr(hook, '__qualname__', hook)}) that may change values")


def _rule_of(module: nn.Module) -> Callable[..., Any] | None:
    """The `lipschitz` method of a module, or of the class whose equation an exported graph holds."""
    if equation := equation_of(module):
        return MethodType(equation.lipschitz, module)
    return own_rule(module, "lipschitz")


def _advice(module: nn.Module) -> str:
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        return "It divides by the spread of its own input, which may be as small as it likes; use lip.BatchCentering"
    if isinstance(module, nn.MultiheadAttention):
        return "Attention multiplies its input with itself and has no bound; use convolutions or lip.Patches"
    return (
        "Build it from layers that are known, or give the class a method lipschitz(self, constant, through) that "
        "writes its forward with constants"
    )

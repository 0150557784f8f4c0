"""The walk of a constant through the modules of a network, one row of the table after the other.

Who may speak for a module is asked in this order: its own class (`lipschitz`), the table of torch's layers, and its
forward, traced. Nobody is believed blindly: the class must not have been overtaken by a subclass, the module must be
as its class made it, and what a rule returns must be a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from numbers import Real
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from lipguide.bounds.calls import Call, NoBound
from lipguide.bounds.forwards import only_shrinks, travel, versions
from lipguide.bounds.torch_layers import LAYERS
from lipguide.layers.brick import Brick, computes_as, home, overtaken, own_rule, voucher
from lipguide.layers.export import equation_of
from lipguide.seeded import normal

__all__ = [
    "LayerBound",
    "Record",
    "Unbounded",
    "Walk",
    "check_batch",
    "check_hooks",
    "check_untouched",
    "own_tensors",
    "record",
]

# What every module holds beside what its own class gives it; none of it is a method that somebody may have replaced.
HELD_BY_ALL = vars(nn.Module()).keys()
BRICKS = f"{home(Brick).rpartition('.')[0]}."  # where our own layers are


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


class Record(NamedTuple):
    """What was seen in a forward pass of one input."""

    calls: dict[nn.Module, set[Call]]
    """The shapes that each module met; an empty one where it was not called with one tensor, or returned another."""
    changing: set[nn.Module]
    """The modules that change their input in place."""


def record(model: nn.Module, input_shape: tuple[int, ...]) -> Record:
    """Runs a model on one input.

    >>> seen = record(nn.Linear(3, 2), (3,))
    >>> list(seen.calls.values())
    [{Call(input=(1, 3), output=(1, 2))}]
    """
    seen = Record({}, set())
    entered: list[list[int]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(versions((*args, *kwargs.values())))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (*args, *kwargs.values())
        if versions(given) != entered.pop():
            seen.changing.add(module)
        call = Call(_shape(given[0]) if given else (), _shape(output))
        seen.calls.setdefault(module, set()).add(call)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        _run(model, (1, *input_shape), "input_shape is that of one input, without the batch")
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def check_batch(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """A model that treats samples one by one takes two at once, too; one that takes the batch for a side may not.

    >>> check_batch(nn.Linear(3, 2), (3,))
    """
    _run(model, (2, *input_shape), "it takes one input, but not a batch of two, and must treat samples one by one")


def _run(model: nn.Module, shape: tuple[int, ...], hint: str) -> None:
    before = _state(model)
    try:
        with torch.no_grad():
            model(probe(shape, model))
    except Exception as error:  # whatever a forward may raise on inputs that it was not made for
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"the model does not take an input of shape {shape} ({reason}); {hint}") from error
    for place, (tensor, version) in _state(model).items():
        known, version_before = before.get(place, (None, []))
        if tensor is not known or version != version_before:
            name = ".".join(filter(None, place))
            raise Unbounded(f"{name} is changed by the forward pass itself, so it is no constant that a bound may use")


def _state(model: nn.Module) -> dict[tuple[str, str], tuple[Tensor, list[int]]]:
    """Each parameter and buffer, by its module and its name, with the number of its changes."""
    state = {}
    for module_name, module in model.named_modules():
        for name, tensor in own_tensors(module):
            state[module_name, name] = tensor, versions(tensor)
    return state


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a module without those of its parts.

    >>> [name for name, _ in own_tensors(nn.BatchNorm2d(2, affine=False))]
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    held = chain(module._parameters.items(), module._buffers.items())
    return [(name, tensor) for name, tensor in held if tensor is not None]


def probe(shape: tuple[int, ...], *modules: nn.Module) -> Tensor:
    """An input of the type and on the device of the first weight that there is.

    >>> probe((1, 2), nn.ReLU(), nn.Linear(2, 2).double()).dtype
    torch.float64
    """
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return normal(shape).to(like)


class Walk:
    """Takes a constant through a module: `walk(module, L)` bounds x ↦ module(f(x)) for every f of constant L.

    Args:
        names: of the modules of a model, the model itself first.
        seen: in a forward pass of it.

    >>> model = nn.Sequential(nn.Sigmoid())
    >>> walk = Walk({model: "the model", model[0]: "0"}, record(model, (3,)))
    >>> walk(model, 1.0)
    0.25
    """

    def __init__(self, names: dict[nn.Module, str], seen: Record) -> None:
        self.names = names
        self.seen = seen
        self.model = next(iter(names))
        self.rows: list[LayerBound] = []
        self.accounted: set[nn.Module] = set()
        self.followed: set[nn.Module] = set()  # traced, and so run on a batch of one and on one of two
        self.believed: set[nn.Module] = set()  # what a class says that is neither torch's nor in `lipguide.layers`

    def __call__(self, module: nn.Module, constant: float) -> Any:
        self.accounted.add(module)
        if isinstance(constant, dict | list | tuple):
            raise Unbounded(f"{self._where(module)} gets several values at once, of which only single ones have one")
        try:
            if module not in self.seen.calls:
                raise NoBound("it did not run in the forward pass, so its input is not known")
            _check_untouched(module)
            return self._through(module, _number(constant, "the constant of its input"))
        except NoBound as error:
            raise Unbounded(
                f"{self._where(module)} has no bound that is known here: {error}. {_advice(module)}"
            ) from error

    def _where(self, module: nn.Module) -> str:
        return f"{self.names.get(module, 'a module')} ({type(module).__module__}.{type(module).__qualname__})"

    def _through(self, module: nn.Module, constant: float) -> Any:
        if rule := _rule_of(module):
            if isinstance(module, fx.GraphModule) or not home(rule).startswith(BRICKS):
                self.believed.add(module)
            return self._by_its_own_rule(module, rule, constant)
        if kind := voucher(module, LAYERS.__contains__):
            return self._layer(module, LAYERS[kind], constant)
        if computes_as(module, nn.Sequential):
            for part in module:
                constant = self(part, constant)
            return constant
        return self._followed(module, constant)

    def _by_its_own_rule(self, module: nn.Module, rule: Callable[..., Any], constant: float) -> Any:
        """What the class of the module says, with a row for it unless it only hands on what a part gave."""
        handed: list[Any] = []

        def through(part: nn.Module, constant: float) -> Any:
            handed.append(self.kept(part, constant))
            return handed[-1]

        try:
            outcome = rule(constant, through)
        except (NoBound, Unbounded):
            raise
        except Exception as error:
            raise NoBound(f"its method lipschitz failed ({type(error).__name__}: {error})") from error
        if any(outcome is part for part in handed):
            return outcome
        outcome = _constants(outcome)
        return self.row(module, constant, outcome) if isinstance(outcome, float) else outcome

    def _layer(self, module: nn.Module, rule: Callable[[nn.Module, Call], float], constant: float) -> float:
        for part in module.modules():
            _check_untouched(part)
        self.accounted.update(module.modules())
        slopes = []
        for call in self._known_calls(module):
            slopes.append(_number(rule(module, call), "its constant"))
            if call.output[:1] != call.input[:1]:
                raise NoBound(f"it makes {call.output} of {call.input}: it does not keep the samples of a batch apart")
        return self.row(module, constant, constant * max(slopes))

    def _followed(self, module: nn.Module, constant: float) -> Any:
        self.followed.add(module)
        inputs = [probe(call.input, module, self.model) for call in self._known_calls(module)]
        try:
            outcomes = [travel(module, x, constant, self) for x in inputs]
        except NoBound as error:
            reason = overtaken(module, "lipschitz")
            raise NoBound(f"{reason}, and {error}" if reason else str(error)) from error
        for constant in tree_leaves(outcomes):
            if constant is not None:  # which stands for an output that is no tensor
                _number(constant, "its constant")
        if len(outcomes) == 1:
            return outcomes[0]
        if not all(isinstance(outcome, float) for outcome in outcomes):
            raise NoBound("it has several outputs and is used on inputs of several shapes")
        return max(outcomes)

    def _known_calls(self, module: nn.Module) -> list[Call]:
        calls = [call for call in self.seen.calls[module] if call.input]
        if len(calls) < len(self.seen.calls[module]):
            raise NoBound("it was not called with one tensor in the forward pass, so its input is not known")
        return calls

    def kept(self, module: nn.Module, constant: float) -> Any:
        """The same for a module whose input may be used again: it must not change it in place."""
        outcome = self(module, constant)
        if module in self.seen.changing and not only_shrinks(module, constant, outcome):
            raise NoBound(
                f"{self._where(module)} changes its input in place, which may be used again after it; set inplace=False"
            )
        return outcome

    def row(self, module: nn.Module, before: float, after: float) -> float:
        shape = max(call.output for call in self.seen.calls[module])
        kind = parametrize.type_before_parametrizations(module).__name__
        if parametrize.is_parametrized(module, "weight"):
            kind += f" ({', '.join(type(p).__name__ for p in module.parametrizations.weight)})"
        own = after / before if before else 0.0
        self.rows.append(LayerBound(self.names[module], kind, shape[1:], own, after))
        return after

    def check(self, input_shape: tuple[int, ...]) -> None:
        """What is known only when all of the model is: that no part was forgotten, and that samples stay apart.

        Each of torch's layers and of lipguide's keeps them apart if there is a batch, and a forward that was traced has
        been run on two sizes of it. What is left is somebody's own method: it may speak of a forward that takes the
        batch for a side.
        """
        self._check_complete()
        if self.model not in self.followed and (self.believed or not input_shape):
            check_batch(self.model, input_shape)

    def _check_complete(self) -> None:
        """A `lipschitz` method of somebody's own may have forgotten a part."""
        for module in self.seen.calls:
            name = self.names[module]
            if module not in self.accounted and "parametrizations" not in name.split("."):
                raise Unbounded(
                    f"{name} ({type(module).__qualname__}) runs in the forward pass, but no lipschitz method took a "
                    "constant through it"
                )


def _rule_of(module: nn.Module) -> Callable[..., Any] | None:
    """The `lipschitz` method of a module, or of the class whose equation an exported graph holds."""
    if equation := equation_of(module):
        return MethodType(equation.lipschitz, module)
    return own_rule(module, "lipschitz")


def _number(value: Any, what: str) -> float:
    """A constant as a float: a finite number that is not negative."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if value is None:
        raise NoBound(f"{what} is None; is a return missing?")
    if isinstance(value, bool) or not isinstance(value, float | Real):  # a float is told apart faster
        raise NoBound(f"{what} is {value!r}, which is no number")
    if not 0 <= value < math.inf:
        raise NoBound(f"{what} is {value}, and a constant is a finite number that is not negative")
    return float(value)


def _constants(returned: Any) -> Any:
    """What a `lipschitz` method returned: one constant, or several in a tuple, a list or a dict, all checked."""
    if not tree_leaves(returned):
        raise NoBound("its method lipschitz returned no constant at all")
    return tree_map(lambda leaf: _number(leaf, "what its method lipschitz returned"), returned)


def check_hooks(hooks: Iterator[Any], whose: str) -> None:
    """No hook but those of lipguide and of torch's own utilities, which change no value.

    >>> check_hooks(iter([nn.utils.clip_grad_norm_]), "it")
    """
    for hook in hooks:
        owner = home(hook)
        if not owner.startswith(("lipguide.", "torch.nn.utils.")):
            name = getattr(hook, "__qualname__", hook)
            raise NoBound(f"{whose} a hook ({owner}.{name}) that may change values; remove it")


def check_untouched(model: nn.Module) -> None:
    """Every part of a model computes what its class says; `Unbounded` names one that somebody has changed.

    >>> changed = nn.Sequential(nn.ReLU())
    >>> changed[0].forward = torch.exp
    >>> check_untouched(changed)
    Traceback (most recent call last):
    lipguide.bounds.walk.Unbounded: 0 (ReLU) has no bound that is known here: its forward was replaced
    """
    for name, part in model.named_modules():
        try:
            _check_untouched(part)
        except NoBound as error:
            raise Unbounded(
                f"{name or 'the model'} ({type(part).__qualname__}) has no bound that is known here: {error}"
            ) from error


def _check_untouched(module: nn.Module) -> None:
    """A layer whose forward somebody has changed is not the layer that its class says."""
    parts = module.parametrizations.modules() if parametrize.is_parametrized(module) else []
    for part in (module, *parts):
        given = [name for name in vars(part) if name not in HELD_BY_ALL]
        replaced = [name for name in given if callable(getattr(type(part), name, None))]
        if replaced:
            raise NoBound(f"its {replaced[0]} was replaced")
        check_hooks(chain(part._forward_hooks.values(), part._forward_pre_hooks.values()), "it carries")


def _advice(module: nn.Module) -> str:
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        return "It divides by the spread of its own input, which may be as small as it likes; use lip.BatchCentering"
    if isinstance(module, nn.MultiheadAttention):
        return "Attention multiplies its input with itself and has no bound; use convolutions or lip.Patches"
    return (
        "Build it from layers that are known, or give the class a method lipschitz(self, constant, through) that "
        "writes its forward with constants"
    )

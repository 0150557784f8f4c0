"""A brick is one class: its equation, its constant, and what stands for it where lipguide is not installed.

    class Halved(nn.Module):
        def forward(self, x):                        # its equation
            return self.f(x) / 2

        def lipschitz(self, constant, through):      # the same with constants in place of tensors
            return through(self.f, constant) / 2

        def plain(self):                             # what `lip.export` puts in its place
            return PlainHalved(self.f)

lipguide's own bricks follow this protocol and so may yours; deriving from `Brick` is not needed. `own_rule` decides
whether a class may speak for a module: it must not where a subclass has changed what the module computes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["Brick", "Through", "computes_as", "home", "overtaken", "own_rule", "voucher"]

Through = Callable[[nn.Module, float], Any]
"""Takes a part of a module and the constant of its input, and returns the constant of its output."""

# What a subclass may define anew without a say in what its forward computes.
UNSEEN = {"__init__", "__repr__", "extra_repr", "reset_parameters", "train", "state_dict", "_apply"}
UNSEEN |= {"__getstate__", "__setstate__", "_load_from_state_dict", "_save_to_state_dict"}
UNSEEN |= {"lipschitz", "plain"}


class Brick(nn.Module):
    """A module that knows its constant and its plain twin.

    >>> class Half(Brick):
    ...     def forward(self, x):
    ...         return x / 2
    ...
    ...     def lipschitz(self, constant, through):
    ...         return constant / 2
    >>> own_rule(Half(), "lipschitz")(3.0, None)
    1.5
    """

    def lipschitz(self, constant: float, through: Through) -> Any:
        """The constant of the output where the input has the given one: `forward` with constants for tensors.

        It speaks of eval mode, of exact arithmetic, and of each sample by itself.

        Args:
            constant: that of the input.
            through: gives the constant of a part's output. Each part that `forward` calls must go through it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its constant is")

    def plain(self) -> nn.Module:
        """A module that computes the same in eval mode: a layer of torch, or a forward that `torch.fx` can trace.

        Its parts are the brick's, which are plain already. Where its constant would be lost in tracing, its class has a
        `lipschitz` method as well. After export this is called with the traced graph as `self`, so it reads the weights
        as they are then; parts, parameters and buffers that the forward uses are there, numbers are not.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what stands for it in plain torch")


def home(thing: Any) -> str:
    """The name of the Python module that a class or a function was written in; "" where it was made in none.

    >>> home(nn.Linear), home(type("Made", (), {"__module__": None}))
    ('torch.nn.modules.linear', '')
    """
    return getattr(thing, "__module__", None) or ""


def own_rule(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The module's method of this name (`lipschitz` or `plain`), if the class that defines it may speak for the module.

    >>> class Tenfold(nn.Module):
    ...     def forward(self, x):
    ...         return 10 * x
    ...
    ...     def lipschitz(self, constant, through):
    ...         return 10 * constant
    >>> class Hundredfold(Tenfold):
    ...     def forward(self, x):
    ...         return 10 * super().forward(x)
    >>> own_rule(Tenfold(), "lipschitz")(1.0, None), own_rule(Hundredfold(), "lipschitz")
    (10.0, None)
    """
    if not callable(getattr(type(module), name, None)):
        return None
    kind = voucher(module, lambda kind: name in vars(kind))
    if kind is None or _passed_over(module, name):
        return None
    return MethodType(getattr(kind, name), module)


def overtaken(module: nn.Module, name: str) -> str | None:
    """Why the module's method of this name may not speak for it, if it has one.

    >>> class Kept(nn.Module):
    ...     def lipschitz(self, constant, through):
    ...         return constant
    >>> class Doubled(Kept):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> overtaken(Doubled(), "lipschitz")
    'its method lipschitz is that of Kept, but Doubled redefines forward; give Doubled a lipschitz of its own'
    """
    passed = _passed_over(module, name)
    if passed is None:
        return None
    child, kind, changed = passed
    return (
        f"its method {name} is that of {kind}, but {child} redefines {', '.join(sorted(changed))}; give {child} a "
        f"{name} of its own"
    )


def _passed_over(module: nn.Module, name: str) -> tuple[str, str, set[str]] | None:
    """A class that the method of this name does not speak for, the class whose method that is, and what was changed.

    A method that asks `super()` hands the word to the next class that has one, and that must not have been overtaken
    either: a class between the two may change the forward and have no such method.
    """
    line = parametrize.type_before_parametrizations(module).__mro__
    while speakers := [kind for kind in line if name in vars(kind) and kind is not Brick]:
        kind = speakers[0]
        place = line.index(kind)
        if changed := _changes(line[:place], kind):
            return line[0].__name__, kind.__name__, changed
        method = vars(kind)[name]
        if not isinstance(method, FunctionType) or "super" not in _names(method.__code__):
            return None
        line = line[place + 1 :]
    return None


def voucher(module: nn.Module, speaks: Callable[[type], bool]) -> type | None:
    """The nearest class that speaks for a module, if no class below it changes the forward or what the forward calls.

    Args:
        module: its class and those that it inherits from are asked in the order of inheritance.
        speaks: is there a rule for this class?

    >>> class Renamed(nn.ReLU):
    ...     pass
    >>> class Doubled(nn.ReLU):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> voucher(Renamed(), {nn.ReLU}.__contains__).__name__, voucher(Doubled(), {nn.ReLU}.__contains__)
    ('ReLU', None)
    """
    line = parametrize.type_before_parametrizations(module).__mro__
    for place, kind in enumerate(line):
        if speaks(kind):
            return None if _changes(line[:place], kind) else kind
    return None


def computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Does a module compute what one of these classes says, whatever its own class is called?

    >>> class Doubled(nn.ReLU):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> computes_as(nn.ReLU(), nn.ReLU, nn.Tanh), computes_as(Doubled(), nn.ReLU, nn.Tanh)
    (True, False)
    """
    return voucher(module, kinds.__contains__) is not None


def _changes(below: tuple[type, ...], kind: type) -> set[str]:
    """What the classes below redefine of that which `kind` has, or of that which its methods ask for."""
    if not below:
        return set()
    asked = _asked_for(kind)
    changed = set()
    for base in below:
        for name, value in vars(base).items():
            computes = callable(value) or isinstance(value, property | classmethod | staticmethod)
            known = name == "forward" or name in asked or callable(getattr(kind, name, None))
            known = known or isinstance(vars(kind).get(name), property)
            if known and (computes or name in asked) and name not in UNSEEN:
                changed.add(name)
    return changed


def _asked_for(kind: type) -> set[str]:
    """The names that the methods of a class ask for, up to torch's own classes."""
    names: set[str] = set()
    for base in kind.__mro__:
        if not home(base).startswith("torch."):
            for value in vars(base).values():
                function = value.fget if isinstance(value, property) else value
                if isinstance(function, FunctionType):
                    names |= _names(function.__code__)
    return names


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names |= _names(inner)
    return names

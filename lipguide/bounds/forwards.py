"""How a Lipschitz constant travels through a forward method that torch.fx can trace.

Each value in the graph has a constant with respect to the network's input: sums add constants, concatenations add
squares, reshaping keeps them. An operation that is not listed here is an error. The graph is run on inputs, so that
shapes and the values of weights are known, and must compute what the forward itself computes.

A constant is that of one sample. So samples must stay apart, along dimension 0: the graph is run on a batch and on one
of twice the size, and whatever depends on the input must have as many entries there as the batch has samples, both
times. No dimension of a fixed size can pass for the batch like that, and no merged or dropped one.

What an operation changes in place must not be looked at again, for its constant would be that of the value before. Each
tensor counts its changes (`_version`), together with all its views: a change is seen whichever way it came about.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lipguide.bounds.calls import NoBound
from lipguide.bounds.functionals import advice
from lipguide.bounds.rules import operation_of, rule_of
from lipguide.bounds.torch_layers import LAYERS
from lipguide.layers.brick import Through, voucher
from lipguide.layers.export import EveryPartALeaf

__all__ = ["Traveller", "only_shrinks", "travel", "versions"]


def versions(value: Any) -> list[int]:
    """How often each tensor in a value was changed in place.

    >>> x = torch.zeros(2)
    >>> versions((x.view(1, 2), x.add_(1)))
    [1, 1]
    """
    if isinstance(value, Tensor):
        parts = [value]
    elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
        parts = value  # as most modules are called
    else:
        parts = tree_leaves(value)
    # Tensors made in inference mode do not count, but outside of it nothing can change them.
    return [part._version for part in parts if isinstance(part, Tensor) and not part.is_inference()]


def only_shrinks(part: nn.Module, before: Any, after: Any) -> bool:
    """Does it put in place of its input a function of slope at most 1 of each entry, so that constants still hold?

    >>> only_shrinks(nn.ReLU(inplace=True), 2.0, 2.0), only_shrinks(nn.SELU(inplace=True), 1.0, 1.76)
    (True, False)
    """
    known = getattr(part, "inplace", False) and voucher(part, LAYERS.__contains__) is not None
    return known and isinstance(after, float | int) and after <= before


def travel(module: nn.Module, x: Tensor, constant: float, through: Through) -> Any:
    """The constant of a module's output: a number, or a tuple, list or dict of them, with None for what is no tensor.

    Args:
        module: its forward takes one tensor and is traced with the modules inside it as single steps.
        x: a batch of inputs.
        constant: that of the input.
        through: takes a module and the constant of its input and returns the constant of its output.

    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return x + x
    >>> travel(Twice(), torch.zeros(1, 2), 1.0, None)
    2.0
    """
    graph = module.graph if isinstance(module, fx.GraphModule) else _trace(module)
    traveller = Traveller(module, graph, constant, through)
    _run_both(traveller, module, x)
    twice = -30 * torch.cat((x, x / 2))  # twice as many samples, where what is bent is bent the other way
    _run_both(_Again(module, graph, traveller), module, twice)
    if all(leaf is None for leaf in tree_leaves(traveller.outcome)):
        raise NoBound("its forward returns no tensor")
    return traveller.outcome


@torch.no_grad()
def _run_both(traveller: Traveller, module: nn.Module, batch: Tensor) -> None:
    """The graph and the forward that it was traced from, on the same batch."""
    traced = traveller.run(batch.clone())
    try:
        computed = module(batch.clone())
    except Exception as error:
        raise NoBound(f"its forward fails on a batch of {len(batch)} ({error})") from error
    if not _same_values(traced, computed):
        raise NoBound("its forward does not compute what tracing saw of it; does it change a tensor in place?")


def _trace(module: nn.Module) -> fx.Graph:
    held = set(vars(module))
    try:
        return EveryPartALeaf().trace(module)
    except Exception as error:
        raise NoBound(f"its forward cannot be traced ({error})") from error
    finally:
        for name in set(vars(module)) - held:  # where tracing puts the tensors that a forward makes
            if name.startswith("_tensor_constant"):
                delattr(module, name)


def _same_values(a: Any, b: Any) -> bool:
    for kind in (Tensor, dict, list | tuple):
        if isinstance(a, kind) != isinstance(b, kind):
            return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_values(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same_values, a, b))
    return a == b


class Traveller(fx.Interpreter):
    """Runs the graph on a batch and gives each node its constant on the way."""

    def __init__(self, module: nn.Module, graph: fx.Graph, constant: float, through: Through) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.start = constant
        self.through = through
        self.batch = 0
        self.constants: dict[fx.Node, Any] = {}
        self.outcome: Any = None
        held = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        self.lasting = {name for name, _ in held}

    def run(self, x: Tensor) -> Any:
        self.batch = len(x)
        return super().run(x)

    def run_node(self, node: fx.Node) -> Any:
        self._check_lasts(node)
        before = {other: versions(value) for other, value in self.env.items()}
        value = self._value(node)
        self.constants[node] = self._constant(node, value)
        self._check_apart(node, value)
        changed = [other for other, counts in before.items() if versions(self.env[other]) != counts]
        if changed and not self._shrinks(node):
            self._check_forgotten(node, changed)
        return value

    def _check_lasts(self, node: fx.Node) -> None:
        if node.op == "get_attr" and node.target not in self.lasting:
            raise NoBound(
                f"its forward uses the tensor {node.target}, which is neither a parameter nor a buffer and may have "
                "been made of the input; if it is a constant, register it as a buffer"
            )

    def _value(self, node: fx.Node) -> Any:
        try:
            return super().run_node(node)
        except Exception as error:
            raise NoBound(f"{_name(node)} fails on a batch of {self.batch} ({error})") from error

    def _constant(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            if self.constants:
                raise NoBound("its forward takes more than one input")
            return self.start
        if node.op == "get_attr":
            return 0.0
        if node.op == "call_module":
            return self.part(node)
        if node.op == "output":
            self.outcome = self._outcome(node.args[0])
            return None
        if all(self.constants[part] == 0.0 for part in node.all_input_nodes):
            return 0.0
        if hasattr(node.target, "_fields"):  # a named tuple of several outputs
            given = map(self.of, node.args)
            named = {name: self.of(part) for name, part in node.kwargs.items()}
            return node.target(*given, **named)
        return self._operation(node, value)

    def _operation(self, node: fx.Node, value: Any) -> Any:
        rule = rule_of(node)
        if rule is None or not node.args:
            return self.refuse(node)
        try:
            constant = rule(self, node, value)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return self.refuse(node)  # arguments of a kind that the rule does not know
        if constant and isinstance(value, Tensor) and not value.is_floating_point():
            return self.refuse(node)  # whole numbers jump
        return constant

    def part(self, node: fx.Node) -> Any:
        """The constant behind a module inside this one."""
        if len(node.args) != 1 or node.kwargs:
            raise NoBound(f"it calls {node.target} with other arguments than one tensor")
        return self.through(self.module.get_submodule(node.target), self.of(node.args[0]))

    def _outcome(self, returned: Any) -> Any:
        """What the forward returns, with constants in place of tensors and None in place of all else."""
        if isinstance(returned, fx.Node):
            tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.env[returned]))
            return self.constants[returned] if tensors else None
        if isinstance(returned, dict):
            return {key: self._outcome(part) for key, part in returned.items()}
        if hasattr(returned, "_fields"):
            return type(returned)(*map(self._outcome, returned))
        if isinstance(returned, list | tuple):
            return [self._outcome(part) for part in returned]
        return None

    def _check_apart(self, node: fx.Node, value: Any) -> None:
        constant = self.constants[node]
        if not isinstance(constant, float) or constant == 0.0:
            return
        for part in tree_leaves(value):
            if isinstance(part, Tensor) and part.shape[:1] != (self.batch,):
                raise NoBound(
                    f"{_name(node)} makes a tensor of shape {tuple(part.shape)} from a batch of {self.batch}: samples "
                    "must stay apart along dimension 0; say which other dimensions are meant, as in squeeze(1), "
                    "mean((1, 2)) or reshape(x.shape[0], -1), and use lip.Patches to apply a function to each patch"
                )

    def _shrinks(self, node: fx.Node) -> bool:
        before = self.of(node.args[0]) if node.args else None
        after = self.constants[node]
        if node.op == "call_module":
            return only_shrinks(self.module.get_submodule(node.target), before, after)
        return operation_of(node) in ("relu", "iadd") and after <= before

    def _check_forgotten(self, node: fx.Node, changed: list[fx.Node]) -> None:
        for other in changed:
            needed_later = any(user is not node and user not in self.constants for user in other.users)
            if other.op == "get_attr" or needed_later:
                raise NoBound(
                    f"{_name(node)} changes {other} in place, which is used elsewhere; set inplace=False, or write "
                    "x = x + y for x += y"
                )

    def of(self, argument: Any) -> Any:
        """The constant of an argument of a node: 0 for what does not depend on the input."""
        return self.constants[argument] if isinstance(argument, fx.Node) else 0.0

    def number(self, node: fx.Node, argument: Any) -> float:
        """The constant of an argument that is one tensor."""
        constant = self.of(argument)
        return constant if isinstance(constant, float) else self.refuse(node)

    def value(self, argument: Any) -> Any:
        return self.env[argument] if isinstance(argument, fx.Node) else argument

    def earlier(self, argument: Any) -> Any:
        """The same on the first of the two batches."""
        return self.value(argument)

    def written(self, node: fx.Node) -> str:
        """The call that a node is."""
        arguments = [str(argument) for argument in node.args]
        arguments += [f"{name}={argument}" for name, argument in node.kwargs.items()]
        return f"{_name(node)}({', '.join(arguments)})"

    def refuse(self, node: fx.Node) -> Any:
        named = ", or not with tensors that are given by name" if not node.args else ""
        instead = advice(_name(node))
        instead = f"; {instead}" if instead else ""
        raise NoBound(f"its forward uses {self.written(node)}, for which no constant is known{named}{instead}")


class _Again(Traveller):
    """A second run: what is inside has its constants already, and none may depend on the size of the batch."""

    def __init__(self, module: nn.Module, graph: fx.Graph, first: Traveller) -> None:
        super().__init__(module, graph, first.start, first.through)
        self.first = first

    def part(self, node: fx.Node) -> Any:
        return self.first.constants[node]

    def earlier(self, argument: Any) -> Any:
        return self.first.value(argument)

    def _constant(self, node: fx.Node, value: Any) -> Any:
        constant = super()._constant(node, value)
        if constant != self.first.constants[node]:
            raise NoBound(f"{_name(node)} has a constant that depends on how many samples are in the batch")
        return constant


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

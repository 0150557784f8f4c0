"""What each operation in a forward does to the constants of its arguments.

A rule takes the traveller, a node of the graph and the value that the node has on the batch at hand, and returns the
constant of that value. What it does not know, it refuses: `walk.refuse(node)` raises.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lipguide.bounds.calls import NoBound
from lipguide.bounds.functionals import TWINS, functions, layer_rule
from lipguide.bounds.torch_layers import LAYERS

if TYPE_CHECKING:
    from lipguide.bounds.forwards import Traveller

__all__ = ["known", "operation_of", "rule_of"]

Rule = Callable[["Traveller", fx.Node, Any], Any]


def operation_of(node: fx.Node) -> str | None:
    """The name of what a node does, whether it is called as a method, a function or an operator; None if unknown.

    >>> graph = fx.symbolic_trace(lambda x: x.relu() + torch.relu(x)).graph
    >>> [operation_of(node) for node in graph.nodes if node.op.startswith("call")]
    ['relu', 'relu', 'add']
    """
    return node.target if node.op == "call_method" else FUNCTIONS.get(node.target)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for what a node does, if there is one.

    >>> nodes = fx.symbolic_trace(lambda x: torch.exp(x)).graph.nodes
    >>> [rule_of(node) for node in nodes if node.op == "call_function"]
    [None]
    """
    return RULES.get(operation_of(node))


def known() -> str:
    """All that has a constant, in words.

    >>> "`nn.ReLU`" in known(), "`F.max_pool1d`" in known(), "`movedim`" in known()
    (True, True, True)
    """
    layers = [f"`nn.{kind.__name__}`" for kind in LAYERS]
    calls = [f"`F.{name}`" for name in TWINS]
    others = [f"`{name}`" for name in RULES if name not in TWINS]
    return (
        f"The layers {', '.join(sorted(layers))}. The functions, which have their layer's constant, "
        f"{', '.join(sorted(calls))}. What else a forward may do to tensors: {', '.join(sorted(others))}."
    )


def _same(walk: Traveller, node: fx.Node, value: Any) -> Any:
    """Moves values about, drops some, or hands out pieces: each changes at most as much as the whole."""
    if isinstance(value, Tensor) and value.dtype != walk.value(node.args[0]).dtype:
        return walk.refuse(node)  # the same bits, read as other numbers
    return walk.number(node, node.args[0])


def _moves_no_further(walk: Traveller, node: fx.Node, value: Any) -> float:
    """A function of each entry, of slope 1 at most."""
    return walk.number(node, node.args[0])


def _clamp(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """1, if the limits do not depend on the input, and it is not repeated to fit them."""
    limits = [*node.args[1:], *node.kwargs.values()]
    if any(walk.of(limit) != 0.0 for limit in limits) or walk.value(node.args[0]).shape != value.shape:
        return walk.refuse(node)
    return walk.number(node, node.args[0])


def _mean(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """1/√n for the mean of n values."""
    whole = walk.value(node.args[0])
    return walk.number(node, node.args[0]) * math.sqrt(value.numel() / whole.numel())


def _sum(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """L₁ + L₂ for a sum or a difference."""
    return sum(_terms(walk, node, value))


def _extremum(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """√(L₁² + L₂²): each entry follows one of two."""
    return math.hypot(*_terms(walk, node, value))


def _terms(walk: Traveller, node: fx.Node, value: Tensor) -> list[float]:
    """The constants of the two arguments of a sum, neither of which may be repeated to fit the other."""
    if len(node.args) != 2 or node.kwargs:
        return walk.refuse(node)
    for argument in node.args:
        depends = walk.number(node, argument) != 0.0
        if depends and walk.value(argument).shape != value.shape:
            raise NoBound(f"its forward repeats {argument} to fit {tuple(value.shape)}, which stretches it")
    return [walk.number(node, argument) for argument in node.args]


def _times(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """max |w| for w x."""
    left, right = node.args
    if walk.of(left) != 0.0:
        tensor, weight = left, right
    else:
        tensor, weight = right, left
    largest = _sizes(walk, node, tensor, weight, value).max()
    return walk.number(node, tensor) * float(largest)


def _over(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """1 / min |w| for x / w."""
    tensor, weight = node.args
    smallest = _sizes(walk, node, tensor, weight, value).min()
    return walk.number(node, tensor) * float(1 / smallest)


def _sizes(walk: Traveller, node: fx.Node, tensor: Any, weight: Any, value: Tensor) -> Tensor:
    """|w|, if w does not depend on the input (a product of two such values is not Lipschitz) and x is not repeated."""
    if walk.of(weight) != 0.0 or walk.value(tensor).shape != value.shape:
        return walk.refuse(node)
    return torch.as_tensor(walk.value(weight), dtype=torch.float64, device="cpu").abs()


def _joined(walk: Traveller, node: fx.Node, value: Tensor) -> float:
    """√(Σ L²) for values side by side."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple):
        return walk.refuse(node)
    squares = [walk.number(node, part) ** 2 for part in parts]
    return math.sqrt(sum(squares))


def _item(walk: Traveller, node: fx.Node, value: Any) -> Any:
    """One of several outputs, or a slice of one."""
    whole = walk.of(node.args[0])
    key = node.args[1]
    if isinstance(whole, dict | list | tuple) and isinstance(key, int | str):
        return whole[key]
    keys = key if isinstance(key, tuple) else (key,)
    slices = all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in keys)
    if slices and isinstance(whole, float):
        return whole
    return walk.refuse(node)


def _attribute(walk: Traveller, node: fx.Node, value: Any) -> Any:
    """What every batch of this shape has alike."""
    if node.args[1] in ("shape", "dtype", "device"):
        return 0.0
    return walk.refuse(node)


def _size(walk: Traveller, node: fx.Node, value: Any) -> float:
    return 0.0


RULES: dict[str, Rule] = {
    "flatten": _same,
    "reshape": _same,
    "view": _same,
    "unflatten": _same,
    "permute": _same,
    "transpose": _same,
    "movedim": _same,
    "squeeze": _same,
    "unsqueeze": _same,
    "contiguous": _same,
    "clone": _same,
    "chunk": _same,
    "split": _same,
    "unbind": _same,
    "abs": _moves_no_further,
    "neg": _moves_no_further,
    "clamp": _clamp,
    "clip": _clamp,
    "mean": _mean,
    "add": _sum,
    "sub": _sum,
    "iadd": _sum,
    "maximum": _extremum,
    "minimum": _extremum,
    "mul": _times,
    "truediv": _over,
    "cat": _joined,
    "stack": _joined,
    "getitem": _item,
    "getattr": _attribute,
    "size": _size,
    "dim": _size,
}
RULES |= {name: layer_rule(twin) for name, twin in TWINS.items()}

FUNCTIONS: dict[Any, str] = {getattr: "getattr"}
FUNCTIONS |= {getattr(torch, name): name for name in RULES if hasattr(torch, name)}
FUNCTIONS |= functions()
FUNCTIONS |= {getattr(operator, name): name for name in ("add", "sub", "iadd", "mul", "truediv", "neg", "getitem")}

"""Export: a copy of a network made of plain torch layers, for inference and for machines without lipguide.

Constrained layers become the `nn.Linear`, `nn.Conv2d`, … that they are, with the weights that the constraint last gave
them. A brick becomes what its method `plain` says; where torch has no layer for it, that is a `torch.fx.GraphModule`:
its equation written in torch operations, with its weights and the layers inside it. Such a module is saved with its own
source code, so that `torch.load` needs torch alone; `torch.export` and ONNX take it like any other.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from lipguide.layers.affine import plain_circle
from lipguide.layers.brick import home, own_rule

__all__ = [
    "EveryPartALeaf",
    "are_fresh",
    "equation_of",
    "export",
    "fresh_weights",
    "own_weights",
    "remembered",
    "to_be_loaded",
    "uncached",
    "without_parametrizations",
]

PACKAGE = __name__.split(".")[0]
_FRESH = ContextVar("fresh", default=False)
MARK = "lipguide_brick"


def export(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode that is made of plain torch layers and computes the same.

    No class, hook or parametrization of lipguide is left in it: save it with `torch.save(exported, file)` and load it
    with `torch.load(file, weights_only=False)` where lipguide is not installed. A module of your own that has a method
    `plain` is replaced by what this returns, as the bricks are. Others stay what they are, with their contents
    exported; loading them needs your code, unless you pass the result through `torch.export`.

    The copy is for inference. Nothing constrains its weights any more: train it further, and the bound is lost.
    Keep the original for that.

    Args:
        model: any module; it is not changed.

    >>> from lipguide.layers.activations import GroupSort2
    >>> from lipguide.layers.affine import spectral
    >>> model = nn.Sequential(spectral(nn.Linear(4, 4)), GroupSort2()).eval()
    >>> plain, x = export(model), torch.randn(2, 4)
    >>> type(plain[0]).__name__, torch.allclose(plain(x), model(x))
    ('Linear', True)
    """
    return _plain(without_parametrizations(model), "", {})


def without_parametrizations(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parametrized weights are plain ones, with the values that they have in eval mode.

    >>> from lipguide.layers.affine import spectral
    >>> list(without_parametrizations(spectral(nn.Linear(2, 2))).state_dict())
    ['weight', 'bias']
    """
    with fresh_weights(model):
        return _all_plain(copy.deepcopy(model).eval())


@torch.no_grad()
def to_be_loaded(model: nn.Module) -> nn.Module:
    """A copy in eval mode that has plain weights for parametrized ones, of no meaning before they are loaded.

    Nothing is proved of them, which is most of what `without_parametrizations` takes its time for.

    >>> from lipguide.layers.affine import spectral
    >>> list(to_be_loaded(spectral(nn.Linear(2, 2))).state_dict())
    ['weight', 'bias']
    """
    with uncached():
        return _all_plain(copy.deepcopy(model).train()).eval()


def _all_plain(model: nn.Module) -> nn.Module:
    """The model itself, with plain weights that have the values of now."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
    return model


@contextmanager
def fresh_weights(model: nn.Module) -> Iterator[None]:
    """Within it each constrained weight is computed anew, even inside of `torch.nn.utils.parametrize.cached()`.

    `cached` remembers a weight by the address of its module. The weight may be that of training mode, that of before
    the last step of the optimizer, or that of another module which is gone and whose address was given away. Where the
    model would compute with such a weight, that is an error here.

    >>> layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.ReLU())
    >>> with parametrize.cached():
    ...     before = layer.weight
    ...     with fresh_weights(layer):
    ...         layer.weight is before
    False
    """
    own_weights(model)
    with uncached() as cache:
        _check_remembered(model, cache)
        fresh = _FRESH.set(True)
        try:
            yield
        finally:
            _FRESH.reset(fresh)


@contextmanager
def remembered(model: Any) -> Iterator[None]:
    """`torch.nn.utils.parametrize.cached()`, in which copies of a module have each its own weight.

    Args:
        model: what is called within; only an `nn.Module` has weights to remember.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    >>> with remembered(layer):
    ...     layer.weight is layer.weight
    True
    """
    if isinstance(model, nn.Module):
        own_weights(model)
    with parametrize.cached():
        yield


def own_weights(model: nn.Module) -> None:
    """Make `torch.nn.utils.parametrize.cached()` tell apart what `copy.deepcopy` has made of one module.

    A copy has the class of its original, and in that class torch keeps under which address a weight is remembered: the
    original's. Within `cached`, a network of copies would compute with one weight for them all, and be bounded by it.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    >>> model = nn.Sequential(layer, copy.deepcopy(layer))
    >>> own_weights(model)
    >>> with parametrize.cached():
    ...     model[0].weight is model[1].weight
    False
    """
    for module in model.modules():
        names = getattr(module, "parametrizations", ())
        if any(_owner(module, name) is not module for name in names):
            module.__class__ = parametrize.type_before_parametrizations(module)
            parametrize._inject_new_class(module)
            for name in module.parametrizations:
                parametrize._inject_property(module, name)


def _owner(module: nn.Module, name: str) -> nn.Module | None:
    """The module under whose address the weight of this one is remembered, as far as torch's property tells."""
    getter = getattr(type(module), name).fget
    cached = _enclosed(getter).get("get_cached_parametrization")
    return _enclosed(cached).get("module")


def _enclosed(function: Any) -> dict[str, Any]:
    """The variables that a function has around it."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def are_fresh() -> bool:
    """Was each constrained weight that `torch.nn.utils.parametrize.cached()` may remember made by its constraint now?

    So it is where nothing is remembered at all, and within `fresh_weights`.

    >>> with parametrize.cached():
    ...     are_fresh()
    False
    """
    return not parametrize._cache_enabled or _FRESH.get()


@contextmanager
def uncached() -> Iterator[dict[tuple[int, str], Any]]:
    """Puts aside what `torch.nn.utils.parametrize.cached()` remembers, and hands it out.

    torch offers no such thing, so this is the one place that takes hold of its cache for a while.

    >>> with parametrize.cached(), uncached() as remembered:
    ...     remembered
    {}
    """
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield cache
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@torch.no_grad()
def _check_remembered(model: nn.Module, cache: dict[tuple[int, str], Any]) -> None:
    """What the cache holds for this model must be what its constraints give in eval mode."""
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", ()):
            remembered = cache.get((id(module), name))
            if remembered is not None and not _close(remembered, _in_eval_mode(module, name)):
                raise ValueError(
                    f"{path}.{name}".lstrip(".") + " is remembered by parametrize.cached() from before, and is not "
                    "what its constraint gives in eval mode: leave the block, or enter it with the model as it is now"
                )


def _in_eval_mode(module: nn.Module, name: str) -> torch.Tensor:
    constraint = module.parametrizations[name]
    modes = {part: part.training for part in constraint.modules()}
    constraint.eval()
    try:
        return getattr(module, name)
    finally:
        for part, training in modes.items():
            part.training = training


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b.to(a), rtol=1e-5, atol=1e-6 * float(b.abs().max())))


def _make_plain(module: nn.Module) -> None:
    # Not torch's `remove_parametrizations`: that takes the weight off the class, which a copy shares with its original.
    plain = {}
    for name, parametrization in module.parametrizations.items():
        value = getattr(module, name).detach().clone()
        originals = list(parametrization.parameters(recurse=False))
        plain[name] = nn.Parameter(value, any(p.requires_grad for p in originals)) if originals else value
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module._parameters = {**{n: p for n, p in plain.items() if isinstance(p, nn.Parameter)}, **module._parameters}
    for name, value in plain.items():
        if not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)


def equation_of(module: nn.Module) -> type | None:
    """The class whose forward an exported graph holds, if its code is still the one that was exported.

    Only classes with a `lipschitz` method are remembered: that is what they are asked for.

    >>> from lipguide.layers.activations import GroupSort2
    >>> equation_of(export(GroupSort2())).__name__
    '_PlainGroupSort'
    """
    if not isinstance(module, fx.GraphModule):
        return None
    address, code = module.meta.get(MARK) or module.__dict__.get(MARK) or (None, None)
    return _class_at(address) if address and code == module.code else None


def _class_at(address: str) -> type | None:
    home, path = address.split(":")
    try:
        found: Any = importlib.import_module(home)  # loads what its caller has named
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):  # of a project that is not installed here
        return None
    return found if isinstance(found, type) else None


def _plain(module: nn.Module, path: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with everything of lipguide replaced; a module that is used twice is replaced once."""
    if module in done:
        return done[module]
    for name, child in module._modules.items():  # `named_children` would leave out a second use of a module
        if child is not None:
            setattr(module, name, _plain(child, f"{path}.{name}".lstrip("."), done))
    circle = plain_circle(module)  # what its hooks refuse is part of its forward
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if home(hook).split(".")[0] == PACKAGE]:
            hooks.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    done[module] = _replaced(module, circle, path).eval()
    return done[module]


def _replaced(module: nn.Module, twin: nn.Module | None, path: str) -> nn.Module:
    """The module itself, or what stands for it: the twin that is given, or its own."""
    own = own_rule(module, "plain")
    if twin is None and own is None and not _is_ours(module):
        return module
    if twin is None:
        twin = own() if own else module
    if not isinstance(twin, nn.Module):
        raise TypeError(f"plain() of {path or 'the model'} returned a {type(twin).__name__}: it must return a module")
    if home(type(twin)).startswith("torch."):
        return twin
    try:  # a forward that only calls its parts and torch can be traced as it stands
        graph = _as_graph(twin, type(module).__name__)
    except Exception as error:
        raise TypeError(
            f"{path or 'the model'} is a {type(module).__name__} of {type(module).__module__}, which has no plain "
            f"equivalent and cannot be traced ({error}); build it from torch layers and the bricks of lipguide, or "
            "give its class a method plain(self)"
        ) from error
    if twin is not module and own_rule(twin, "lipschitz"):
        address = f"{type(twin).__module__}:{type(twin).__qualname__}"
        # `meta` survives copying and an attribute survives saving: the mark is in both.
        graph.meta[MARK] = (address, graph.code)
        setattr(graph, MARK, graph.meta[MARK])
    return graph


def _is_ours(module: nn.Module) -> bool:
    return any(home(base).split(".")[0] == PACKAGE for base in type(module).__mro__)


class EveryPartALeaf(fx.Tracer):
    """Traces a forward with each module that it calls as a single step."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def _as_graph(module: nn.Module, name: str) -> fx.GraphModule:
    graph = fx.Graph()  # a copy, for the traced one refers to the tracer, a class of lipguide
    graph.output(graph.graph_copy(EveryPartALeaf().trace(module), {}))
    for node in graph.nodes:
        node.type = None  # an annotation of a postponed kind is a string, which torch 2.11 cannot save
    return fx.GraphModule(module, graph, class_name=name.lstrip("_"))

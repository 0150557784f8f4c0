"""Export: a copy of a network made of plain torch layers, for inference and for machines without lipguide.

Constrained layers become the `nn.Linear`, `nn.Conv2d`, … that they are, with the weights that the constraint last gave
them. A brick that torch has no layer for becomes a `torch.fx.GraphModule`: its equation written in torch operations,
with the layers inside it as submodules. Such a module is saved with its own source code, so that `torch.load` needs
torch alone; `torch.export` and ONNX take it like any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.layers import activations, blocks, pooling

__all__ = ["brick_name", "export", "inherited", "without_parametrizations"]

PACKAGE = __name__.split(".")[0]
MARK = "lipguide_brick"
# What a subclass may define anew without a say in what its forward computes.
UNSEEN = {"__init__", "__repr__", "extra_repr", "reset_parameters", "train", "state_dict", "_apply"}
UNSEEN |= {"__getstate__", "__setstate__", "_load_from_state_dict", "_save_to_state_dict"}


def export(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode that is made of plain torch layers and computes the same.

    No class, hook or parametrization of lipguide is left in it: save it with `torch.save(exported, file)` and load it
    with `torch.load(file, weights_only=False)` where lipguide is not installed. Modules of your own stay what they are,
    with their contents exported; loading them needs your code, unless you pass the result through `torch.export`.

    The copy is for inference. Nothing constrains its weights any more: train it further, and the bound is lost.
    Keep the original for that.

    Args:
        model: any module; it is not changed.

    >>> from lipguide.layers.affine import spectral
    >>> model = nn.Sequential(spectral(nn.Linear(4, 4)), activations.GroupSort2()).eval()
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
    twin = copy.deepcopy(model).eval()
    for module in list(twin.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
    return twin


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


def brick_name(module: nn.Module) -> str | None:
    """The name of the brick that an exported module was, if its equation is still the one that was exported.

    >>> brick_name(export(activations.GroupSort2()))
    'GroupSort'
    """
    if not isinstance(module, fx.GraphModule):
        return None
    name, code = module.meta.get(MARK) or module.__dict__.get(MARK) or (None, None)
    return name if code == module.code else None


def _plain(module: nn.Module, path: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with everything of lipguide replaced; a module that is used twice is replaced once."""
    if module in done:
        return done[module]
    for name, child in module._modules.items():  # `named_children` would leave out a second use of a module
        if child is not None:
            setattr(module, name, _plain(child, f"{path}.{name}".lstrip("."), done))
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook.__module__.split(".")[0] == PACKAGE]:
            del hooks[key]
    done[module] = _twin(module, path).eval() if _is_ours(module) else module
    return done[module]


def _is_ours(module: nn.Module) -> bool:
    return any(base.__module__.split(".")[0] == PACKAGE for base in type(module).__mro__)


def inherited(module: nn.Module, table: dict[type, Any]) -> Any | None:
    """The entry of the module's class, or of one that it inherits its forward and all that this calls from.

    >>> class Renamed(nn.ReLU):
    ...     pass
    >>> inherited(Renamed(), {nn.ReLU: "a kink"})
    'a kink'
    """
    kind = next((kind for kind in type(module).__mro__ if kind in table), None)
    if kind is None:
        return None
    below = type(module).__mro__[: type(module).__mro__.index(kind)]
    changed = {name for base in below for name in vars(base) if hasattr(kind, name)} - UNSEEN
    changed = {name for name in changed if callable(getattr(kind, name)) or isinstance(vars(kind).get(name), property)}
    return None if changed else table[kind]


def _twin(module: nn.Module, path: str) -> nn.Module:
    if make := inherited(module, TWINS):
        twin = make(module)
        if type(twin).__module__.startswith("torch."):
            return twin
        graph = _as_graph(twin, type(twin).__name__)
        # `meta` survives copying and an attribute survives saving: the mark is in both.
        graph.meta[MARK] = (type(twin).__name__.lstrip("_"), graph.code)
        setattr(graph, MARK, graph.meta[MARK])
        return graph
    try:  # a module whose forward only calls its parts and torch can be traced as it stands
        return _as_graph(module, type(module).__name__)
    except Exception as error:
        raise TypeError(
            f"{path or 'the model'} is a {type(module).__name__} of {type(module).__module__}, which has no plain "
            f"equivalent and cannot be traced ({error}); build it from torch layers and the bricks of lipguide"
        ) from error


class _EveryPartALeaf(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def _as_graph(module: nn.Module, name: str) -> fx.GraphModule:
    graph = fx.Graph()  # a copy, for the traced one refers to the tracer, a class of lipguide
    graph.output(graph.graph_copy(_EveryPartALeaf().trace(module), {}))
    return fx.GraphModule(module, graph, class_name=name.lstrip("_"))


# The bricks in torch operations alone: their equations without the checks of shapes, which a graph cannot hold.


class _GroupSort(nn.Module):
    def __init__(self, module: activations.GroupSort) -> None:
        super().__init__()
        self.size = module.group_size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, self.size))
        if self.size > 2:
            return groups.sort(2).values.flatten(1, 2)
        a, b = groups.unbind(2)
        return torch.stack((torch.minimum(a, b), torch.maximum(a, b)), 2).flatten(1, 2)


class _MaxMin(nn.Module):
    def __init__(self, module: activations.MaxMin) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), 1)


class _MaxMinDouble(nn.Module):
    def __init__(self, module: activations.MaxMinDouble) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.relu(x), F.relu(-x)), 1)


class _FullSort(nn.Module):
    def __init__(self, module: activations.FullSort) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class _Householder(nn.Module):
    def __init__(self, module: activations.Householder) -> None:
        super().__init__()
        half_angle = module.theta.detach() / 2
        self.register_buffer("v", torch.cat((half_angle.sin(), -half_angle.cos())))

    def forward(self, x: Tensor) -> Tensor:
        z = x.movedim(1, -1)
        z1, z2 = (z * self.v).chunk(2, -1)
        beyond = 2 * F.relu(z1 + z2)
        return (z - torch.cat((beyond, beyond), -1) * self.v).movedim(-1, 1)


class _L2NormPool(nn.Module):
    """√(sum of squares + r²) − r over windows, or over the whole picture."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.window = getattr(module, "kernel_size", None)

    def forward(self, x: Tensor) -> Tensor:
        # Half precision cannot hold the squares: like the original, sum them in float32 (and doubles as doubles).
        wide = x.new_zeros(1) + x.new_zeros(1, dtype=torch.float32)
        if self.window is None:
            squares = x.to(wide).square().sum((2, 3), keepdim=True)
        else:
            squares = F.avg_pool2d(x.to(wide).square(), self.window) * math.prod(self.window)
        r = pooling.SMOOTHING[torch.float32]
        return (torch.sqrt(squares + r * r) - r).to(x)


class _ScaledAvgPool2d(nn.Module):
    def __init__(self, module: pooling.ScaledAvgPool2d) -> None:
        super().__init__()
        self.window = module.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.window) * math.sqrt(math.prod(self.window))


class _GlobalAvgPool2d(nn.Module):
    def __init__(self, module: pooling.GlobalAvgPool2d) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True) * (x.shape[2] * x.shape[3]) ** 0.5


class _Residual(nn.Module):
    def __init__(self, module: blocks.Residual) -> None:
        super().__init__()
        self.branch = module.branch

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)) / 2


class _Patches(nn.Module):
    def __init__(self, module: blocks.Patches) -> None:
        super().__init__()
        self.fn, self.size = module.fn, module.size

    def forward(self, x: Tensor) -> Tensor:
        s, rows, columns = self.size, x.shape[2] // self.size, x.shape[3] // self.size
        patches = x.reshape(x.shape[0], x.shape[1], rows, s, columns, s).permute(0, 2, 4, 1, 3, 5)
        # A vector (M, C) becomes a picture of one pixel; behind a picture the two ones change nothing.
        y = self.fn(patches.reshape(-1, x.shape[1], s, s))[..., None, None]
        height, width = y.shape[2], y.shape[3]
        y = y.reshape(x.shape[0], rows, columns, y.shape[1], height, width).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(x.shape[0], y.shape[1], rows * height, columns * width)


class _PadChannels(nn.Module):
    def __init__(self, module: blocks.PadChannels) -> None:
        super().__init__()
        self.channels = module.channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x.movedim(1, -1), (0, self.channels - x.shape[1])).movedim(-1, 1)


class _BatchCentering(nn.Module):
    def __init__(self, module: blocks.BatchCentering) -> None:
        super().__init__()
        self.register_buffer("shift", module.bias.detach() - module.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) + self.shift).movedim(-1, 1)


class _SLL(nn.Module):
    """y = x − 2 V relu(Vᵀx + b) with two plain layers: `inward` holds Vᵀ and b, `outward` holds 2 V."""

    def __init__(self, module: blocks.SLL | blocks.SLLLinear) -> None:
        super().__init__()
        v, bias = module.weight.detach(), module.bias.detach()
        if isinstance(module, blocks.SLLLinear):
            self.inward = nn.Linear(module.features, module.inner)
            self.outward = nn.Linear(module.inner, module.features, bias=False)
            weights = v, 2 * v.T
        else:
            shape = {"kernel_size": module.kernel_size, "padding": module.kernel_size // 2}
            self.inward = nn.Conv2d(module.channels, module.inner, **shape, padding_mode=module.padding_mode)
            if module.padding_mode == "zeros":
                self.outward = nn.ConvTranspose2d(module.inner, module.channels, **shape, bias=False)
                weights = v, 2 * v
            else:
                self.outward = nn.Conv2d(module.inner, module.channels, **shape, bias=False, padding_mode="circular")
                weights = v, 2 * v.transpose(0, 1).flip(2, 3)
        for layer, weight in zip((self.inward, self.outward), weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())
        self.inward.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x - self.outward(F.relu(self.inward(x)))


def _pixel_unshuffle(module: pooling.InvertibleDownSampling) -> nn.Module:
    return nn.PixelUnshuffle(module.kernel_size)


def _pixel_shuffle(module: pooling.InvertibleUpSampling) -> nn.Module:
    return nn.PixelShuffle(module.kernel_size)


TWINS: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    activations.GroupSort: _GroupSort,
    activations.GroupSort2: _GroupSort,
    activations.MaxMin: _MaxMin,
    activations.MaxMinDouble: _MaxMinDouble,
    activations.FullSort: _FullSort,
    activations.Householder: _Householder,
    pooling.ScaledL2NormPool2d: _L2NormPool,
    pooling.GlobalL2NormPool2d: _L2NormPool,
    pooling.ScaledAvgPool2d: _ScaledAvgPool2d,
    pooling.GlobalAvgPool2d: _GlobalAvgPool2d,
    pooling.InvertibleDownSampling: _pixel_unshuffle,
    pooling.InvertibleUpSampling: _pixel_shuffle,
    blocks.Residual: _Residual,
    blocks.Patches: _Patches,
    blocks.PadChannels: _PadChannels,
    blocks.BatchCentering: _BatchCentering,
    blocks.SLL: _SLL,
    blocks.SLLLinear: _SLL,
}

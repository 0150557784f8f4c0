"""Affine layers with a bounded Lipschitz constant.

Every function here takes an ordinary `nn.Linear`, `nn.Conv2d` or `nn.ConvTranspose2d`, registers one small module on
its weight with `torch.nn.utils.parametrize`, and returns the same layer. The layer keeps its class, its forward and its
`state_dict`; `torch.nn.utils.parametrize.remove_parametrizations` or `lip.export` make it plain again.

A transposed convolution is the adjoint of the convolution with the same weight, so the two share norms and constraints.
The bias is a shift: it changes no distance and stays free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.layers.brick import Through, voucher
from lipguide.layers.constraints import AOL, Clip, Constraint, Scaled, Spectral, UnitRows
from lipguide.layers.geometry import Geometry
from lipguide.layers.norms import check_finite
from lipguide.layers.orthogonal import OrthogonalKernel, OrthogonalMatrix

__all__ = [
    "aol",
    "clip",
    "constrain_",
    "frobenius",
    "l2_normalized",
    "near_identity",
    "orthogonal",
    "spectral",
    "unit_rows",
]

AFFINE = {nn.Linear, nn.Conv2d, nn.ConvTranspose2d}
NEAR = 0.1  # of the weight that a layer came with, beside the identity


def geometry(layer: nn.Module) -> Geometry | None:
    """That of a convolution which can be constrained, None for a dense layer; else a `ValueError` that says why not.

    >>> geometry(nn.Conv2d(3, 8, 3, stride=2)).stride
    (2, 2)
    """
    name = type(layer).__name__
    kind = voucher(layer, AFFINE.__contains__) if isinstance(layer, nn.Module) else None
    if kind is None and isinstance(layer, tuple(AFFINE)):
        raise ValueError(
            f"{name} cannot be constrained: it changes what a layer of torch computes with its weight, so the norm of "
            "the weight says nothing about it; constrain a plain layer and call that from a module of your own"
        )
    if kind is None:
        raise ValueError(
            f"{name} cannot be constrained: only nn.Linear, nn.Conv2d and nn.ConvTranspose2d have a weight whose "
            "norm bounds the layer; build the block from those"
        )
    if next(layer.parameters()).is_complex():
        raise ValueError(
            f"{name} with a complex weight cannot be constrained: the norms here are those of real maps; use two real "
            "layers for the real and the imaginary part"
        )
    return None if kind is nn.Linear else _of_convolution(layer, name)


def _of_convolution(layer: nn.Conv2d | nn.ConvTranspose2d, name: str) -> Geometry:
    shape = Geometry.of(layer)
    if shape.mode not in ("zeros", "circular"):
        raise ValueError(
            f"{name} with padding_mode={shape.mode!r} cannot be constrained: the padding copies pixels and so "
            "adds to the norm; use padding_mode='zeros' or 'circular'"
        )
    if shape.sees_twice():
        raise ValueError(
            f"{name} with circular padding {layer.padding} and kernel {layer.kernel_size} sees some pixels twice; "
            "pad by at most dilation·(kernel − 1)/2 on each side"
        )
    return shape


def _register(layer: nn.Module, constraint: Constraint, refuse: Callable[..., None] | None = None) -> nn.Module:
    """Puts the constraint on the weight, and on the layer a hook that refuses pictures for which it would not hold."""
    if parametrize.is_parametrized(layer, "weight"):
        held = type(layer.parametrizations.weight[0]).__name__
        raise ValueError(
            f"{type(layer).__name__} is already constrained by {held}; remove it first with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    check_finite(layer.weight)
    if getattr(layer, "padding_mode", "zeros") == "circular":
        if refuse is not None:
            _refuse_with(layer, refuse)
        elif max(layer.stride) > 1:
            _refuse_with(layer, _refuse_odd_circle)
    parametrize.register_parametrization(layer, "weight", constraint.to(layer.weight.device))
    return layer


def _refuse_with(layer: nn.Module, hook: Callable[..., None]) -> None:
    if hook not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(hook, with_kwargs=True)


def _sides(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    picture = args[0] if args else kwargs["input"]
    height, width = picture.shape[-2:]
    return height, width


def _refuse_odd_circle(layer: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # On a circle whose side the stride does not divide, first and last output are nearer than one stride apart.
    shape = Geometry.of(layer)
    height, width = _sides(args, kwargs)
    if shape.mode == "circular" and not shape.divides((height, width)):
        rows, columns = (math.ceil(n / s) * s for n, s in zip((height, width), shape.stride, strict=True))
        raise ValueError(
            f"a circular convolution of stride {shape.stride} keeps its norm only on pictures whose sides the stride "
            f"divides, not on {height}×{width}; crop or pad to {rows}×{columns}"
        )


def _refuse_small_circle(layer: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Where two taps fall on the same pixel they add up, and the row is longer than its filter.
    shape = Geometry.of(layer)
    height, width = _sides(args, kwargs)
    if shape.taps_meet((height, width)):
        raise ValueError(
            f"on a circle of {height}×{width} pixels taps of the kernel {shape.kernel} with dilation {shape.dilation} "
            "fall on the same pixel and add up, so an output may stretch by more than 1; use padding_mode='zeros', a "
            "smaller kernel or larger pictures"
        )


class PlainCircle(nn.Module):
    """What `lip.export` puts in place of a circular convolution that refuses pictures: the layer and its refusals.

    Args:
        layer: the convolution, plain.
        strided: refuse sides that the stride does not divide.
        whole_rows: refuse sides on which two taps of one window meet.
    """

    def __init__(self, layer: nn.Conv2d, strided: bool, whole_rows: bool) -> None:
        super().__init__()
        self.layer = layer
        shape = Geometry.of(layer)
        self.stride = shape.stride if strided else (1, 1)
        self.refused: tuple[list[int], list[int]] = ([], [])
        if whole_rows:
            self.refused = (_meeting_sides(shape, 0), _meeting_sides(shape, 1))

    def forward(self, x: Tensor) -> Tensor:
        for axis in (0, 1):
            side, s = x.shape[axis - 2], self.stride[axis]
            torch._assert(side % s == 0, f"this circular convolution takes pictures whose sides {s} divides")
            for n in self.refused[axis]:
                torch._assert(side != n, f"on a circle of {n} pixels two taps of this convolution meet")
        return self.layer(x)

    def lipschitz(self, constant: float, through: Through) -> Any:
        return through(self.layer, constant)


def _meeting_sides(shape: Geometry, axis: int) -> list[int]:
    """The sides along an axis on which taps meet; they are at most as long as the kernel reaches."""
    roomy = shape.reach[1 - axis] + 1  # along the other axis none meet
    sides = range(1, shape.reach[axis] + 1)
    return [n for n in sides if shape.taps_meet((n, roomy) if axis == 0 else (roomy, n))]


def plain_circle(layer: nn.Module) -> PlainCircle | None:
    """The layer with its refusals as a module that can be traced, or None where it refuses nothing.

    >>> layer = spectral(nn.Conv2d(1, 1, 3, stride=2, padding=1, padding_mode="circular"))
    >>> plain_circle(layer).stride, plain_circle(nn.Conv2d(1, 1, 3))
    ((2, 2), None)
    """
    hooks = layer._forward_pre_hooks.values()
    strided, whole_rows = _refuse_odd_circle in hooks, _refuse_small_circle in hooks
    if getattr(layer, "padding_mode", "zeros") != "circular" or not (strided or whole_rows):
        return None
    return PlainCircle(layer, strided, whole_rows)


def clip(layer: nn.Module, limit: float) -> nn.Module:
    """Clip every weight to [−limit, limit], as the first Wasserstein GANs did.

    The layer's constant is then at most limit·√(n·m) for an n×m matrix: a certificate only for a small limit.

    >>> clip(nn.Linear(4, 4), 0.125).weight.abs().max().item() <= 0.125
    True
    """
    if not 0 < limit < math.inf:
        raise ValueError(f"limit={limit} clips nothing or everything; give a positive number such as 0.1")
    geometry(layer)
    return _register(layer, Clip(limit))


def frobenius(layer: nn.Module) -> nn.Module:
    """Divide the weight by its Frobenius norm: a sound and cheap bound that is far too small for most matrices.

    For a convolution ‖Ŵ(ω)‖ ≤ Σ_t ‖W_t‖ ≤ √T ‖W‖_F with T the taps that one output and one input phase share.

    >>> torch.linalg.matrix_norm(frobenius(nn.Linear(6, 3)).weight, ord=2).item() <= 1
    True
    """
    shape = geometry(layer)
    if shape is None:
        return _register(layer, Scaled())
    taps = shape.polyphase(torch.ones_like(layer.weight))  # (groups, outputs, inputs · phases, k₁, k₂)
    return _register(layer, Scaled(overlap=int(taps.amax((0, 1, 2)).sum())))


def l2_normalized(layer: nn.Module) -> nn.Module:
    """Divide the weight by its L2 norm: one reading of a layer of the case study; the other is `unit_rows`.

    For a dense layer this is `frobenius`. For a convolution the true norm may still reach √(taps): it is *not* a
    certificate by itself, and `lip.lipschitz_bound` says what it is worth.

    >>> round(l2_normalized(nn.Conv2d(3, 8, 3)).weight.norm().item(), 6)
    1.0
    """
    geometry(layer)
    return _register(layer, Scaled())


def unit_rows(layer: nn.Module) -> nn.Module:
    """Give each output's filter the L2 norm 1, for heads: certify with ‖w_k − w_j‖ (last-layer normalisation).

    Each output alone is 1-Lipschitz, the layer as a whole is not. The distance ‖w_k − w_j‖ bounds the difference of two
    outputs if their rows act on the same inputs in the same way: there are no groups, and the padding is of zeros, or
    circular on pictures where no two taps of the kernel meet. Others are refused. Where padding copies pixels (reflect,
    replicate), one pixel of the input enters a row several times, and the row is longer than its weight shows.

    >>> torch.allclose(unit_rows(nn.Linear(5, 3)).weight.norm(dim=1), torch.ones(3))
    True
    """
    shape = geometry(layer)
    if shape is not None and shape.groups > 1:
        raise ValueError(
            f"{type(layer).__name__} with groups={shape.groups} is no head for unit_rows: its rows see different "
            "channels, so ‖w_k − w_j‖ does not bound the difference of two outputs; use groups=1, or lip.spectral "
            "and √2 for any two outputs"
        )
    transposed = shape is not None and shape.transposed
    return _register(layer, UnitRows(transposed), refuse=_refuse_small_circle)


def aol(layer: nn.Module) -> nn.Module:
    """Rescale the inputs of the weight so that it is 1-Lipschitz, without any iteration (AOL).

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    >>> aol(layer).weight.detach()
    tensor([[0.7071, 0.5774],
            [0.0000, 0.5774]])
    """
    return _register(layer, AOL(geometry(layer)))


def spectral(layer: nn.Module) -> nn.Module:
    """Divide the weight by the spectral norm of the layer's linear map, so that the largest singular value is 1.

    The norm is that of the convolution, not of its reshaped weight, and holds for pictures of every size with zero or
    circular padding. In eval mode it is proved: never above 1, and above 0.99 on a 32×32 picture for 3×3 kernels.
    In training it is followed by power iteration and may lie a little above 1. The constraint is re-proved in float32;
    a layer cast to half precision keeps it up to its rounding.

    >>> layer = spectral(nn.Linear(4, 3)).eval()
    >>> round(torch.linalg.matrix_norm(layer.weight, ord=2).item(), 4)
    1.0
    """
    shape = geometry(layer)
    return _register(layer, Spectral(layer.weight, shape))


def orthogonal(layer: nn.Module) -> nn.Module:
    """Make every singular value 1: the layer preserves the norm of its input or, read backwards, of the gradient.

    Dense layers: exact. Convolutions: exact with circular padding at stride 1 and where the kernel covers the stride;
    zero padding cuts off what leaves the picture, so singular values there are at most 1.

    >>> layer = orthogonal(nn.Linear(4, 3))
    >>> torch.allclose(layer.weight @ layer.weight.mT, torch.eye(3), atol=1e-5)
    True
    """
    shape = geometry(layer)
    if shape is None:
        return _register(layer, OrthogonalMatrix())
    name = type(layer).__name__
    if shape.kernel[0] < shape.stride[0] or shape.kernel[1] < shape.stride[1]:
        raise ValueError(
            f"{name} with kernel {shape.kernel} and stride {shape.stride} skips pixels, so it cannot be orthogonal; "
            "use a kernel at least as large as the stride"
        )
    if max(shape.dilation) > 1 and max(shape.stride) > 1:
        raise ValueError(
            f"{name} with both stride {shape.stride} and dilation {shape.dilation} has no orthogonal construction "
            "here; use one of the two"
        )
    return _register(layer, OrthogonalKernel(layer.weight.shape, shape.stride, shape.groups))


@torch.no_grad()
def near_identity(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    r"""Begin a square layer near the identity, :math:`W = I + W_0 / 10`, with :math:`W_0` the weight that it came with.

    It goes inside a constraint: `lip.spectral(lip.near_identity(conv))` is the linear residual
    :math:`x + K * x` of Hu et al. (2023) over its norm.

    Args:
        layer: with as many outputs as inputs, and for a convolution a kernel of odd sides.

    >>> conv = near_identity(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    >>> x = torch.ones(1, 4, 8, 8)
    >>> bool((conv(x) - x).norm() < 0.2 * x.norm())
    True
    """
    weight = getattr(layer, "weight", None)
    if type(layer) not in (nn.Conv2d, nn.Linear) or parametrize.is_parametrized(layer):
        raise ValueError(
            f"near_identity begins a plain nn.Conv2d or nn.Linear, not {type(layer).__name__}: call it first"
        )
    if weight.shape[0] != weight.shape[1] or any(side % 2 == 0 for side in weight.shape[2:]):
        raise ValueError(
            f"no identity has a weight of {'×'.join(map(str, weight.shape))}: take as many outputs as inputs, one "
            "group and odd kernels"
        )
    begin = nn.init.eye_ if weight.dim() == 2 else nn.init.dirac_
    weight.mul_(NEAR).add_(begin(torch.empty_like(weight)))
    return layer


@torch.no_grad()
def constrain_(model: nn.Module, fn: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every affine layer's weight in place by the one that `fn` would give it; call after `optimizer.step()`.

    This is the other way to train under a constraint: projection instead of parametrization. Layers that share a weight
    are projected together if they ask for the same one; if not, none is changed and a `ValueError` names them.

    Args:
        model: any module; its nn.Linear, nn.Conv2d and nn.ConvTranspose2d layers are projected.
        fn: `lip.spectral`, `lip.frobenius`, … or a partial of one, such as `partial(lip.clip, limit=0.1)`.

    >>> net = constrain_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), spectral)
    >>> round(torch.linalg.matrix_norm(net[0].weight, ord=2).item(), 4)
    1.0
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, tuple(AFFINE))}
    twins = {name: _constrained_copy(layer, fn) for name, layer in layers.items()}
    wanted = {name: twin.weight.detach() for name, twin in twins.items()}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.copy_(wanted[name])
    # Whoever shares a weight, or memory, has now what the last of the sharers asked for.
    spoilt = [name for name, layer in layers.items() if not _same(layer.weight, wanted[name])]
    if spoilt:
        for name, layer in layers.items():
            layer.weight.copy_(before[name])
        raise ValueError(
            f"{', '.join(spoilt)} shares its weight with a layer that needs another projection of it, so no one weight "
            "serves both; constrain each layer by itself with a parametrization such as lip.spectral(layer), or give "
            "each a weight of its own"
        )
    for name, layer in layers.items():
        for hook in twins[name]._forward_pre_hooks.values():
            if hook in (_refuse_odd_circle, _refuse_small_circle):
                _refuse_with(layer, hook)
    return model


def _constrained_copy(layer: nn.Module, fn: Callable[[nn.Module], nn.Module]) -> nn.Module:
    twin = fn(copy.deepcopy(layer)).eval()
    if not getattr(twin.parametrizations.weight[0], "projects", True):
        raise ValueError(
            "an orthogonal convolution whose kernel is larger than its stride is built from factors and has no "
            "projection; use lip.orthogonal(layer) as a parametrization, or constrain_ with lip.spectral"
        )
    return twin


def _same(weight: Tensor, wanted: Tensor) -> bool:
    """Up to the rounding of two ways to compute it."""
    return torch.allclose(weight, wanted, rtol=8 * torch.finfo(weight.dtype).eps, atol=0)

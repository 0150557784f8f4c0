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

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.layers.constraints import AOL, Clip, Geometry, Scaled, Spectral, UnitRows
from lipguide.layers.norms import check_finite, polyphase
from lipguide.layers.orthogonal import OrthogonalKernel, OrthogonalMatrix

__all__ = [
    "aol",
    "clip",
    "constrain_",
    "frobenius",
    "l2_normalized",
    "orthogonal",
    "spectral",
    "unit_rows",
]


def geometry(layer: nn.Module) -> Geometry:
    """The geometry of a layer that can be constrained; anything else is a `ValueError` that says why.

    >>> geometry(nn.Conv2d(3, 8, 3, stride=2)).stride
    (2, 2)
    """
    name = type(layer).__name__
    if isinstance(layer, nn.Linear):
        return Geometry(dense=True, transposed=False)
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        raise ValueError(
            f"{name} cannot be constrained: only nn.Linear, nn.Conv2d and nn.ConvTranspose2d have a weight whose "
            "norm bounds the layer; build the block from those"
        )
    if layer.padding_mode == "circular":
        _check_circular(layer)
    elif layer.padding_mode != "zeros":
        raise ValueError(
            f"{name} with padding_mode={layer.padding_mode!r} cannot be constrained: the padding copies pixels and so "
            "adds to the norm; use padding_mode='zeros' or 'circular'"
        )
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return Geometry(False, transposed, tuple(layer.stride), tuple(layer.dilation), layer.groups)


def _check_circular(layer: nn.Conv2d) -> None:
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = _padding(layer, reach)
    if any(p > r for p, r in zip(padding, reach, strict=True)):
        raise ValueError(
            f"Conv2d with circular padding {layer.padding} and kernel {layer.kernel_size} sees some pixels twice; "
            "pad by at most dilation·(kernel − 1)/2 on each side"
        )


def _padding(layer: nn.Conv2d, reach: list[int]) -> list[int]:
    """Pixels added an axis, both sides together."""
    if isinstance(layer.padding, str):
        return reach if layer.padding == "same" else [0, 0]
    return [2 * p for p in layer.padding]


def _refuse_odd_circle(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    # On a circle whose side the stride does not divide, first and last output are nearer than one stride apart.
    height, width = inputs[0].shape[-2:]
    if height % layer.stride[0] or width % layer.stride[1]:
        raise ValueError(
            f"a circular convolution of stride {layer.stride} keeps its norm only on pictures whose sides the stride "
            f"divides, not on {height}×{width}; crop or pad to "
            f"{math.ceil(height / layer.stride[0]) * layer.stride[0]}×"
            f"{math.ceil(width / layer.stride[1]) * layer.stride[1]}"
        )


def _register(layer: nn.Module, constraint: nn.Module) -> nn.Module:
    if parametrize.is_parametrized(layer, "weight"):
        held = type(layer.parametrizations.weight[0]).__name__
        raise ValueError(
            f"{type(layer).__name__} is already constrained by {held}; remove it first with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    check_finite(layer.weight)
    if getattr(layer, "padding_mode", "zeros") == "circular" and max(layer.stride) > 1:
        layer.register_forward_pre_hook(_refuse_odd_circle)
    parametrize.register_parametrization(layer, "weight", constraint.to(layer.weight.device))
    return layer


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
    if shape.dense:
        return _register(layer, Scaled())
    taps = polyphase(torch.ones_like(layer.weight), shape.stride, shape.dilation, shape.groups)
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

    Each output alone is 1-Lipschitz, the layer as a whole is not.

    >>> torch.allclose(unit_rows(nn.Linear(5, 3)).weight.norm(dim=1), torch.ones(3))
    True
    """
    shape = geometry(layer)
    return _register(layer, UnitRows(shape.transposed, shape.groups))


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
    if shape.dense:
        return _register(layer, OrthogonalMatrix())
    name, kernel = type(layer).__name__, tuple(layer.kernel_size)
    if any(k < s for k, s in zip(kernel, shape.stride, strict=True)):
        raise ValueError(
            f"{name} with kernel {kernel} and stride {shape.stride} skips pixels, so it cannot be orthogonal; "
            "use a kernel at least as large as the stride"
        )
    if max(shape.dilation) > 1 and max(shape.stride) > 1:
        raise ValueError(
            f"{name} with both stride {shape.stride} and dilation {shape.dilation} has no orthogonal construction "
            "here; use one of the two"
        )
    return _register(layer, OrthogonalKernel(layer.weight.shape, shape.stride, shape.groups))


@torch.no_grad()
def constrain_(model: nn.Module, fn: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every affine layer's weight in place by the one that `fn` would give it; call after `optimizer.step()`.

    This is the other way to train under a constraint: projection instead of parametrization.

    Args:
        model: any module; its nn.Linear, nn.Conv2d and nn.ConvTranspose2d layers are projected.
        fn: `lip.spectral`, `lip.frobenius`, … or a partial of one, such as `partial(lip.clip, limit=0.1)`.

    >>> net = constrain_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), spectral)
    >>> round(torch.linalg.matrix_norm(net[0].weight, ord=2).item(), 4)
    1.0
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            twin = fn(copy.deepcopy(layer)).eval()
            if not getattr(twin.parametrizations.weight[0], "projects", True):
                raise ValueError(
                    "an orthogonal convolution whose kernel is larger than its stride is built from factors and has no "
                    "projection; use lip.orthogonal(layer) as a parametrization, or constrain_ with lip.spectral"
                )
            layer.weight.copy_(twin.weight)
    return model

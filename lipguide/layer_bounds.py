"""The Lipschitz constants of single layers: of plain torch layers and of lipguide's bricks.

A rule takes the layer and the shapes of its input and output, batch included, and returns an upper bound of the layer's
constant in the L2 norm. It speaks of eval mode and of exact arithmetic with the weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide import activations, blocks, pooling
from lipguide.constraints import Spectral
from lipguide.gram import GramScale
from lipguide.norms import CUSHION, conv_norm, matrix_norm, picture_norm

__all__ = ["BRICKS", "LAYERS", "Call", "NoBound"]

TOLERANCE = 2e-3  # of the bound for pictures of every size
LOOSE = 7e-3  # what that bound may lose on pictures of the size at hand before another is tried
DENSE = 1024  # inputs up to which a layer on a small picture is written out as a matrix


class Call(NamedTuple):
    """The shapes of a layer's input and output in one forward pass."""

    input: tuple[int, ...]
    output: tuple[int, ...]


class NoBound(Exception):
    """A layer, or something in a forward, that has no Lipschitz bound or none that is known; the text says why."""


def dense(layer: nn.Linear, call: Call) -> float:
    """σ_max of the weight.

    >>> round(dense(nn.Linear(2, 2), Call((1, 2), (1, 2))), 3) > 0
    True
    """
    return _proved(layer) or matrix_norm(layer.weight)


def convolution(layer: nn.Conv1d | nn.Conv2d, call: Call) -> float:
    """The norm of the convolution on pictures of the size at hand, within 1 % where that is 32×32 or more.

    >>> blur = nn.Conv2d(1, 1, 3, padding=1)
    >>> _ = nn.init.ones_(blur.weight)
    >>> 8.9 < convolution(blur, Call((1, 1, 32, 32), (1, 1, 32, 32))) < 9
    True
    """
    if known := _proved(layer):
        return known
    weight, stride, dilation, size, pixels = _as_pictures(layer, layer.weight, call.output, call.input)
    if layer.padding_mode == "zeros":
        if exact := _written_out(layer, F.conv2d, (weight, stride, dilation, size), call):
            return exact
        return _on_pictures(weight, size, stride, dilation, layer.groups)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pads = _pads(layer, reach)
    on_a_circle = all(sum(p) <= r and n % s == 0 for p, r, n, s in zip(pads, reach, pixels, stride, strict=True))
    if layer.padding_mode == "circular" and on_a_circle:
        circle = tuple(n // s for n, s in zip(pixels, stride, strict=True))
        return _on_pictures(weight, circle, stride, dilation, layer.groups, circular=True)
    # The padding copies pixels; the convolution without padding follows.
    flat = [p for axis in reversed(pads) for p in axis]
    copies = _nonnegative(lambda x: F.pad(x, flat, mode=layer.padding_mode), pixels)
    return copies * _on_pictures(weight, size, stride, dilation, layer.groups)


def transposed_convolution(layer: nn.ConvTranspose1d | nn.ConvTranspose2d, call: Call) -> float:
    """As for the convolution with the same weight, of which it is the adjoint.

    >>> spread = nn.ConvTranspose2d(1, 1, 2, stride=2)
    >>> _ = nn.init.ones_(spread.weight)
    >>> round(transposed_convolution(spread, Call((1, 1, 8, 8), (1, 1, 16, 16))), 3)
    2.0
    """
    if known := _proved(layer):
        return known
    weight, stride, dilation, size, _ = _as_pictures(layer, layer.weight, call.input, call.output)
    if exact := _written_out(layer, F.conv_transpose2d, (weight, stride, dilation, size), call):
        return exact
    return _on_pictures(weight, size, stride, dilation, layer.groups)


def _proved(layer: nn.Module) -> float | None:
    """The bound that `lip.spectral` has proved for this very weight: 1, and the rounding of its entries."""
    if not parametrize.is_parametrized(layer, "weight") or len(layer.parametrizations.weight) > 1:
        return None
    weight, constraint = layer.weight, layer.parametrizations.weight[0]
    if not isinstance(constraint, Spectral) or weight.dtype not in (torch.float32, torch.float64):
        return None
    # Entries off by a relative ε move the norm by at most ε √(taps · channels).
    terms = min(weight.shape[:2]) * math.prod(weight.shape[2:])
    return 1 + 2 * torch.finfo(weight.dtype).eps * math.sqrt(terms)


def _as_pictures(layer: nn.Module, weight: Tensor, size: tuple[int, ...], other: tuple[int, ...]):
    """Weight, stride, dilation and sizes, with a sequence as a picture of one row."""
    if weight.dim() == 4:
        return weight, tuple(layer.stride), tuple(layer.dilation), tuple(size[-2:]), tuple(other[-2:])
    return weight[:, :, None], (1, *layer.stride), (1, *layer.dilation), (1, size[-1]), (1, other[-1])


def _pads(layer: nn.Module, reach: list[int]) -> list[tuple[int, int]]:
    if layer.padding == "same":
        return [(r // 2, r - r // 2) for r in reach]
    if layer.padding == "valid":
        return [(0, 0) for _ in reach]
    padding = (0, *layer.padding) if len(layer.padding) == 1 else layer.padding
    return [(p, p) for p in padding]


def _on_pictures(
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    circular: bool = False,
) -> float:
    """The bound for this size of picture where it gains something, else the one for every size."""
    taps = [
        k if s == 1 else math.ceil((d * (k - 1) + 1) / s)
        for k, d, s in zip(weight.shape[2:], dilation, stride, strict=True)
    ]
    channels = min(weight.shape[0] // groups, weight.shape[1] * math.prod(stride))
    rows, columns = (n + (0 if circular else k - 1) for n, k in zip(size, taps, strict=True))
    frequencies = rows * (columns // 2 + 1)
    loose = _is_loose(taps, size)
    affordable = frequencies <= (64 if channels > 128 else 4096 if loose else 700)
    if taps != [1, 1] and affordable and (loose or channels <= 32):
        return picture_norm(weight, size, stride, dilation, groups, circular)
    return conv_norm(weight, stride, dilation, groups, TOLERANCE)


def _is_loose(taps: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Zero padding costs a k×k blur about (k² − 1)/12 · (π/(n + 1))² of its norm on n×n pixels, others mostly less."""
    return sum((k**2 - 1) / 24 * (math.pi / (n + 1)) ** 2 for k, n in zip(taps, size, strict=True)) > LOOSE


def _written_out(layer: nn.Module, operation: Callable, geometry: tuple, call: Call) -> float | None:
    """The exact norm of a convolution on a very small picture, from the matrix that it is."""
    weight, stride, dilation, size = geometry
    pixels = call.input[1:] if len(call.input) == 4 else (call.input[1], 1, call.input[2])
    if math.prod(pixels) > DENSE or not _is_loose(weight.shape[2:], size):
        return None
    extra = {"output_padding": _two(layer.output_padding)} if operation is F.conv_transpose2d else {}
    padding = layer.padding if isinstance(layer.padding, str) else _two(layer.padding)
    basis = torch.eye(math.prod(pixels), dtype=torch.float64, device=weight.device).reshape(-1, *pixels)
    kernel = weight.detach().double()
    matrix = operation(basis, kernel, stride=stride, padding=padding, dilation=dilation, groups=layer.groups, **extra)
    return matrix_norm(matrix.flatten(1))


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return (0, *value) if len(value) == 1 else tuple(value)


def batch_norm(layer: nn.modules.batchnorm._BatchNorm, call: Call) -> float:
    """max |γ| / √(running variance + ε): in eval mode batch norm is a scaling of each channel.

    >>> round(batch_norm(nn.BatchNorm2d(3).eval(), Call((1, 3, 4, 4), (1, 3, 4, 4))), 4)
    1.0
    """
    if layer.running_var is None:
        raise NoBound("it has no running statistics, so it divides by those of the batch and has no bound")
    scale = (layer.running_var.detach().double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double().abs()
    return float(scale.amax()) * (1 + CUSHION)


def nonnegative_linear(layer: nn.Module, call: Call) -> float:
    """For averages, repetitions and interpolations: exact, but for large pictures whose windows are uneven.

    There √(largest row sum · largest column sum) bounds the matrix, after Schur.

    >>> round(nonnegative_linear(nn.AvgPool2d(2), Call((1, 1, 4, 4), (1, 1, 2, 2))), 4)
    0.5
    """
    if getattr(layer, "mode", "nearest") == "bicubic":
        raise NoBound("bicubic interpolation has negative weights; use 'bilinear' or 'nearest'")
    return _nonnegative(layer, call.input[2:])


@torch.enable_grad()
def _nonnegative(operation: Callable[[Tensor], Tensor], pixels: tuple[int, ...]) -> float:
    ones = torch.ones(1, 1, *pixels, dtype=torch.float64, requires_grad=True)
    rows = operation(ones)
    (columns,) = torch.autograd.grad(rows.sum(), ones)
    even = all(bool(torch.allclose(sums, sums.flatten()[0], rtol=1e-12)) for sums in (rows, columns))
    if ones.numel() <= DENSE and not even:  # where all sums are equal Schur's bound is the norm
        basis = torch.eye(ones.numel(), dtype=torch.float64).reshape(-1, 1, *pixels)
        return matrix_norm(operation(basis).flatten(1))
    return math.sqrt(float(rows.detach().abs().max() * columns.abs().max())) * (1 + CUSHION)


def max_pool(layer: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, call: Call) -> float:
    """√(windows that share a pixel): 1 where the stride is the size.

    >>> max_pool(nn.MaxPool2d(3, 2, 1), Call((1, 1, 8, 8), (1, 1, 4, 4)))
    2.0
    """
    sizes, strides, dilations = (
        (value,) * (len(call.input) - 2) if isinstance(value, int) else value
        for value in (layer.kernel_size, layer.stride, layer.dilation)
    )
    # A pixel meets the windows at x − d·t, which must be multiples of the stride.
    shared = [math.ceil(k / (s // math.gcd(s, d))) for k, s, d in zip(sizes, strides, dilations, strict=True)]
    return math.sqrt(math.prod(shared))


def adaptive_max_pool(layer: nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d, call: Call) -> float:
    """√(windows that share a pixel).

    >>> adaptive_max_pool(nn.AdaptiveMaxPool2d(1), Call((1, 1, 7, 7), (1, 1, 1, 1)))
    1.0
    """
    shared = 1
    for n, out in zip(call.input[2:], call.output[2:], strict=True):
        windows = [(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]
        shared *= max(sum(low <= x < high for low, high in windows) for x in range(n))
    return math.sqrt(shared)


def isometry(layer: nn.Module, call: Call) -> float:
    """1: it moves, keeps, drops or shifts values.

    >>> isometry(nn.Identity(), Call((1, 2), (1, 2)))
    1.0
    """
    return 1.0


def flatten(layer: nn.Flatten, call: Call) -> float:
    """1, as long as samples stay apart.

    >>> flatten(nn.Flatten(), Call((1, 2, 3), (1, 6)))
    1.0
    """
    if layer.start_dim == 0:
        raise NoBound("it flattens the batch too; use start_dim=1")
    return 1.0


def softmax(layer: nn.Softmax, call: Call) -> float:
    """½: its Jacobian diag(p) − ppᵀ has no larger eigenvalue.

    >>> softmax(nn.Softmax(1), Call((1, 2), (1, 2)))
    0.5
    """
    if not layer.dim:
        raise NoBound("it normalises over the batch; give it dim=1")
    return 0.5


def sll(layer: blocks.SLL | blocks.SLLLinear, call: Call) -> float:
    """1 under its constraint; max(1, 2‖V‖² − 1) where V has become a plain weight.

    >>> sll(blocks.SLLLinear(4, 4), Call((1, 4), (1, 4)))
    1.0
    """
    if parametrize.is_parametrized(layer, "weight") and [type(p) for p in layer.parametrizations.weight] == [GramScale]:
        return 1.0
    norm = matrix_norm(layer.weight) if layer.weight.dim() == 2 else conv_norm(layer.weight)
    return max(1.0, 2 * norm**2 - 1)


def exported_sll(layer: nn.Module, call: Call) -> float:
    """max(1, ‖V‖‖2V‖ − 1) as exported, 1 + ‖V₁‖‖V₂‖ once the two layers have been trained apart."""
    inward, outward = (
        matrix_norm(part.weight) if isinstance(part, nn.Linear) else conv_norm(part.weight)
        for part in (layer.inward, layer.outward)
    )
    twin = layer.inward.weight
    if isinstance(layer.outward, nn.Linear):
        twin = twin.T
    elif isinstance(layer.outward, nn.Conv2d):
        twin = twin.transpose(0, 1).flip(2, 3)
    tied = torch.equal(2 * twin, layer.outward.weight)
    return max(1.0, inward * outward - 1) if tied else 1 + inward * outward


def exported_householder(layer: nn.Module, call: Call) -> float:
    """max(1, 2|v|² − 1) over the pairs."""
    squares = layer.v.detach().double().square().reshape(2, -1).sum(0)
    return max(1.0, float(2 * squares.max() - 1))


def _slope(value: float) -> Callable[[nn.Module, Call], float]:
    def rule(layer: nn.Module, call: Call) -> float:
        return value

    return rule


def _leaky(layer: nn.LeakyReLU, call: Call) -> float:
    return max(1.0, abs(layer.negative_slope))


def _prelu(layer: nn.PReLU, call: Call) -> float:
    return max(1.0, float(layer.weight.detach().abs().max()))


def _elu(layer: nn.ELU, call: Call) -> float:
    return max(1.0, abs(layer.alpha))


def _softplus(layer: nn.Softplus, call: Call) -> float:
    if layer.threshold < 16:  # torch goes over to x there, with a jump of log(1 + e^-threshold) / beta
        raise NoBound(f"it jumps at its threshold of {layer.threshold}; leave it at 20, where nothing is seen of it")
    return 1.0


def _rrelu(layer: nn.RReLU, call: Call) -> float:
    return max(1.0, abs(layer.lower + layer.upper) / 2)


LAYERS: dict[type[nn.Module], Callable[[nn.Module, Call], float]] = {
    nn.Linear: dense,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d), transposed_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), nonnegative_linear),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), nonnegative_linear),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), nonnegative_linear),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.CircularPad1d, nn.CircularPad2d), nonnegative_linear),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), nonnegative_linear),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), max_pool),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), adaptive_max_pool),
    **dict.fromkeys((nn.Identity, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), isometry),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), isometry),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d), isometry),
    nn.Flatten: flatten,
    # Activations: the largest slope.
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.CELU), _slope(1.0)),
    **dict.fromkeys((nn.Softshrink, nn.Tanhshrink, nn.LogSigmoid), _slope(1.0)),
    nn.Softplus: _softplus,
    nn.Sigmoid: _slope(0.25),
    nn.Hardsigmoid: _slope(0.1666667),
    nn.Softmax: softmax,
    nn.SELU: _slope(1.7581),
    nn.GELU: _slope(1.129),
    nn.SiLU: _slope(1.09984),
    nn.Mish: _slope(1.0885),
    nn.Hardswish: _slope(1.5),
    nn.LeakyReLU: _leaky,
    nn.PReLU: _prelu,
    nn.ELU: _elu,
    nn.RReLU: _rrelu,
    # lipguide's own
    **dict.fromkeys((activations.GroupSort, activations.MaxMin, activations.MaxMinDouble), _slope(1.0)),
    **dict.fromkeys((activations.FullSort, activations.Householder), _slope(1.0)),
    **dict.fromkeys((pooling.ScaledL2NormPool2d, pooling.ScaledAvgPool2d), _slope(1.0)),
    **dict.fromkeys((pooling.GlobalL2NormPool2d, pooling.GlobalAvgPool2d), _slope(1.0)),
    **dict.fromkeys((pooling.InvertibleDownSampling, pooling.InvertibleUpSampling), isometry),
    **dict.fromkeys((blocks.PadChannels, blocks.BatchCentering), isometry),
    **dict.fromkeys((blocks.SLL, blocks.SLLLinear), sll),
}

# What `lip.export` turned into graphs, by the name of the brick.
BRICKS: dict[str, Callable[[nn.Module, Call], float]] = {
    **dict.fromkeys(("GroupSort", "MaxMin", "MaxMinDouble", "FullSort", "PadChannels", "BatchCentering"), isometry),
    **dict.fromkeys(("L2NormPool", "ScaledAvgPool2d", "GlobalAvgPool2d"), isometry),
    "Householder": exported_householder,
    "SLL": exported_sll,
}

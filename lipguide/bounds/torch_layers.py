"""The Lipschitz constants of torch's own layers.

A rule takes the layer and the shapes of its input and output, batch included, and returns an upper bound of the layer's
constant in the L2 norm. It speaks of eval mode and of exact arithmetic with the weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lipguide.bounds.averages import nonnegative
from lipguide.bounds.calls import Call, NoBound, check_batched
from lipguide.bounds.convolutions import convolution, dense, transposed_convolution
from lipguide.layers.symbol import CUSHION

__all__ = ["LAYERS"]


def batch_norm(layer: nn.modules.batchnorm._BatchNorm, call: Call) -> float:
    """max |γ| / √(running variance + ε): in eval mode batch norm is a scaling of each channel.

    >>> round(batch_norm(nn.BatchNorm2d(3).eval(), Call((1, 3, 4, 4), (1, 3, 4, 4))), 4)
    1.0
    """
    if layer.running_var is None:
        raise NoBound("it has no running statistics, so it divides by those of the batch and has no bound")
    scale = (layer.running_var.detach().double() + layer.eps).rsqrt()
    if not bool(torch.isfinite(scale).all()):
        raise NoBound("a running variance of it is not above −eps, so it divides by zero or by no number at all")
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
    check_batched(layer, call)
    if 0 in call.output:  # a scale factor so small that no pixel is left
        return 0.0
    return nonnegative(layer, call.input[2:])


def circular_pad(layer: nn.CircularPad1d | nn.CircularPad2d, call: Call) -> float:
    """As for other copies of pixels, but torch fills a circle that grows at one end and is cut at another with noise.

    >>> round(circular_pad(nn.CircularPad1d(1), Call((1, 1, 4), (1, 1, 6))), 4)
    1.4142
    """
    if min(layer.padding) < 0 < max(layer.padding):
        raise NoBound(f"its padding {layer.padding} has both signs, where torch leaves values unset; crop with slices")
    return nonnegative_linear(layer, call)


def constant_pad(layer: nn.modules.padding._ConstantPadNd, call: Call) -> float:
    """1: the values of the border are constants, and the batch is not among the padded axes.

    >>> constant_pad(nn.ZeroPad2d(1), Call((1, 1, 4, 4), (1, 1, 6, 6)))
    1.0
    """
    if len(layer.padding) // 2 >= len(call.input):
        raise NoBound(f"it pads all axes of {call.input}, the batch too; give it an axis more")
    return 1.0


def max_pool(layer: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, call: Call) -> float:
    """√(windows that share a pixel): 1 where the stride is the size.

    >>> max_pool(nn.MaxPool2d(3, 2, 1), Call((1, 1, 8, 8), (1, 1, 4, 4)))
    2.0
    """
    _check_maxima(layer, call)
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
    _check_maxima(layer, call)
    shared = 1
    for n, out in zip(call.input[2:], call.output[2:], strict=True):
        windows = [(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]
        shared *= max(sum(low <= x < high for low, high in windows) for x in range(n))
    return math.sqrt(shared)


def norm_pool(layer: nn.LPPool1d | nn.LPPool2d, call: Call) -> float:
    """√ of the largest Σ c_w over the windows w that share a pixel: 1 where the stride is the size.

    The norm of a window moves no further than the window does. With `ceil_mode` torch takes the mean square of the n
    pixels that a window at the border has, times the k of a whole window: c_w = k / n, and 1 elsewhere.

    >>> norm_pool(nn.LPPool2d(2, 2), Call((1, 1, 4, 4), (1, 1, 2, 2)))
    1.0
    >>> norm_pool(nn.LPPool2d(2, 2, ceil_mode=True), Call((1, 1, 5, 5), (1, 1, 3, 3)))
    2.0
    """
    check_batched(layer, call)
    if layer.norm_type != 2:
        raise NoBound(f"it takes norms of order {layer.norm_type}, which is known for 2 only; give it norm_type=2")
    sizes, strides = (
        (value,) * (len(call.input) - 2) if isinstance(value, int) else value
        for value in (layer.kernel_size, layer.stride or layer.kernel_size)
    )
    squared = 1.0
    for n, out, size, stride in zip(call.input[2:], call.output[2:], sizes, strides, strict=True):
        windows = [(i * stride, min(i * stride + size, n)) for i in range(out)]
        squared *= max(sum(size / (high - low) for low, high in windows if low <= x < high) for x in range(n))
    return math.sqrt(squared)


def _check_maxima(layer: nn.Module, call: Call) -> None:
    check_batched(layer, call)
    if layer.return_indices:
        raise NoBound("it returns the places of the maxima, which jump; set return_indices=False")


def isometry(layer: nn.Module, call: Call) -> float:
    """1: it moves, keeps, drops or shifts values.

    >>> all(LAYERS[kind] is isometry for kind in (nn.Identity, nn.Dropout, nn.PixelShuffle))
    True
    """
    return 1.0


def flatten(layer: nn.Flatten, call: Call) -> float:
    """1, as long as samples stay apart.

    >>> flatten(nn.Flatten(), Call((1, 2, 3), (1, 6)))
    1.0
    """
    if layer.start_dim % len(call.input) == 0:
        raise NoBound("it flattens the batch too; use start_dim=1")
    return 1.0


def unflatten(layer: nn.Unflatten, call: Call) -> float:
    """1, as long as samples stay apart.

    >>> unflatten(nn.Unflatten(1, (2, 3)), Call((1, 6), (1, 2, 3)))
    1.0
    """
    if isinstance(layer.dim, int) and layer.dim % len(call.input) == 0:
        raise NoBound("it cuts up the batch; use dim=1")
    return 1.0


def softmax(layer: nn.Softmax, call: Call) -> float:
    """½: its Jacobian diag(p) − ppᵀ has no larger eigenvalue.

    >>> softmax(nn.Softmax(1), Call((1, 2), (1, 2)))
    0.5
    """
    _check_dimension(layer, call)
    return 0.5


def log_softmax(layer: nn.LogSoftmax, call: Call) -> float:
    """√C for C values: its Jacobian I − 1pᵀ is a projection and has the norm of the other one, ‖1‖ ‖p‖ ≤ √C.

    >>> log_softmax(nn.LogSoftmax(1), Call((1, 4), (1, 4)))
    2.0
    """
    _check_dimension(layer, call)
    return math.sqrt(call.input[layer.dim])


def _check_dimension(layer: nn.Softmax | nn.LogSoftmax, call: Call) -> None:
    if layer.dim is None or layer.dim % len(call.input) == 0:
        raise NoBound("it normalises over the batch; give it dim=1")


def _slope(value: float) -> Callable[[nn.Module, Call], float]:
    def rule(layer: nn.Module, call: Call) -> float:
        return value

    return rule


def _at_least_one(slope: float) -> float:
    if not math.isfinite(slope):  # max(1, NaN) would be 1
        raise NoBound(f"its slope is {slope}")
    return max(1.0, abs(slope))


def _leaky(layer: nn.LeakyReLU, call: Call) -> float:
    return _at_least_one(layer.negative_slope)


def _prelu(layer: nn.PReLU, call: Call) -> float:
    return _at_least_one(float(layer.weight.detach().abs().max()))


def _elu(layer: nn.ELU, call: Call) -> float:
    return _at_least_one(layer.alpha)


def _celu(layer: nn.CELU, call: Call) -> float:
    if not layer.alpha > 0:
        raise NoBound(f"with alpha={layer.alpha} its slope exp(x/alpha) grows without end; give it a positive alpha")
    return 1.0


def _softplus(layer: nn.Softplus, call: Call) -> float:
    if not torch.finfo(torch.float32).tiny <= abs(layer.beta) < math.inf:
        raise NoBound(f"with beta={layer.beta} torch divides by it and gives infinite values or NaN; give it beta=1")
    if not layer.threshold >= 16:  # torch goes over to x there, with a jump of log(1 + e^-threshold) / beta
        raise NoBound(f"it jumps at its threshold of {layer.threshold}; leave it at 20, where nothing is seen of it")
    return 1.0


def _rrelu(layer: nn.RReLU, call: Call) -> float:
    return _at_least_one((layer.lower + layer.upper) / 2)


LAYERS: dict[type[nn.Module], Callable[[nn.Module, Call], float]] = {
    nn.Linear: dense,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d), transposed_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), batch_norm),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), nonnegative_linear),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), nonnegative_linear),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), nonnegative_linear),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), nonnegative_linear),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d), circular_pad),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), nonnegative_linear),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), max_pool),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), adaptive_max_pool),
    **dict.fromkeys((nn.LPPool1d, nn.LPPool2d), norm_pool),
    **dict.fromkeys((nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), isometry),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), isometry),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d), constant_pad),
    nn.Flatten: flatten,
    nn.Unflatten: unflatten,
    # Activations: the largest slope.
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign), _slope(1.0)),
    **dict.fromkeys((nn.Softshrink, nn.Tanhshrink, nn.LogSigmoid), _slope(1.0)),
    nn.Softplus: _softplus,
    nn.Sigmoid: _slope(0.25),
    nn.Hardsigmoid: _slope(0.1666667),
    nn.Softmax: softmax,
    nn.LogSoftmax: log_softmax,
    nn.SELU: _slope(1.7581),
    nn.GELU: _slope(1.129),
    nn.SiLU: _slope(1.09984),
    nn.Mish: _slope(1.0885),
    nn.Hardswish: _slope(1.5),
    nn.LeakyReLU: _leaky,
    nn.PReLU: _prelu,
    nn.ELU: _elu,
    nn.CELU: _celu,
    nn.RReLU: _rrelu,
}

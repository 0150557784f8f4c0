"""The Lipschitz constants of affine layers: dense ones, convolutions, and whatever averages or copies.

All of them speak of exact arithmetic with the weights as they are, and of the layer's geometry as it is now: a
constraint vouches for a layer only as long as nobody has changed that since.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.bounds.averages import DENSE, nonnegative
from lipguide.bounds.calls import Call, check_batched
from lipguide.layers.constraints import Spectral
from lipguide.layers.geometry import Geometry
from lipguide.layers.norms import conv_norm, matrix_norm, picture_norm

__all__ = ["convolution", "dense", "transposed_convolution"]

TOLERANCE = 2e-3  # of the bound for pictures of every size
LOOSE = 7e-3  # what that bound may lose on pictures of the size at hand before another is tried

# A bound for the size at hand takes an eigenvalue problem at each frequency of a circle. Seconds on one core for 3×3
# kernels, of the bound for every size and of the one for the size at hand:
#     192 channels, 40 frequencies:   4.3 and 1.9        64 channels, 2112 frequencies: 1.1 and 8.4
#     128 channels, 703 frequencies:  5.9 and 10.2       32 channels, 703 frequencies:  0.5 and 1.1
# So it may cost twice as much where it gains little, and up to some ten times as much where it gains more than LOOSE.
MANY_CHANNELS = 128
FREQUENCIES_MANY_CHANNELS = 64  # at most this many where there are more than MANY_CHANNELS
FREQUENCIES_LOOSE = 4096  # where the bound for every size loses more than LOOSE
FREQUENCIES = 700  # else
FEW_CHANNELS = 32  # up to which the bound for the size at hand is taken although it gains little


def dense(layer: nn.Linear, call: Call) -> float:
    """σ_max of the weight.

    >>> stretching = nn.Linear(2, 2)
    >>> stretching.weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    >>> round(dense(stretching, Call((1, 2), (1, 2))), 5)
    5.0
    """
    weight = layer.weight
    if known := _proved(layer, weight, call):
        return known
    return matrix_norm(weight)


def convolution(layer: nn.Conv1d | nn.Conv2d, call: Call) -> float:
    """The norm of the convolution on pictures of the size at hand.

    It is within 1 % of the truth where these are 32×32 or more, kernels 7×7 or less, the padding is of zeros or a
    complete circle, and nothing is dilated. Elsewhere it is looser. A dilation of d makes the picture d times smaller.
    Padding that copies pixels (reflect, replicate, a circle that is cut off) and the convolution behind it are bounded
    one by one, which may cost a factor of two or more.

    >>> blur = nn.Conv2d(1, 1, 3, padding=1)
    >>> _ = nn.init.ones_(blur.weight)
    >>> 8.9 < convolution(blur, Call((1, 1, 32, 32), (1, 1, 32, 32))) < 9
    True
    """
    check_batched(layer, call)
    weight = layer.weight
    if known := _proved(layer, weight, call):
        return known
    geometry = Geometry.of(layer, weight)
    weight = _as_picture(weight)
    pixels = _sides(call.input)
    size = _sides(call.output)
    if geometry.mode == "zeros":
        if _is_written_out(geometry, size, call):
            return _written_out(layer, weight, geometry, call)
        return _on_pictures(weight, geometry, size)
    if geometry.is_circle(pixels):
        s1, s2 = geometry.stride
        circle = pixels[0] // s1, pixels[1] // s2
        return _on_pictures(weight, geometry, circle, circular=True)
    # The padding copies pixels; the convolution without padding follows.
    rows, columns = geometry.copied
    copies = nonnegative(lambda x: F.pad(x, (*columns, *rows), mode=geometry.mode), pixels)
    return copies * _on_pictures(weight, geometry, size)


def transposed_convolution(layer: nn.ConvTranspose1d | nn.ConvTranspose2d, call: Call) -> float:
    """As for the convolution with the same weight, of which it is the adjoint.

    >>> spread = nn.ConvTranspose2d(1, 1, 2, stride=2)
    >>> _ = nn.init.ones_(spread.weight)
    >>> round(transposed_convolution(spread, Call((1, 1, 8, 8), (1, 1, 16, 16))), 3)
    2.0
    """
    check_batched(layer, call)
    weight = layer.weight
    if known := _proved(layer, weight, call):
        return known
    geometry = Geometry.of(layer, weight)
    weight = _as_picture(weight)
    size = _sides(call.input)  # of the outputs of the convolution whose adjoint this is
    if _is_written_out(geometry, size, call):
        return _written_out(layer, weight, geometry, call)
    return _on_pictures(weight, geometry, size)


def _proved(layer: nn.Module, weight: Tensor, call: Call) -> float | None:
    """The bound that `lip.spectral` has proved for this very weight: 1, and the rounding of its entries."""
    if not parametrize.is_parametrized(layer, "weight") or len(layer.parametrizations.weight) > 1:
        return None
    constraint = layer.parametrizations.weight[0]
    if type(constraint) is not Spectral or weight.dtype not in (torch.float32, torch.float64):
        return None
    if not _as_constrained(layer, weight, constraint, call) or not constraint.vouches_for(weight):
        return None
    # Entries off by a relative ε move the norm by at most ε √(taps · channels).
    terms = min(weight.shape[:2]) * math.prod(weight.shape[2:])
    return 1 + 2 * torch.finfo(weight.dtype).eps * math.sqrt(terms)


def _as_constrained(layer: nn.Module, weight: Tensor, constraint: Spectral, call: Call) -> bool:
    """Does the layer still have the geometry that the proof was made for?"""
    if constraint.geometry is None:
        return isinstance(layer, nn.Linear)
    if isinstance(layer, nn.Linear):
        return False
    geometry = Geometry.of(layer, weight)
    kept = geometry.mode == "zeros" or geometry.is_circle(_sides(call.input))
    return kept and geometry.lattice == constraint.geometry.lattice


def _as_picture(weight: Tensor) -> Tensor:
    """A kernel of one axis as one of two axes, with a single row."""
    return weight[:, :, None] if weight.dim() == 3 else weight


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a batch of pictures, or of sequences as pictures of one row."""
    return (shape[-2], shape[-1]) if len(shape) == 4 else (1, shape[-1])


def _on_pictures(weight: Tensor, geometry: Geometry, size: tuple[int, int], circular: bool = False) -> float:
    """The bound for this size of picture where it gains something and is not too dear, else the one for every size."""
    arguments = geometry.stride, geometry.dilation, geometry.groups
    if _is_worth_its_size(weight, geometry, size, circular):
        return picture_norm(weight, size, *arguments, circular)
    return conv_norm(weight, *arguments, TOLERANCE)


def _is_worth_its_size(weight: Tensor, geometry: Geometry, size: tuple[int, int], circular: bool) -> bool:
    taps = _taps(geometry)
    if taps == (1, 1):
        return False
    rows, columns = size
    if not circular:
        size = geometry.apart(size)
        rows = size[0] + taps[0] - 1
        columns = size[1] + taps[1] - 1
    frequencies = rows * (columns // 2 + 1)
    outputs = weight.shape[0] // geometry.groups
    inputs = weight.shape[1] * math.prod(geometry.stride)  # of the kernel on interleaved pictures
    channels = min(outputs, inputs)
    loose = _is_loose(taps, size)
    if channels > MANY_CHANNELS:
        affordable = FREQUENCIES_MANY_CHANNELS
    elif loose:
        affordable = FREQUENCIES_LOOSE
    else:
        affordable = FREQUENCIES
    return frequencies <= affordable and (loose or channels <= FEW_CHANNELS)


def _taps(geometry: Geometry) -> tuple[int, int]:
    """Taps of the kernel on interleaved pictures; those that a dilation skips at stride 1 are not counted."""
    rows, columns = geometry.phased_kernel
    if geometry.stride[0] == 1:
        rows = geometry.kernel[0]
    if geometry.stride[1] == 1:
        columns = geometry.kernel[1]
    return rows, columns


def _is_loose(taps: tuple[int, int], size: tuple[int, int]) -> bool:
    """Zero padding costs a k×k blur about (k² − 1)/12 · (π/(n + 1))² of its norm on n×n pixels, others mostly less."""
    loss = 0.0
    for k, n in zip(taps, size, strict=True):
        lowest = math.pi / (n + 1)  # the lowest frequency of a picture that is zero outside
        loss += (k**2 - 1) / 24 * lowest**2
    return loss > LOOSE


def _is_written_out(geometry: Geometry, size: tuple[int, int], call: Call) -> bool:
    return math.prod(call.input[1:]) <= DENSE and _is_loose(geometry.kernel, geometry.apart(size))


def _written_out(layer: nn.Module, weight: Tensor, geometry: Geometry, call: Call) -> float:
    """The exact norm of a convolution on a very small picture, from the matrix that it is."""
    channels, (rows, columns) = call.input[1], _sides(call.input)
    unit = torch.eye(channels * rows * columns, dtype=torch.float64, device=weight.device)
    basis = unit.reshape(-1, channels, rows, columns)
    kernel = weight.detach().double()
    padding = layer.padding if isinstance(layer.padding, str) else _on_two_axes(layer.padding)
    if geometry.transposed:
        extra = _on_two_axes(layer.output_padding)
        images = F.conv_transpose2d(
            basis, kernel, None, geometry.stride, padding, extra, geometry.groups, geometry.dilation
        )
    else:
        images = F.conv2d(basis, kernel, None, geometry.stride, padding, geometry.dilation, geometry.groups)
    return matrix_norm(images.flatten(1))


def _on_two_axes(padding: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Padding as a picture has it; a sequence is one row, which is not padded."""
    if isinstance(padding, int):
        return padding
    return (0, *padding) if len(padding) == 1 else tuple(padding)

"""The Lipschitz constants of affine layers: dense ones, convolutions, and whatever averages or copies.

All of them speak of exact arithmetic with the weights as they are, and of the layer's geometry as it is now: a
constraint vouches for a layer only as long as nobody has changed that since.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.layers.affine import geometry
from lipguide.layers.constraints import Spectral
from lipguide.layers.norms import CUSHION, conv_norm, matrix_norm, picture_norm

__all__ = ["Call", "NoBound", "check_batched", "convolution", "dense", "nonnegative", "transposed_convolution"]

TOLERANCE = 2e-3  # of the bound for pictures of every size
LOOSE = 7e-3  # what that bound may lose on pictures of the size at hand before another is tried
DENSE = 1024  # inputs up to which a layer on a small picture is written out as a matrix


class Call(NamedTuple):
    """The shapes of a layer's input and output in one forward pass."""

    input: tuple[int, ...]
    output: tuple[int, ...]


class NoBound(Exception):
    """A layer, or something in a forward, that has no Lipschitz bound or none that is known; the text says why."""


def check_batched(layer: nn.Module, call: Call) -> None:
    """A layer named …2d takes (C, H, W) for one sample, where the pictures at hand were meant as (N, H, W).

    >>> check_batched(nn.MaxPool2d(3), Call((1, 8, 8), (1, 2, 2)))
    Traceback (most recent call last):
    lipguide.bounds.convolutions.NoBound: it gets (1, 8, 8), which it takes for one sample ...
    """
    names = (re.search(r"([123])d$", kind.__name__) for kind in type(layer).__mro__)
    axes = next((int(name[1]) for name in names if name), None)
    if axes is not None and len(call.input) != axes + 2:
        wanted = ", ".join(("N", "C", *"DHW"[3 - axes :])) if axes > 1 else "N, C, L"
        raise NoBound(
            f"it gets {call.input}, which it takes for one sample of {call.input[0]} channels; give it ({wanted})"
        )


def dense(layer: nn.Linear, call: Call) -> float:
    """σ_max of the weight.

    >>> round(dense(nn.Linear(2, 2), Call((1, 2), (1, 2))), 3) > 0
    True
    """
    return _proved(layer, call) or matrix_norm(layer.weight)


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
    if known := _proved(layer, call):
        return known
    weight, stride, dilation, size, pixels = _as_pictures(layer, layer.weight, call.output, call.input)
    if layer.padding_mode == "zeros":
        if exact := _written_out(layer, F.conv2d, (weight, stride, dilation, size), call):
            return exact
        return _on_pictures(weight, size, stride, dilation, layer.groups)
    if _on_a_circle(layer, call):
        circle = tuple(n // s for n, s in zip(pixels, stride, strict=True))
        return _on_pictures(weight, circle, stride, dilation, layer.groups, circular=True)
    # The padding copies pixels; the convolution without padding follows.
    flat = [p for axis in reversed(_pads(layer)) for p in axis]
    copies = nonnegative(lambda x: F.pad(x, flat, mode=layer.padding_mode), pixels)
    return copies * _on_pictures(weight, size, stride, dilation, layer.groups)


def transposed_convolution(layer: nn.ConvTranspose1d | nn.ConvTranspose2d, call: Call) -> float:
    """As for the convolution with the same weight, of which it is the adjoint.

    >>> spread = nn.ConvTranspose2d(1, 1, 2, stride=2)
    >>> _ = nn.init.ones_(spread.weight)
    >>> round(transposed_convolution(spread, Call((1, 1, 8, 8), (1, 1, 16, 16))), 3)
    2.0
    """
    check_batched(layer, call)
    if known := _proved(layer, call):
        return known
    weight, stride, dilation, size, _ = _as_pictures(layer, layer.weight, call.input, call.output)
    if exact := _written_out(layer, F.conv_transpose2d, (weight, stride, dilation, size), call):
        return exact
    return _on_pictures(weight, size, stride, dilation, layer.groups)


def _proved(layer: nn.Module, call: Call) -> float | None:
    """The bound that `lip.spectral` has proved for this very weight: 1, and the rounding of its entries."""
    if not parametrize.is_parametrized(layer, "weight") or len(layer.parametrizations.weight) > 1:
        return None
    weight, constraint = layer.weight, layer.parametrizations.weight[0]
    if type(constraint) is not Spectral or weight.dtype not in (torch.float32, torch.float64):
        return None
    if not _as_constrained(layer, constraint, call):
        return None
    # Entries off by a relative ε move the norm by at most ε √(taps · channels).
    terms = min(weight.shape[:2]) * math.prod(weight.shape[2:])
    return 1 + 2 * torch.finfo(weight.dtype).eps * math.sqrt(terms)


def _as_constrained(layer: nn.Module, constraint: Spectral, call: Call) -> bool:
    """Does the layer still have the geometry that the proof was made for?"""
    try:
        same = geometry(layer) == constraint.shape
    except (ValueError, TypeError):  # a geometry that could not be constrained at all
        return False
    return same and (getattr(layer, "padding_mode", "zeros") == "zeros" or _on_a_circle(layer, call))


def _on_a_circle(layer: nn.Conv1d | nn.Conv2d, call: Call) -> bool:
    """Is the padding circular, without a pixel that is seen twice, and does the stride divide the sides?"""
    if layer.padding_mode != "circular":
        return False
    weight, stride, dilation, _, pixels = _as_pictures(layer, layer.weight, call.output, call.input)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sides = zip(_pads(layer), reach, pixels, stride, strict=True)
    return all(sum(pads) <= r and n % s == 0 for pads, r, n, s in sides)


def _as_pictures(layer: nn.Module, weight: Tensor, size: tuple[int, ...], other: tuple[int, ...]):
    """Weight, stride, dilation and sizes, with a sequence as a picture of one row."""
    axes = weight.dim() - 2
    stride, dilation = (
        (value,) * axes if isinstance(value, int) else tuple(value) for value in (layer.stride, layer.dilation)
    )
    if axes == 2:
        return weight, stride, dilation, tuple(size[-2:]), tuple(other[-2:])
    return weight[:, :, None], (1, *stride), (1, *dilation), (1, size[-1]), (1, other[-1])


def _pads(layer: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """What the forward pads with, for each axis of a picture; `layer.padding` may have been changed since."""
    flat = layer._reversed_padding_repeated_twice
    pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
    return pairs if len(pairs) == 2 else [(0, 0), *pairs]


def _on_pictures(
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    circular: bool = False,
) -> float:
    """The bound for this size of picture where it gains something and is not too dear, else the one for every size."""
    if not circular:
        size, dilation = _undilated(size, stride, dilation)
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


def _undilated(
    size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """At stride 1 dilation d splits a picture into d smaller ones that do not meet: their size, and what is left."""
    axes = list(zip(size, stride, dilation, strict=True))
    return tuple(math.ceil(n / d) if s == 1 else n for n, s, d in axes), tuple(1 if s == 1 else d for _, s, d in axes)


def _is_loose(taps: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Zero padding costs a k×k blur about (k² − 1)/12 · (π/(n + 1))² of its norm on n×n pixels, others mostly less."""
    return sum((k**2 - 1) / 24 * (math.pi / (n + 1)) ** 2 for k, n in zip(taps, size, strict=True)) > LOOSE


def _written_out(layer: nn.Module, operation: Callable, geometry: tuple, call: Call) -> float | None:
    """The exact norm of a convolution on a very small picture, from the matrix that it is."""
    weight, stride, dilation, size = geometry
    pixels = call.input[1:] if len(call.input) == 4 else (call.input[1], 1, call.input[2])
    if math.prod(pixels) > DENSE or not _is_loose(weight.shape[2:], _undilated(size, stride, dilation)[0]):
        return None
    extra = {"output_padding": _two(layer.output_padding)} if operation is F.conv_transpose2d else {}
    padding = layer.padding if isinstance(layer.padding, str) else _two(layer.padding)
    basis = torch.eye(math.prod(pixels), dtype=torch.float64, device=weight.device).reshape(-1, *pixels)
    kernel = weight.detach().double()
    matrix = operation(basis, kernel, stride=stride, padding=padding, dilation=dilation, groups=layer.groups, **extra)
    return matrix_norm(matrix.flatten(1))


def _two(value: int | tuple[int, ...]) -> int | tuple[int, int]:
    return value if isinstance(value, int) else (0, *value) if len(value) == 1 else tuple(value)


@torch.enable_grad()
def nonnegative(operation: Callable[[Tensor], Tensor], pixels: tuple[int, ...]) -> float:
    """The norm of a linear map of pictures whose entries have one sign; see `layer_bounds.nonnegative_linear`.

    >>> round(nonnegative(lambda x: F.pad(x, (1, 1), mode="replicate"), (3,)), 4)
    1.4142
    """
    ones = torch.ones(1, 1, *pixels, dtype=torch.float64, requires_grad=True)
    rows = operation(ones)
    (columns,) = torch.autograd.grad(rows.sum(), ones)
    even = all(bool(torch.allclose(sums, sums.flatten()[0], rtol=1e-12)) for sums in (rows, columns))
    if ones.numel() <= DENSE and not even:  # where all sums are equal Schur's bound is the norm
        basis = torch.eye(ones.numel(), dtype=torch.float64).reshape(-1, 1, *pixels)
        return matrix_norm(operation(basis).flatten(1))
    return math.sqrt(float(rows.detach().abs().max() * columns.abs().max())) * (1 + CUSHION)

"""Sound and tight norms of linear maps: what `lip.spectral` divides by and what `lip.lipschitz_bound` multiplies.

A convolution on the infinite grid is diagonal in frequency: at ω it multiplies by the matrix
Ŵ(ω) = Σ_t W_t e^{i⟨ω, t⟩}, so its norm is M = max_ω σ_max(Ŵ(ω)). Zero padding only restricts that map and circular
padding only samples its frequencies, so M bounds the layer on pictures of every size.

`torus` encloses M from both sides: a search finds it, a cover of all frequencies proves that there is no larger one.

On a *picture of given size* the norm is smaller, by several per cent where the picture is small or the kernel large.
Let x live on n₁×n₂ pixels and embed it in a circle of P = n + k − 1 pixels an axis, where nothing wraps around onto the
result. There ‖Wx‖² is the mean over the P₁P₂ frequencies of ‖Ŵ(ω) x̂(ω)‖² ≤ λ(ω) ‖x̂(ω)‖² with λ = σ_max², and that
mean is ⟨x, T x⟩ with T the n₁n₂×n₁n₂ matrix of entries λ̌(p − q), λ̌ being the inverse Fourier transform of λ. So the
largest eigenvalue of one small matrix bounds the layer: `picture_norm`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguide.layers.geometry import Geometry
from lipguide.layers.symbol import CUSHION, correlation_of, grams_at, row_sum_norm
from lipguide.layers.torus import torus_norm

__all__ = ["aol_norm", "check_finite", "conv_norm", "matrix_norm", "picture_norm"]

LEAST_TOLERANCE = 1e-6  # below it the first cells are millions, and the cushion is no longer small beside it
LARGEST_PICTURE = 2304  # pixels for which `picture_norm` solves an eigenvalue problem of that size

Pair = tuple[int, int]


def matrix_norm(weight: Tensor) -> float:
    """Upper bound of the largest singular value of a matrix, tight to 1e-7.

    >>> matrix_norm(torch.diag(torch.tensor([3.0, 4.0]))) >= 4.0
    True
    """
    check_finite(weight)
    matrix, scale = _at_scale_one(weight.detach().double())
    if not scale:
        return 0.0
    rows, columns = matrix.shape
    gram = matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return scale * math.sqrt(largest) * (1 + CUSHION)


def aol_norm(kernel: Tensor) -> float:
    """√ max_i Σ_j |K ⋆ K|_ij over a polyphase kernel: a cheap upper bound, exact for orthogonal convolutions.

    >>> delta = torch.zeros(1, 2, 2, 3, 3)
    >>> delta[0, 0, 0, 1, 1] = delta[0, 1, 1, 0, 2] = 1
    >>> round(aol_norm(delta), 6)
    1.0
    """
    return row_sum_norm(correlation_of(kernel.double()))


def conv_norm(
    weight: Tensor,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
    tolerance: float = 3e-3,
) -> float:
    """Upper bound of the norm of a convolution, for zero or circular padding and pictures of every size.

    It exceeds the norm on an infinitely large picture by at most the relative `tolerance`. The norm of a transposed
    convolution is that of the convolution with the same weight.

    Args:
        weight: the kernel (outputs, inputs / groups, height, width), as torch stores it.
        stride, dilation, groups: those of the layer.
        tolerance: how far above the true norm the bound may lie, relatively.

    >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
    >>> 1.0 <= conv_norm(blur) <= 1.003
    True
    """
    check_finite(weight)
    if not LEAST_TOLERANCE <= tolerance < math.inf:
        raise ValueError(
            f"tolerance is {tolerance}: the proof takes ever more time and memory as it shrinks; give one of "
            f"{LEAST_TOLERANCE} or more, such as 3e-3"
        )
    geometry = Geometry(tuple(weight.shape[2:]), stride, dilation, groups)
    geometry = geometry.undilated()
    kernel, scale = _at_scale_one(geometry.polyphase(weight.detach().double()))
    if not scale:
        return 0.0
    return scale * torus_norm(kernel, tolerance)


def picture_norm(
    weight: Tensor,
    size: Pair,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
    circular: bool = False,
) -> float:
    """Upper bound of the norm of a convolution whose outputs are pictures of a given size; tight for small pictures.

    With zero padding, any of it, the bound of the module's introduction: for 3×3 kernels within a thousandth of the
    norm from 16×16 pixels on. A convolution with circular padding that keeps the size (or divides it by the stride) is
    diagonal at the frequencies of its own circle, and the bound is its norm.

    Args:
        weight, stride, dilation, groups: as in `conv_norm`.
        size: rows and columns of the outputs; of the inputs if the layer is a transposed convolution.
        circular: whether the padding is circular and complete.

    >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
    >>> picture_norm(blur, (4, 4)) < 0.88 < picture_norm(blur, (4, 4), circular=True)
    True
    """
    check_finite(weight)
    geometry = Geometry(tuple(weight.shape[2:]), stride, dilation, groups)
    if not circular:
        size = geometry.apart(size)
        geometry = geometry.undilated()
    kernel, scale = _at_scale_one(geometry.polyphase(weight.detach().double()))
    if not scale:
        return 0.0
    if circular:
        squares = _squares_on_circle(kernel, size)
        largest = float(squares.amax())
    else:
        circle = size[0] + kernel.shape[3] - 1, size[1] + kernel.shape[4] - 1
        squares = _squares_on_circle(kernel, circle)
        largest = _largest_on_picture(squares, size)
    return scale * math.sqrt(max(0.0, largest)) * (1 + CUSHION)


def check_finite(weight: Tensor) -> None:
    """A NaN or an infinity in a weight has no norm: say so rather than certify it.

    >>> check_finite(torch.tensor([math.nan]))
    Traceback (most recent call last):
    ValueError: a weight of shape (1,) holds NaN or infinite values, so no norm can be certified; ...
    """
    if not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values, so no norm can be certified; "
            "the training that made it has diverged"
        )


def _at_scale_one(kernel: Tensor) -> tuple[Tensor, float]:
    """The kernel with a largest entry of 1, and what that was: a Gram matrix of others would leave float64's range."""
    if kernel.numel() == 0:
        return kernel, 0.0
    scale = float(kernel.abs().amax())
    if scale == 0:
        return kernel, 0.0
    return kernel / scale, scale


# Pictures of one size.


def _squares_on_circle(kernel: Tensor, circle: Pair) -> Tensor:
    """σ_max² at each frequency (p₁, p₂) of a circle, the largest over the groups."""
    rows, columns = circle
    half = columns // 2 + 1
    down = 2 * math.pi * torch.arange(rows, device=kernel.device).double() / rows
    across = 2 * math.pi * torch.arange(half, device=kernel.device).double() / columns
    frequencies = torch.cartesian_prod(down, across)  # (rows · half, 2)
    largest = []
    for gram in grams_at(frequencies, correlation_of(kernel)):  # (some frequencies, groups, n, n)
        eigenvalues = torch.linalg.eigvalsh(gram)  # (some frequencies, groups, n), in ascending order
        largest.append(eigenvalues[..., -1].amax(1))
    squares = torch.cat(largest).reshape(rows, half)
    # The other half mirrors this one: the symbol at −ω is the conjugate of that at ω.
    mirrored_rows = (-torch.arange(rows, device=kernel.device)) % rows
    others = squares[mirrored_rows, 1 : columns - half + 1].flip(1)
    return torch.cat((squares, others), 1)


def _largest_on_picture(squares: Tensor, size: Pair) -> float:
    """The largest eigenvalue of T, or where T would be large a bound of it from one axis alone."""
    rows, columns = size
    if rows * columns <= LARGEST_PICTURE:
        return _restricted(squares, size)
    # λ(ω) ≤ max over the other frequency
    rows_alone = _restricted(squares.amax(1)[:, None], (rows, 1))
    columns_alone = _restricted(squares.amax(0)[:, None], (columns, 1))
    return min(rows_alone, columns_alone)


def _restricted(squares: Tensor, size: Pair) -> float:
    """The largest eigenvalue of the circular convolution with symbol `squares`, restricted to pictures of `size`."""
    matrix = _toeplitz(squares, size)
    # Turning the picture by 180° changes nothing, so even and odd pictures can be treated apart, at half the size.
    n = len(matrix)
    turned = matrix.flip(1)
    even = (matrix + turned)[: n - n // 2, : n - n // 2]
    odd = (matrix - turned)[: n // 2, : n // 2]
    if n % 2:  # the pixel in the middle is its own partner
        even[-1] /= math.sqrt(2)
        even[:, -1] /= math.sqrt(2)
    largest = [float(torch.linalg.eigvalsh(part)[-1]) for part in (even, odd) if len(part)]
    return max(largest)


def _toeplitz(squares: Tensor, size: Pair) -> Tensor:
    """T, with λ̌(p − q) in row p and column q: a row and a column for each pixel."""
    filtered = torch.fft.ifft2(squares).real  # λ̌, (P₁, P₂)
    rows = _differences(size[0], squares.shape[0], squares.device)  # (n₁, n₁)
    columns = _differences(size[1], squares.shape[1], squares.device)  # (n₂, n₂)
    entries = filtered[rows[:, None, :, None], columns[None, :, None, :]]  # (n₁, n₂, n₁, n₂)
    return entries.reshape(math.prod(size), -1)


def _differences(n: int, period: int, device: torch.device) -> Tensor:
    """(p − q) mod period for places p and q below n."""
    places = torch.arange(n, device=device)
    return (places[:, None] - places) % period

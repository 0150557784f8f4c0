"""The symbol of a convolution, and the Gram matrices of it that the proofs of its norm look at.

On the infinite grid a convolution is diagonal in frequency: at ω it multiplies by its symbol, the matrix
Ŵ(ω) = Σ_t W_t e^{i⟨ω, t⟩}. Its Gram matrix is again a sum of waves, ŴŴᴴ = Σ_l G_l e^{i⟨ω, l⟩}, over the *lags*, the
differences of two taps. So the G_l are computed once, and every frequency is one matrix product more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["CUSHION", "MEMORY", "centred_places", "correlation_of", "filter_norm", "grams_at", "row_sum_norm"]

MEMORY = 2**21  # complex numbers held at once
CUSHION = 1e-7  # relative: far above the rounding of float64, far below any tolerance asked for


def correlation_of(kernel: Tensor) -> Tensor:
    """The taps G_l = Σ_s K_{s+l} K_sᵀ of ŴŴᴴ = Σ_l G_l e^{i⟨ω, l⟩}.

    Where there are fewer inputs than outputs, those of Ŵᵀ, which has the same norm.

    Args:
        kernel: (groups, outputs, inputs, k₁, k₂).

    Returns: (groups, n, n, 2k₁ − 1, 2k₂ − 1) with n the fewer of outputs and inputs; lag 0 is in the middle.

    >>> correlation_of(torch.ones(1, 2, 1, 1, 3))[0, 0, 0]
    tensor([[2., 4., 6., 4., 2.]])
    """
    outputs, inputs = kernel.shape[1:3]
    if inputs < outputs:
        kernel = kernel.transpose(1, 2)
    groups, n, _, height, width = kernel.shape
    stacked = kernel.permute(0, 3, 4, 1, 2).flatten(1, 3)  # (groups, taps · n, m)
    lags = kernel.new_zeros(groups, 2 * height - 1, 2 * width - 1, n, n)
    for row in range(height):
        for column in range(width):
            tap = kernel[:, :, :, row, column]  # (groups, n, m)
            products = stacked @ tap.mT  # (groups, taps · n, n)
            products = products.reshape(groups, height, width, n, n)
            # K_{s+l} K_sᵀ with s = (row, column) belongs to the lags l = −s … (height, width) − 1 − s.
            down = height - 1 - row
            across = width - 1 - column
            lags[:, down : down + height, across : across + width] += products
    return lags.permute(0, 3, 4, 1, 2)


def row_sum_norm(correlation: Tensor) -> float:
    """√ max_i Σ_j Σ_l |G_l|_ij: an upper bound of the norm, since no row of ŴŴᴴ sums up to more at any frequency.

    >>> round(row_sum_norm(correlation_of(torch.ones(1, 1, 1, 1, 3))), 6)
    3.0
    """
    sums = correlation.abs().sum((2, 3, 4))  # (groups, n)
    return math.sqrt(float(sums.amax())) * (1 + CUSHION)


def filter_norm(correlation: Tensor) -> float:
    """The norm of the largest single filter, which is a lower bound of the norm: what an impulse becomes.

    >>> round(filter_norm(correlation_of(torch.ones(1, 1, 1, 1, 3))) ** 2, 6)
    3.0
    """
    rows, columns = correlation.shape[3:]
    at_lag_zero = correlation[..., rows // 2, columns // 2]  # (groups, n, n)
    squares = at_lag_zero.diagonal(dim1=1, dim2=2)  # (groups, n)
    return math.sqrt(float(squares.amax()))


def grams_at(cells: Tensor, correlation: Tensor) -> Iterator[Tensor]:
    """ŴᴴŴ or ŴŴᴴ at some frequencies.

    Args:
        cells: the frequencies, (cells, 2).
        correlation: of the kernel, (groups, n, n, lags₁, lags₂).

    Returns: pieces of shape (some cells, groups, n, n), of a size that memory can hold.

    >>> (gram,) = grams_at(torch.zeros(1, 2).double(), correlation_of(torch.ones(1, 1, 1, 1, 3).double()))
    >>> gram.real.flatten()
    tensor([9.], dtype=torch.float64)
    """
    groups, n, _, height, width = correlation.shape
    # G_{−l} = G_lᵀ, so one half of the lags will do: cosines for the symmetric part, sines for the other.
    lags = centred_places(height, width, cells.device)  # (lags, 2)
    middle = len(lags) // 2
    lags = lags[middle:]  # (half of the lags, 2), lag 0 first
    taps = correlation.flatten(3).permute(3, 0, 1, 2)[middle:]  # (half of the lags, groups, n, n)
    even = (taps + taps.mT).flatten(1)  # (half of the lags, groups · n · n)
    odd = (taps - taps.mT).flatten(1)
    even[0] /= 2  # lag 0 has no partner
    at_once = max(1, MEMORY // (groups * n * n))
    for piece in cells.split(at_once):
        angles = piece @ lags.T  # (some cells, half of the lags)
        gram = _waves_times(angles, even, odd)
        yield gram.reshape(len(piece), groups, n, n)


def _waves_times(angles: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Both parts are as large as what is made of them; here they are gone before anybody works with it."""
    real = angles.cos() @ even  # (some cells, groups · n · n)
    imaginary = angles.sin() @ odd
    return torch.complex(real, imaginary)


def centred_places(height: int, width: int, device: torch.device) -> Tensor:
    """The places (height · width, 2) of a grid around its middle, row by row.

    >>> centred_places(1, 3, torch.device("cpu"))[:, 1]
    tensor([-1.,  0.,  1.], dtype=torch.float64)
    """
    rows = torch.arange(height, device=device).double() - (height - 1) / 2
    columns = torch.arange(width, device=device).double() - (width - 1) / 2
    return torch.cartesian_prod(rows, columns)

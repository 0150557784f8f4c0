"""Sound and tight norms of linear maps: what `lip.spectral` divides by and what `lip.lipschitz_bound` multiplies.

A convolution on the infinite grid is diagonal in frequency: at ω it multiplies by the matrix
Ŵ(ω) = Σ_t W_t e^{i⟨ω, t⟩}, so its norm is M = max_ω σ_max(Ŵ(ω)). Zero padding only restricts that map and circular
padding only samples its frequencies, so M bounds the layer on pictures of every size.

M is enclosed from both sides. *Below*: σ_max at any frequency. *Above*: for unit vectors u, v the function
Re(uᴴ Ŵ(ω) v) is, up to a phase, a sum of exponentials of degree at most d = (k − 1) / 2 an axis, so it cannot fall
faster than a cosine from its maximum (Duffin and Schaeffer): at distance h an axis from the maximiser,
σ_max(Ŵ) ≥ M cos(2dh). A cell of frequencies of half-width h whose centre has σ_max < τ cos(2dh) therefore cannot
hold the maximiser of any M ≥ τ. One Cholesky factorisation of τ² cos²(2dh) I − ŴᴴŴ proves that inequality; a cell that
fails is split in four. When every cell is proved, M < τ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["aol_norm", "conv_norm", "matrix_norm", "polyphase"]

COARSE = 24  # cells an axis over the whole circle of frequencies, before any refinement
MEMORY = 2**22  # complex numbers held at once
CUSHION = 1e-7  # relative: far above the rounding of float64, far below any tolerance asked for
ROUNDS = 40


def matrix_norm(weight: Tensor) -> float:
    """Upper bound of the largest singular value of a matrix, tight to 1e-7.

    >>> matrix_norm(torch.diag(torch.tensor([3.0, 4.0]))) >= 4.0
    True
    """
    check_finite(weight)
    return float(torch.linalg.matrix_norm(weight.detach().double(), ord=2)) * (1 + CUSHION)


def polyphase(weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
    """The kernel (groups, outputs, inputs·s², k', k') of the stride-1 convolution that equals a strided one.

    A convolution of stride s sees its input as s² interleaved pictures (space to depth); taps that dilation
    skips are zeros.

    >>> polyphase(torch.randn(8, 3, 3, 3), (2, 2), (1, 1), 1).shape
    torch.Size([1, 8, 12, 2, 2])
    """
    (height, width), (s1, s2), (d1, d2) = weight.shape[2:], stride, dilation
    reach = (d1 * (height - 1) + 1, d2 * (width - 1) + 1)
    rows, columns = math.ceil(reach[0] / s1), math.ceil(reach[1] / s2)
    spread = weight.new_zeros(*weight.shape[:2], rows * s1, columns * s2)
    spread[:, :, : reach[0] : d1, : reach[1] : d2] = weight
    phases = F.pixel_unshuffle(spread, s1) if s1 == s2 else _unshuffle(spread, s1, s2)
    return phases.reshape(groups, weight.shape[0] // groups, -1, rows, columns)


def _unshuffle(kernel: Tensor, s1: int, s2: int) -> Tensor:
    outputs, inputs, height, width = kernel.shape
    split = kernel.reshape(outputs, inputs, height // s1, s1, width // s2, s2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(outputs, inputs * s1 * s2, height // s1, width // s2)


def aol_norm(kernel: Tensor) -> float:
    """√ max_i Σ_j |K ⋆ K|_ij over a polyphase kernel: a cheap upper bound, exact for orthogonal convolutions.

    >>> delta = torch.zeros(1, 2, 2, 3, 3)
    >>> delta[0, 0, 0, 1, 1] = delta[0, 1, 1, 0, 2] = 1
    >>> round(aol_norm(delta), 6)
    1.0
    """
    groups, outputs, inputs, height, width = kernel.shape
    if inputs < outputs:  # KᵀK has the same norm as KKᵀ: take the smaller of the two
        kernel = kernel.transpose(1, 2).flip(3, 4)
        outputs, inputs = inputs, outputs
    flat = kernel.reshape(groups * outputs, inputs, height, width).double()
    picture = flat.reshape(groups, outputs, inputs, height, width).transpose(0, 1).reshape(outputs, -1, height, width)
    gram = F.conv2d(picture, flat, padding=(height - 1, width - 1), groups=groups)
    return math.sqrt(float(gram.abs().sum((2, 3)).sum(0).max())) * (1 + CUSHION)


def conv_norm(
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    tolerance: float = 4e-3,
) -> float:
    """Upper bound of the norm of a convolution, for zero or circular padding and pictures of every size.

    It exceeds the norm on an infinitely large picture by at most the relative `tolerance`. The norm of a transposed
    convolution is that of the convolution with the same weight.

    Args:
        weight: the kernel (outputs, inputs / groups, height, width), as torch stores it.
        stride, dilation, groups: those of the layer.
        tolerance: how far above the true norm the bound may lie, relatively.

    >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
    >>> 1.0 <= conv_norm(blur) <= 1.004
    True
    """
    check_finite(weight)
    kernel = polyphase(weight.detach().double(), stride, dilation, groups)
    # Work at scale one: a Gram matrix of tiny or huge numbers would leave the range of float64.
    scale = float(kernel.abs().amax())
    if scale == 0.0:
        return 0.0
    return scale * _torus_norm(kernel / scale, tolerance)


def _torus_norm(kernel: Tensor, tolerance: float) -> float:
    degree = (kernel.shape[3] - 1) / 2, (kernel.shape[4] - 1) / 2
    cells, half = _coarse_cells(degree, kernel.device)
    easy = aol_norm(kernel)
    best = 0.0
    for _ in range(ROUNDS):
        slack = math.cos(sum(d * h for d, h in zip(degree, half, strict=True)))
        best = max(best, *(_largest(gram) for gram in _grams(kernel, cells)))
        if easy <= best * (1 + tolerance):
            return easy
        target = best * (1 + tolerance)
        proved = torch.cat([_below(gram, target * slack) for gram in _grams(kernel, cells)])
        if proved.all():
            return target * (1 + CUSHION)
        cells, half = _split(cells[~proved], half, degree)
    return easy  # never seen in practice; the loose bound is sound all the same


def _coarse_cells(degree: tuple[float, float], device: torch.device) -> tuple[Tensor, tuple[float, float]]:
    """Centres of cells that cover half of the torus (the other half mirrors it) and their half-widths."""
    # An axis on which the kernel has one tap has a constant symbol: one cell with no width will do.
    counts = [1 if d == 0 else math.ceil(COARSE * max(1.0, d)) for d in degree]
    half = [0.0 if d == 0 else math.pi / n for d, n in zip(degree, counts, strict=True)]
    mirrored = 1 if degree[1] > 0 else 0
    if max(counts) > 1:
        counts[mirrored] = math.ceil(counts[mirrored] / 2)
    axes = [(2 * torch.arange(n, device=device) + 1).double() * h for n, h in zip(counts, half, strict=True)]
    return torch.cartesian_prod(*axes), (half[0], half[1])


def _split(cells: Tensor, half: tuple[float, float], degree: tuple[float, float]) -> tuple[Tensor, tuple[float, float]]:
    half = (half[0] / 2, half[1] / 2)
    steps = [torch.tensor([-h, h] if d > 0 else [0.0]).double() for d, h in zip(degree, half, strict=True)]
    offsets = torch.cartesian_prod(*steps).to(cells.device)
    return (cells[:, None] + offsets).reshape(-1, 2), half


def _grams(kernel: Tensor, cells: Tensor):
    """ŴᴴŴ or ŴŴᴴ, whichever is smaller, in pieces of shape (cells, groups, n, n)."""
    groups, outputs, inputs, height, width = kernel.shape
    taps = torch.cartesian_prod(
        torch.arange(height, device=kernel.device), torch.arange(width, device=kernel.device)
    ).double()
    flat = kernel.reshape(-1, height * width).T
    for piece in cells.split(max(1, MEMORY // max(1, groups * outputs * inputs))):
        angles = piece @ taps.T
        symbol = torch.complex(angles.cos() @ flat, angles.sin() @ flat)
        symbol = symbol.reshape(len(piece), groups, outputs, inputs)
        yield symbol.mH @ symbol if inputs <= outputs else symbol @ symbol.mH


def _largest(gram: Tensor) -> float:
    """The largest singular value found among the cells: power steps choose four cells, those are solved exactly."""
    flat = gram.reshape(-1, *gram.shape[2:])
    vector = gram.new_ones(gram.shape[-1], 1) + torch.linspace(0, 1, gram.shape[-1], device=gram.device)[:, None]
    vector = vector.expand(len(flat), -1, -1)
    for _ in range(6):
        vector = flat @ vector
        norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        vector = vector / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    top = norm.flatten().topk(min(4, len(flat))).indices
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(flat[top])[:, -1].max())))


def _below(gram: Tensor, limit: float) -> Tensor:
    """For each cell: is σ_max < limit proved, in every group, by a Cholesky factorisation of limit² I − Gram?"""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (torch.linalg.cholesky_ex(limit**2 * eye - gram).info == 0).all(dim=1)


def check_finite(weight: Tensor) -> None:
    """A NaN or an infinity in a weight has no norm: say so rather than certify it."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values, so no norm can be certified; "
            "the training that made it has diverged"
        )

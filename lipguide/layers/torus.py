"""M = max_ω σ_max(Ŵ(ω)), the norm of a convolution on pictures of every size, enclosed from both sides.

*Below*: σ_max at any frequency. `climb` looks for a large one; nothing rests on its finding the largest.

*Above*: for unit vectors u, v the function Re(uᴴ Ŵ(ω) v) is, up to a phase, a sum of exponentials of degree at most
d = (k − 1) / 2 an axis, so it cannot fall faster than a cosine from its maximum (Duffin and Schaeffer): at a place δ
away from the maximiser, σ_max(Ŵ) ≥ M cos(d|δ₁| + d|δ₂|). Cover the frequencies with cells d|δ₁| + d|δ₂| ≤ r, which are
diamonds. One whose centre has σ_max < τ cos(r) cannot hold the maximiser of any M ≥ τ. One Cholesky factorisation of
τ² cos²(r) I − ŴᴴŴ proves that inequality; a cell that fails is split in four. When every cell is proved, M < τ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguide.layers.climb import climb
from lipguide.layers.symbol import CUSHION, correlation_of, filter_norm, grams_at, row_sum_norm

__all__ = ["torus_norm"]

ROUNDS = 30
MANY = 100  # cells that fail: more of them, and the search may well have missed the maximiser

Degree = tuple[float, float]
"""d₁ and d₂, of the waves in Re(uᴴ Ŵ(ω) v)."""
Reach = tuple[float, float]
"""How far a diamond reaches from its centre along each axis."""


def torus_norm(kernel: Tensor, tolerance: float) -> float:
    """Upper bound of M, above it by at most the relative tolerance.

    Args:
        kernel: (groups, outputs, inputs, k₁, k₂) in float64, with a largest entry of 1.
        tolerance: the smaller, the more cells.

    >>> 9.0 <= torus_norm(torch.ones(1, 1, 1, 3, 3).double(), 1e-3) <= 9.01
    True
    """
    correlation = correlation_of(kernel)
    easy = row_sum_norm(correlation)
    if easy <= filter_norm(correlation) * (1 + tolerance):
        return easy

    degree = (kernel.shape[3] - 1) / 2, (kernel.shape[4] - 1) / 2
    best = climb(kernel, _start(degree, kernel.device))
    cells, reach = _first_cells(degree, _first_radius(tolerance), kernel.device)
    for _ in range(ROUNDS):
        target = best * (1 + tolerance)
        if easy <= target:
            return easy
        limit = _limit(target, degree, reach)
        cells = cells[~_proved(cells, correlation, limit)]
        if len(cells) == 0:
            return target * (1 + CUSHION)
        if limit >= best or len(cells) > MANY:  # else what failed may just lie near what was found
            some = cells[:: math.ceil(len(cells) / 16)]
            best = max(best, climb(kernel, some))
        cells, reach = _split(cells, reach, degree)
    return easy  # never seen in practice; the loose bound is sound all the same


def _first_radius(tolerance: float) -> float:
    """At a radius of acos(1 / (1 + tolerance)) no cell can fail if M has been found: begin with four times that.

    In any case well below π/2, where a cosine would change its sign.
    """
    none_fails = math.acos(1 / (1 + tolerance))
    return min(1.0, 4 * none_fails)


def _limit(target: float, degree: Degree, reach: Reach) -> float:
    """τ cos(r): a cell may be given up if the σ_max at its centre is below this. Its radius r is d · δ at a corner."""
    radius = max(degree[0] * reach[0], degree[1] * reach[1])
    return target * math.cos(radius)


def _proved(cells: Tensor, correlation: Tensor, limit: float) -> Tensor:
    """For each of the cells (cells, 2): is σ_max < limit proved at its centre?"""
    proved = [_is_below(gram, limit) for gram in grams_at(cells, correlation)]
    return torch.cat(proved)


def _is_below(gram: Tensor, limit: float) -> Tensor:
    """Does limit² I − Gram have a Cholesky factorisation, in every group? It has one where it is positive.

    Args:
        gram: (cells, groups, n, n).
        limit: of σ_max.
    """
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(limit**2)
    failed_at = torch.linalg.cholesky_ex(shifted).info  # (cells, groups), 0 where there is a factorisation
    return (failed_at == 0).all(dim=1)


# The cells.


def _first_cells(degree: Degree, radius: float, device: torch.device) -> tuple[Tensor, Reach]:
    """Centres (cells, 2) of diamonds that cover half of the frequencies, and their reach; the others mirror them."""
    counts = [1, 1]  # an axis on which the kernel has one tap has a constant symbol: it needs no cells
    spacing = [0.0, 0.0]
    for axis in (0, 1):
        if degree[axis] > 0:
            counts[axis] = 2 * math.ceil(math.pi * degree[axis] / radius)
            spacing[axis] = 2 * math.pi / counts[axis]
    rows, columns = _halved(counts, degree)
    row = torch.arange(rows, device=device)
    column = torch.arange(columns, device=device)
    places = torch.cartesian_prod(row, column)
    places = places[places.sum(1) % 2 == 0]  # the centres of diamonds make a chessboard
    centres = places * torch.tensor(spacing, device=device, dtype=torch.float64)
    return centres, (spacing[0], spacing[1])


def _halved(counts: list[int], degree: Degree) -> list[int]:
    """The counts, with the last axis that has more than one tap cut in half, its ends included."""
    mirrored = 0 if degree[1] == 0 else 1
    halved = list(counts)
    halved[mirrored] = counts[mirrored] // 2 + 1
    return halved


def _split(cells: Tensor, reach: Reach, degree: Degree) -> tuple[Tensor, Reach]:
    """Each diamond becomes four of half its size, whose centres lie towards its corners."""
    down = reach[0] / 2
    across = reach[1] / 2
    steps = []
    if degree[0] > 0:
        steps += [(-down, 0.0), (down, 0.0)]
    if degree[1] > 0:
        steps += [(0.0, -across), (0.0, across)]
    if not steps:
        steps = [(0.0, 0.0)]
    offsets = torch.tensor(steps, device=cells.device, dtype=torch.float64)  # (steps, 2)
    smaller = cells[:, None] + offsets  # (cells, steps, 2)
    return smaller.reshape(-1, 2), (down, across)


def _start(degree: Degree, device: torch.device) -> Tensor:
    """Frequencies (places, 2) from which to look for the maximiser: two a wavelength and a few more."""
    counts = [1 if d == 0 else int(4 * d + 4) for d in degree]
    rows, columns = _halved(counts, degree)
    down = 2 * math.pi * torch.arange(rows, device=device).double() / counts[0]
    across = 2 * math.pi * torch.arange(columns, device=device).double() / counts[1]
    return torch.cartesian_prod(down, across)

"""The search for the frequency at which a convolution stretches most: a lower bound of its norm, and a good one.

A power iteration u ← Ŵ(ω) v, v ← Ŵ(ω)ᴴ u from many frequencies at once, each of which moves uphill with every step. It
runs in float32. What it finds is evaluated in float64 at the end, so nothing rests on its rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguide.layers.symbol import MEMORY, centred_places
from lipguide.seeded import normal

__all__ = ["climb"]

STEPS = 16
FIRST_STEP, SHRINK = 0.3, 0.8  # in units of 1 / degree; each step is shorter than the one before
EVALUATED = 4  # of what was found, the best ones


def climb(kernel: Tensor, start: Tensor) -> float:
    """The largest σ_max(Ŵ(ω)) that was found.

    Args:
        kernel: (groups, outputs, inputs, k₁, k₂).
        start: frequencies (places, 2); of many that would not fit into memory some are left out.

    >>> round(climb(torch.ones(1, 1, 1, 3, 3).double(), torch.tensor([[0.3, 0.2]]).double()), 4)
    9.0
    """
    groups, outputs, inputs, height, width = kernel.shape
    taps = centred_places(height, width, kernel.device)  # (taps, 2)
    rows = kernel.float().permute(0, 3, 4, 1, 2)  # (groups, k₁, k₂, outputs, inputs)
    rows = rows.flatten(1, 3)  # (groups, taps · outputs, inputs)
    start = _some_of(start, groups * len(taps))
    omega = start.expand(groups, -1, 2)  # (groups, places, 2)
    v = _random(groups, inputs, len(start)).to(kernel.device)  # (groups, inputs, places)
    waves = _waves(omega, taps)  # (groups, taps, 1, places)
    moves = _moves(kernel.device)
    degree = max(1.0, (max(height, width) - 1) / 2)
    for step in range(STEPS):
        v = _of_length_one(v)
        products = _real_product(rows, v)  # W_t v: (groups, taps · outputs, places)
        products = products.unflatten(1, (len(taps), outputs))  # (groups, taps, outputs, places)
        length = FIRST_STEP * SHRINK**step / degree
        u = (products * waves).sum(1)  # (groups, outputs, places), at the old ω
        omega = _uphill(omega, products, u, waves, taps, length * moves)
        # u ← Ŵ(ω) v, then v ← Ŵ(ω)ᴴ u, at the new ω
        waves = _waves(omega, taps)
        u = (products * waves).sum(1)  # (groups, outputs, places)
        back = u[:, None] * waves.conj()  # (groups, taps, outputs, places)
        back = back.flatten(1, 2)
        v = _real_product(rows.mT, back)  # (groups, inputs, places)
    found = torch.linalg.vector_norm(u, dim=1)  # (groups, places)
    return _evaluated(kernel, omega, taps, found)


def _some_of(start: Tensor, numbers: int) -> Tensor:
    """As many of the frequencies, evenly, as memory can hold with their neighbours; each takes so many numbers."""
    in_all = 9 * len(start) * numbers
    every = math.ceil(in_all / MEMORY)
    return start[::every]


def _random(groups: int, inputs: int, places: int) -> Tensor:
    """Complex columns (groups, inputs, places), the same ones every time."""
    return torch.view_as_complex(normal((groups, inputs, places, 2)))


def _of_length_one(columns: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return columns / length.clamp_min(1e-30)


def _moves(device: torch.device) -> Tensor:
    """To stay, or to go to one of eight neighbours: (9, 2)."""
    to = torch.tensor([-1.0, 0.0, 1.0], device=device, dtype=torch.float64)
    return torch.cartesian_prod(to, to)


def _uphill(omega: Tensor, products: Tensor, u: Tensor, waves: Tensor, taps: Tensor, moves: Tensor) -> Tensor:
    """Of each frequency and its eight neighbours the one where |uᴴ Ŵ(ω) v| is largest, with u = Ŵ(ω) v held fixed.

    There it is a short trigonometric sum, Σ_t (uᴴ W_t v) e^{i⟨ω, t⟩}. A move by δ multiplies its waves by e^{i⟨δ, t⟩}.

    Args:
        omega: (groups, places, 2).
        products: W_t v as (groups, taps, outputs, places).
        u: (groups, outputs, places).
        waves: e^{i⟨ω, t⟩} as (groups, taps, 1, places).
        taps: (taps, 2).
        moves: to the neighbours, (moves, 2).
    """
    terms = (products * u.conj()[:, None]).sum(2)  # (groups, taps, places)
    terms = terms * waves[:, :, 0]
    turns = _waves(moves[None], taps)[0, :, 0]  # (taps, moves)
    sums = terms.mT @ turns  # (groups, places, moves)
    return omega + moves[sums.abs().argmax(2)]


def _evaluated(kernel: Tensor, omega: Tensor, taps: Tensor, found: Tensor) -> float:
    """max σ_max(Ŵ(ω)) in float64 over the best of the frequencies that were found.

    Args:
        kernel: (groups, outputs, inputs, k₁, k₂).
        omega: (groups, places, 2).
        taps: (taps, 2).
        found: how large σ_max seems to be there, (groups, places).
    """
    places = found.shape[1]
    count = min(EVALUATED, found.numel())
    best = found.flatten().topk(count).indices
    group = best // places
    place = best % places
    angles = omega[group, place] @ taps.T  # (best, taps)
    waves = torch.polar(torch.ones_like(angles), angles)
    matrices = kernel[group].flatten(3)  # (best, outputs, inputs, taps)
    symbol = torch.einsum("foit,ft->foi", matrices.to(torch.complex128), waves)
    norms = torch.linalg.matrix_norm(symbol, ord=2)  # (best,)
    return float(norms.max())


def _waves(omega: Tensor, taps: Tensor) -> Tensor:
    """e^{i⟨ω, t⟩} as (groups, taps, 1, places)."""
    angles = omega @ taps.T  # (groups, places, taps)
    angles = angles.mT.float()
    waves = torch.polar(torch.ones_like(angles), angles)
    return waves[:, :, None]


def _real_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """A real matrix times complex columns, as one real product."""
    pairs = torch.view_as_real(columns).flatten(2)  # (groups, m, columns · 2)
    product = matrix @ pairs
    product = product.unflatten(2, (-1, 2))
    return torch.view_as_complex(product)

"""The scale of an SLL block: a diagonal T ⪰ WᵀW, by Gram iteration, for matrices and for convolutions.

    ‖W T^(-1/2)‖ ≤ 1  ⟺  WᵀW ⪯ T

A diagonal T leaves each filter a scale of its own, which one spectral norm for all of them would not.

T is a diagonal matrix with T ⪰ G = (QK)(QK)ᴴ for the filters K = Wᵀ. It is found in three steps.

1. *Row sums.* For a Hermitian A, diag(Σ_j |A_ij|) ⪰ A, because 2|x_i||x_j| ≤ |x_i|² + |x_j|².
2. *Gram iteration.* With A = G^p, p = 2^iterations: G^p ⪯ D implies G ⪯ D^(1/p) (Löwner and Heinz: roots keep the
   order of positive matrices), and D^(1/p) is diagonal as D is. The surplus of the row sums, up to a factor √n, is
   rooted away: the larger p, the tighter.
3. *Learned q.* Q = diag(q), q = exp(log_q) > 0, enters before the powers are taken, as QGQ. The block depends on q only
   through Q T^(-1) Q, whose diagonal at p = 1 is 1 / Σ_j |KKᵀ|_ij q_j/q_i: the T of the SLL paper, whose public code
   divides q out again. After the powers, q would be rooted away with the rest. q adds no function that other filters
   could not give (q_i K_i is a filter as well); it lets the share that each filter has of the bound be learned on a
   scale of its own.

A *convolution* has one such G per frequency ω, and T must serve them all. It is computed on a grid of N = (k − 1)ρ
frequencies an axis, with a density ρ that grows with the iterations. *Between them*: let M = sup ‖V(ω)‖, attained at ω*
by unit vectors u, v. Along one axis, Re(uᴴV(ω)v) is a trigonometric polynomial of degree d = (k − 1)/2, with taps
counted from the centre, and never above M in modulus: from its maximum it falls no faster than M cos(d·) (M. Riesz;
where k is even and d a half, the polynomial is one in ω/2, of degree 2d). A grid point lies within π/N, so ‖V‖ ≥ M cosθ
where this axis is on the grid, θ = πd/N = π/(2ρ). In the same way along the other axis, 1 ≥ ‖V‖ ≥ M cos²θ somewhere on
the grid: M ≤ 1/cos²θ. A constant part needs no such allowance. Shift each filter so that its largest tap, its own, is
at 0: that multiplies the rows of V(ω) by phases, which leaves ‖V(ω)‖ as it is, and at most doubles d. If the other taps
have norm at most b together, Re(uᴴV(ω)v) stays within ±b of a constant, the same argument about its mid-range shows a
fall of at most b(1 − cos2θ) an axis, and M ≤ 1 + 2b(1 − cos2θ): nothing is lost on filters of one tap each. V is
divided by the smaller of the two.

*At the border*: zero padding restricts the operator on the infinite lattice, circular padding samples its frequencies,
so ‖V‖ ≤ 1 holds for pictures of every size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from lipguide.checks import HALF
from lipguide.layers.constraints import Constraint

__all__ = ["GramScale", "between_frequencies", "diagonal_bound", "off_centre"]

FLOAT32_ROOM = 2**8  # units of rounding by which V is made smaller
LEAST_DENSITY = 4  # frequencies of the grid a wavelength
KEPT, SCANNED = 6, 2  # frequencies that a training step looks at: those that matter, and the next ones of the grid
WATCHED = KEPT + SCANNED


class GramScale(Constraint):
    """The parametrization of SLL: turns free filters K = Wᵀ into V with ‖V‖ ≤ 1, as V = T^(-1/2) Q K.

    *Eval*: T is that of the whole grid, and ‖V‖ ≤ 1 is proved.

    *Training*: T is computed on a few frequencies only, with its exact gradient: those at which the most filters have
    their largest row sums, and two others, which go once around the grid and then begin anew. One that matters is found
    within a turn (some 40 steps for 3×3 filters) and kept as long as it does. What is looked at is a part of the grid,
    so T is never too large, and V may lie a little above 1 while it is trained, as under `lip.spectral`. Where a bound
    is asked for, in eval mode, nothing of this is used.

    *Rounding*: all this runs in float32 or better. V is made smaller by 2⁻¹⁵, a few hundred times that rounding, and in
    half precision by the room that its own rounding takes (`rounded`).

    Args:
        shape: of the filters, (inner, features) or (inner, channels, k, k).
        iterations: of the Gram iteration, 0 for plain row sums.
    """

    batches = True

    def __init__(self, shape: torch.Size | tuple[int, ...], iterations: int) -> None:
        super().__init__()
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}: 0 takes plain row sums, each one more is tighter")
        self.iterations = iterations
        self.density = max(LEAST_DENSITY, 2 * iterations)  # so that neither source of slack outweighs the other
        self.log_q = nn.Parameter(torch.zeros(shape[0]))
        self.varies = len(shape) > 2 and shape[-1] > 1  # does the symbol depend on the frequency?
        if self.varies:
            waves = _spread_waves(shape[-1], self.density).float().to(self.log_q.device)
            watched = torch.arange(WATCHED, device=self.log_q.device)  # which of them, the scanned ones last
            self.register_buffer("waves", waves, persistent=False)  # (frequencies, 2, taps)
            self.register_buffer("watched", watched)

    def settings(self) -> Hashable:
        return self.iterations

    def constrained(self, filters: Tensor) -> Tensor:
        q = self._first_scale(filters)  # (filters,)
        kernel = filters * _column(q, filters)  # Q K
        t = self._bound(kernel)  # (filters,)
        scale = t.rsqrt()  # (filters,)
        if self.varies:
            scale = scale / self._allowance(kernel, scale)
        return kernel * _column(scale, kernel)

    def _bound(self, kernel: Tensor) -> Tensor:
        """The diagonal of T."""
        if self.training and self.varies:
            return self._watched_bound(kernel)
        return self._proved_bound(kernel)

    def _first_scale(self, filters: Tensor) -> Tensor:
        """q, divided so that the largest entry of Q K is 1: V depends on directions only, and no power overflows."""
        log_q = self.log_q.to(filters.dtype)
        q = torch.exp(log_q - log_q.detach().amax())
        with torch.no_grad():
            largest = filters.flatten(1).abs().amax(1)  # (filters,)
            size = (q * largest).amax()
            size = _nonzero(size).clamp_min(torch.finfo(q.dtype).tiny)
        return q / size

    def _proved_bound(self, kernel: Tensor) -> Tensor:
        """The T of the whole grid."""
        symbol = _symbol_on_grid(kernel, self.density)  # (frequencies, filters, channels)
        return diagonal_bound(symbol, self.iterations)

    def _watched_bound(self, kernel: Tensor) -> Tensor:
        """The T of the frequencies that are watched."""
        waves = self.waves
        if waves.dtype in HALF:  # a layer cast to half precision has cast them as well
            waves = _spread_waves(kernel.shape[-1], self.density).to(waves.device)
        waves = waves.index_select(0, self.watched)
        # In float64 they stay as exact as float32 was, which is enough where nothing is proved.
        symbol = _symbol(kernel, waves.to(kernel.dtype))  # (watched, filters, channels)
        log_bounds = _log_row_sums(symbol, self.iterations)  # (watched, filters)
        self._watch(log_bounds.detach())
        return log_bounds.amax(0).exp()

    def _watch(self, log_bounds: Tensor) -> None:
        """Keep the frequencies that set the T of the most filters; scan the next ones."""
        sets = log_bounds.argmax(0)  # (filters,)
        which = torch.arange(WATCHED, device=sets.device)
        filters = (sets == which[:, None]).sum(1)  # (watched,)
        most = filters.topk(KEPT).indices
        kept = self.watched.index_select(0, most)
        scanned = self.watched[KEPT:]
        next_ones = (scanned + SCANNED) % len(self.waves)
        self.watched.copy_(torch.cat((kept, next_ones)))

    def _allowance(self, kernel: Tensor, scale: Tensor) -> Tensor:
        """By how much ‖V‖ may exceed 1 between the frequencies of the grid; in training without a gradient."""
        has_gradient = torch.is_grad_enabled() and not self.training
        with torch.set_grad_enabled(has_gradient):
            others = off_centre(kernel) * scale[:, None]  # those of V
            return between_frequencies(others, self.density)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """A file from before training watched anything says nothing of it: then what is watched stays."""
        if self.varies:
            watched = {prefix + "watched": self.watched.clone()}
            state_dict = watched | state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """V in the precision of the layer, a little smaller, so that its norm is at most 1 after rounding too."""
        wide = torch.promote_types(dtype, torch.float32)
        room = FLOAT32_ROOM * torch.finfo(wide).eps
        if dtype in HALF and self.training:
            room = room + torch.finfo(dtype).eps
        elif dtype in HALF:
            room = room + self._room_for(weight, dtype)
        return (weight / (1 + room)).to(dtype)

    @torch.no_grad()
    def _room_for(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """By how much V must be smaller so that half precision, which adds an error E to it, leaves ‖V + E‖ ≤ 1.

        One unit of rounding is enough for nearly every V: take it if the norm of the E that it brings is proved to be
        small enough. If not, take the room that is enough for any E, with |E_ij| ≤ ½ unit |V_ij| or ½ the smallest
        number, from Schur's bound of ‖|V|‖.
        """
        unit = torch.finfo(dtype).eps
        smaller = v / (1 + unit + FLOAT32_ROOM * torch.finfo(torch.float32).eps)
        half = smaller.to(dtype)
        error = half.to(v.dtype) - smaller
        fits = 1 / (1 + unit) + self._norm(error) <= 1
        return torch.where(fits, unit, _room_for_any_error(v, dtype))

    def _norm(self, kernel: Tensor) -> Tensor:
        """Upper bound of the norm of any kernel, from the same row sums."""
        largest = _nonzero(kernel.abs().amax())
        squares = self._proved_bound(kernel / largest)  # (filters,)
        on_grid = squares.amax().sqrt()
        theta = math.pi / (2 * self.density)
        return largest * on_grid / math.cos(theta) ** 2


def _room_for_any_error(v: Tensor, dtype: torch.dtype) -> Tensor:
    """‖E‖ for every E with |E_ij| ≤ ½ unit |V_ij| or ½ the smallest number, and what a smaller V adds to it."""
    unit = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * unit
    taps = v.abs()
    if v.dim() > 2:
        taps = taps.flatten(2).sum(2)  # (filters, channels)
    columns = taps.sum(0)
    rows = taps.sum(1)
    schur = (columns.amax() * rows.amax()).sqrt()
    any_error = unit / 2 * schur
    row = v.numel() / v.shape[0]  # how many entries a row has
    column = v.numel() / v.shape[1]
    below_the_smallest = smallest / 2 * (row * column) ** 0.5
    return any_error + 2 * below_the_smallest * (1 + any_error)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value a filter, beside filters of as many axes as they have."""
    ones = [1] * (like.dim() - 1)
    return values.view(-1, *ones)


def _nonzero(value: Tensor) -> Tensor:
    """A size that can be divided by: filters of zeros stay zeros."""
    return torch.where(value == 0, 1.0, value)


# The filters at the frequencies of a grid.


def _waves(kernel_size: int, density: int) -> Tensor:
    """cos⟨ω, t⟩ and sin⟨ω, t⟩ as (frequencies, 2, taps), for one of each pair ±ω of the grid: the other mirrors it."""
    side = density * (kernel_size - 1)
    down = torch.arange(side, device="cpu")
    across = torch.arange(side // 2 + 1, device="cpu")
    places = torch.cartesian_prod(down, across)  # (places, 2)
    rows, columns = places.unbind(1)
    # In the first column and, of an even side, in the last one the mirror image is in the same column.
    mirrored = (columns == 0) | (2 * columns == side)
    first_of_two = 2 * rows <= side
    kept = ~mirrored | first_of_two
    omega = places[kept].double() * (2 * math.pi / side)  # (frequencies, 2)
    along = torch.arange(kernel_size, device="cpu").double()
    taps = torch.cartesian_prod(along, along)  # (taps, 2)
    angles = omega @ taps.T  # (frequencies, taps)
    waves = torch.stack((angles.cos(), angles.sin()), 1)
    # cos(π/2) is 0, and 6e-17 in float64. Products of such numbers are below the normal ones of float32, and slow.
    return torch.where(waves.abs() < 1e-12, 0.0, waves)


def _spread_waves(kernel_size: int, density: int) -> Tensor:
    """The same frequencies in an order in which any few that follow one another lie far apart."""
    waves = _waves(kernel_size, density)
    count = len(waves)
    stride = round(0.618 * count)
    while math.gcd(stride, count) > 1:  # else some would come twice
        stride += 1
    order = torch.arange(count, device="cpu") * stride % count
    return waves[order]


def _symbol(kernel: Tensor, waves: Tensor) -> Tensor:
    """The filters (n, c, k, k) at some frequencies: complex matrices F in (frequencies, n, c)."""
    n, c = kernel.shape[:2]
    taps = kernel.flatten(2)  # (n, c, taps)
    taps = taps.permute(2, 0, 1).flatten(1)  # (taps, n · c)
    sums = waves.flatten(0, 1) @ taps  # (frequencies · 2, n · c)
    sums = sums.view(-1, 2, n, c)
    real, imaginary = sums.unbind(1)
    return torch.complex(real, imaginary)


def _symbol_on_grid(kernel: Tensor, density: int) -> Tensor:
    """The same on the whole grid; one real matrix if the filters are vectors."""
    if kernel.dim() == 2 or kernel.shape[-1] == 1:
        matrix = kernel.flatten(1)  # (n, c)
        return matrix[None]
    waves = _waves(kernel.shape[-1], density)
    return _symbol(kernel, waves.to(kernel))


def diagonal_bound(symbol: Tensor, iterations: int) -> Tensor:
    """The diagonal of a T ⪰ FFᴴ for each of the matrices F in (frequencies, n, c), real or complex.

    Each entry of T is set by the one frequency where it is largest, so the gradient needs only those few: the powers
    are taken at all frequencies without a gradient, and once more with one where it matters.

    >>> diagonal_bound(torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), iterations=0)
    tensor([3., 2.])
    """
    has_gradient = torch.is_grad_enabled() and symbol.requires_grad
    if len(symbol) == 1 or not has_gradient:
        log_sums = _log_row_sums(symbol, iterations)  # (frequencies, n)
        return log_sums.amax(0).exp()
    with torch.no_grad():
        log_sums = _log_row_sums(symbol, iterations)
        log_bound, frequency = log_sums.max(0)  # (n,)
    where = frequency.unique()
    with_gradient = _log_row_sums(symbol[where], iterations).amax(0)  # (n,), the same values
    gradient_alone = with_gradient - with_gradient.detach()
    return (log_bound + gradient_alone).exp()


def _log_row_sums(symbol: Tensor, iterations: int) -> Tensor:
    """log D(ω)^(1/p) as (frequencies, n), with D the row sums of |(FFᴴ)^p|.

    p = 2^iterations, or one more where F is tall: the powers of a tall F cost less on its other side, where
    (FFᴴ)^(p + 1) = F (FᴴF)^p Fᴴ.
    """
    n, c = symbol.shape[-2:]
    tall = iterations > 0 and n > c
    power = symbol.mH @ symbol if tall else symbol @ symbol.mH
    log_size: Tensor | float = 0.0  # power · exp(log_size) is what it stands for
    for _ in range(iterations):
        size = _size(power)
        power = power * size.reciprocal()
        power = power @ power
        log_size = 2 * (log_size + size.log())
    p = 2**iterations
    if tall:
        power = symbol @ power @ symbol.mH
        p += 1
    # Rows that are small, raised to a high power, can vanish below the smallest number: never count them as zero.
    least = torch.finfo(symbol.dtype).tiny * 2**26
    sums = power.abs().sum(-1) + least
    return (sums.log() + log_size) / p


def _size(power: Tensor) -> Tensor:
    """The largest diagonal entry of positive matrices (frequencies, n, n), without a gradient.

    It is the largest of all entries, and at most the largest eigenvalue: scaled by it, the next power neither overflows
    nor fades.
    """
    diagonal = power.detach().diagonal(dim1=-2, dim2=-1)
    return _nonzero(diagonal.real.amax())


def off_centre(kernel: Tensor) -> Tensor:
    """Σ |taps| but for the largest tap of each filter, as (filters, channels)."""
    filters, channels = kernel.shape[:2]
    taps = kernel.abs().flatten(2)  # (filters, channels, taps)
    together = taps.detach().sum(1)  # (filters, taps)
    own = together.argmax(1)  # (filters,)
    where = own.view(-1, 1, 1).expand(filters, channels, 1)
    own_taps = taps.gather(2, where)[:, :, 0]  # (filters, channels)
    return taps.sum(2) - own_taps


def between_frequencies(others: Tensor, density: int) -> Tensor:
    """Upper bound of the norm of a convolution V whose symbol has norm at most 1 on the grid (see above).

    Args:
        others: `off_centre` of V.
        density: of the grid.

    >>> between_frequencies(off_centre(torch.ones(1, 1, 3, 3) / 9), density=6)
    tensor(1.0718)
    """
    theta = math.pi / (2 * density)
    columns = others.sum(0)
    rows = others.sum(1)
    b = (columns.amax() + rows.amax()) / 2  # Schur's bound, ‖A‖² ≤ ‖A‖₁ ‖A‖_∞, and means
    fall = b * (1 - math.cos(2 * theta))  # along one axis
    anywhere = 1 / math.cos(theta) ** 2
    around_a_constant = 1 + 2 * fall
    return around_a_constant.clamp_max(anywhere)

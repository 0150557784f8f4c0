r"""A look one layer further down: an SLL block, the sorted pairs below it, and the layer that these sort.

`dual` lets the features u of a block move by all that the layers below allow. But u = R s(h) + b, with sorted pairs
s and h = Cv + d, and C may shrink just the move that does harm. So the move is one of v here, ‖δ‖ ≤ ρ, and the pairs
are looked into as the units are.

*Pairs.* In the sums and differences of its pairs, (h_a + h_b)/√2 and τ = (h_b − h_a)/√2, to sort h is to turn τ into
|τ|, and nothing else. Pair p moves by t_p = (Cδ)_p; it cannot swap if |τ_p| > ρ‖C_p‖. The others are P.

*Units.* With c = −2 Vᵀw as in `dual`, unit k adds c_k relu(x_k + s_k) to the gap. Where c_k ≥ 0 it adds no less than
its tangent, and where it cannot switch it is its tangent. The others are U.

*Prices.* For every g, m, n > 0 and r > 0, with φ and ψ solved on paper,

    c_k relu(x_k + s_k) − c_k relu(x_k) ≥ g_k s_k + φ_k − r n s_k² / 2      for k in U,
    q_p (|τ_p + t_p| − |τ_p|) ≥ m_p sign(τ_p) t_p + ψ_p − (1 − 2r‖B‖²) n t_p² / 2     for p in P,

where q = Rᵀ(w + Vg) is the slope of the gap in s(h). The units of U move by s = Aδ' + Bδ'': δ' is the move of h where
s is sure to be linear, and δ'' that of the |τ| of P, no longer than t_P. So ‖s‖² ≤ 2 ‖A Cδ‖² + 2 ‖B‖² ‖t_P‖², and what
is charged in all is n δᵀCᵀFᵀFCδ / 2, where F stacks √(2r) A and the rows of P. With l the slope in h, G = CCᵀ, K = FGFᵀ
and a > ‖K‖, the least over δ is

    gap(δ) ≥ gap(0) + Σ φ + Σ ψ − [lᵀGl + zᵀ(a − K)⁻¹z] / 2an − anρ² / 2,   z = FGl.

Any g, m and n will do, so the search for the best of them may stop anywhere. All that depends on them is of the size of
U and P: l is the slope of what is sure, plus g A, plus m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipguide.robustness.certificates.block import Block
from lipguide.robustness.certificates.dual import better

__all__ = ["Sorted", "least_gap_below"]

STEPS = 30  # of the search; wherever it ends, the bound is sound
RATES = 0.2, 0.1  # for g over √K, for m over the root of the number of all pairs
PRICE_RATE = 0.05  # for log n
ROOM = 1.05  # a over ‖K‖, as far as a power iteration knows it
TURNS = 20  # of the power iteration
TRIES, MORE = 4, 1.2  # where it has not found the norm, a is raised so often, and by so much
SHARE = 0.5  # 2r‖B‖² at most
CUSHION = 1e-9  # of all that is summed up, for the rounding of float64
PART = 8  # gaps at a time


@dataclass(frozen=True)
class Sorted:
    """What lies below a block, in float64, in sums and differences of pairs: H/2 sums, then H/2 differences.

    Args:
        gram: (H, H), C Cᵀ.
        read: (D, H), R.
        bias: (D,), b.
    """

    gram: Tensor
    read: Tensor
    bias: Tensor

    @property
    def lengths(self) -> Tensor:
        """(H/2,), ‖C_p‖ of the differences."""
        return self.gram.diagonal()[len(self.gram) // 2 :].clamp(min=0).sqrt()


@dataclass(frozen=True)
class _Dual:
    """The right side above, for M gaps."""

    gap: Tensor  # (M,)
    open: _Open
    form: Tensor  # [A; P] G [A; P]ᵀ, (M, U + P, U + P)
    linear: Tensor  # [A; P] G l₀, (M, U + P)
    alone: Tensor  # l₀ᵀ G l₀, (M,)
    inverse: Tensor  # S (a − K)⁻¹ S with F = S [A; P], (M, U + P, U + P)
    a: Tensor  # (M,)
    r: Tensor  # (M,)
    left: Tensor  # 1 − 2r‖B‖², (M,)
    start: tuple[Tensor, Tensor, Tensor]  # g (M, U), m (M, P) and log n (M,) of the search
    rates: tuple[float, float, float]  # of it, for each
    reach: float

    def single(self) -> _Dual:
        """In single precision."""
        return _Dual(*(_single(getattr(self, field.name)) for field in fields(self)))

    def terms(self, g: Tensor, m: Tensor, log_n: Tensor) -> tuple[Tensor, ...]:
        """What is summed up: of units, of pairs, of the slope and of the length, (M,) each."""
        n, o = log_n.exp()[:, None], self.open
        phi = _kinked(o.x, o.c, 0.0, g, self.r[:, None] * n)
        q = o.q + (g[:, None] @ o.turns)[:, 0]
        psi = _kinked(o.size, q, q, m, self.left[:, None] * n)
        y = torch.cat([g * o.units, m * o.here], 1)
        z = (self.form @ y[:, :, None])[:, :, 0] + self.linear
        slope = (y * (z + self.linear)).sum(1) + self.alone + (z[:, None] @ self.inverse @ z[:, :, None])[:, 0, 0]
        price = self.a * n[:, 0]
        return (phi * o.units).sum(1), (psi * o.here).sum(1), -slope / (2 * price), -price * self.reach**2 / 2

    def bound(self, g: Tensor, m: Tensor, log_n: Tensor) -> Tensor:
        """(M,), for the search."""
        return self.gap + sum(self.terms(g, m, log_n))

    def surely(self, g: Tensor, m: Tensor, log_n: Tensor) -> Tensor:
        """The bound, less what rounding may have added."""
        terms, n, o = self.terms(g, m, log_n), log_n.exp(), self.open
        units = ((g.abs() + o.c.abs()) * o.x.abs()).sum(1) + n * self.r * o.x.square().sum(1)
        pairs = ((m.abs() + o.q.abs()) * o.size).sum(1) + n * o.size.square().sum(1)
        return self.gap + sum(terms) - CUSHION * (self.gap.abs() + units + pairs + sum(term.abs() for term in terms))


def _kinked(at: Tensor, right: Tensor, left: Tensor | float, line: Tensor, price: Tensor) -> Tensor:
    """The largest that can be added to line · s − price · s² / 2 to stay below f(at + s) − f(at) for every s, where f
    rises by `right` to the right of 0 and by `left` to the left of it: φ and ψ."""
    falls = torch.minimum(right - line - price * at, left + line + price * at).clamp(max=0)
    return line * at - right * at.relu() - left * (-at).relu() + price * at.square() / 2 - falls.square() / (2 * price)


def _single(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = [_single(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.inference_mode(False)
@torch.no_grad()
def least_gap_below(
    gap: Tensor, w: Tensor, h: Tensor, block: Block, below: Sorted, reach: float, inner: float
) -> Tensor:
    """Lower bounds of M gaps, (M,), wherever what the layer below the pairs is given moves by `reach`; in float64.

    Args:
        gap: (M,), what wᵀ times the outputs of the block is now, up to what does not move.
        w: (M, D), of norm 1.
        h: (M, H), what is sorted, in sums and differences.
        inner: by how much the features of the block move at most.
    """
    if not len(gap):
        return gap
    least, through = [], block.filters @ below.read
    for some, its_w, its_h in zip(*(every.clone().split(PART) for every in (gap, w, h)), strict=True):
        open_ = _opened(its_w, its_h, block, below, through, reach, inner)
        dual, proved = _posed(some, open_, below, reach, (len(block.filters), h.shape[1] // 2))
        point = _highest(dual.single())
        least.append(torch.where(proved, dual.surely(*(part.double() for part in point)), -torch.inf))
    return torch.cat(least).nan_to_num(nan=-torch.inf)


class _Open(NamedTuple):
    """Of M gaps the units U and the pairs P that may switch, padded with what counts for nothing, and what is sure."""

    c: Tensor  # (M, U)
    x: Tensor  # (M, U)
    tangent: Tensor  # c where a unit is on, (M, U)
    units: Tensor  # which of U are no padding, (M, U)
    size: Tensor  # |τ|, (M, P)
    sign: Tensor  # of τ, (M, P)
    pair: Tensor  # where in all, (M, P)
    here: Tensor  # which of P are no padding, (M, P)
    q: Tensor  # the slope in |τ| of P without the units of U, (M, P)
    turns: Tensor  # B, what g adds to q, (M, U, P)
    l_0: Tensor  # the slope in h of what is sure without them, (M, H)
    rows: Tensor  # A, what g adds to that, (M, U, H)


def _opened(w: Tensor, h: Tensor, block: Block, below: Sorted, through: Tensor, reach: float, inner: float) -> _Open:
    """What may switch while the layer is given a move of `reach`, and the block one of `inner`.

    Args:
        through: VᵀR, (K, H), the part of each unit in the slope in s(h).
    """
    half = h.shape[1] // 2
    sums, tau = h.split(half, 1)
    size, sign = tau.abs(), torch.where(tau < 0, -1.0, 1.0).to(tau)
    x, c = block.before(torch.cat([sums, size], 1) @ below.read.mT + below.bias), block.pull(w)
    may_swap = size <= reach * below.lengths * (1 + CUSHION) + CUSHION
    may_switch = (x.abs() <= inner * block.lengths * (1 + CUSHION) + CUSHION) & (c < 0)
    tangent = c * (x > 0)
    (unit, units), (pair, here) = _padded(may_switch), _padded(may_swap)
    slope = (w + (tangent * ~may_switch) @ block.filters) @ below.read  # in s(h), (M, H)
    rows = through[unit] * units[:, :, None]  # (M, U, H)
    sure = torch.cat([torch.ones_like(sums), sign * ~may_swap], 1)  # how s(h) goes with h where that is sure
    of_unit = (part.gather(1, unit) * units for part in (c, x, tangent))
    of_pair = (part.gather(1, pair) * here for part in (size, sign))
    turns = rows[:, :, half:].gather(2, _across(pair, rows)) * here[:, None]
    q = slope[:, half:].gather(1, pair) * here
    return _Open(*of_unit, units, *of_pair, pair, here, q, turns, slope * sure, rows * sure[:, None])


def _posed(gap: Tensor, open_: _Open, below: Sorted, reach: float, many: tuple[int, int]) -> tuple[_Dual, Tensor]:
    """The dual, and for which gaps its matrix is proved to be positive.

    Args:
        many: how many units and pairs there are.
    """
    form, linear, alone = _products(open_, below.gram)
    turned = torch.linalg.eigvalsh(open_.turns @ open_.turns.mT)[:, -1].clamp(min=CUSHION) * (1 + CUSHION)  # ‖B‖²
    r = (SHARE / (2 * turned)).clamp(max=1.0)
    scale = torch.cat([(2 * r).sqrt()[:, None].expand_as(open_.c), torch.ones_like(open_.q)], 1)
    m = open_.q + (open_.tangent[:, None] @ open_.turns)[:, 0]
    y = torch.cat([open_.tangent, m], 1)  # if all stay as they are
    steep = (_squared(y, form, linear) + alone).clamp(min=CUSHION).sqrt()
    a, inverse, proved = _charged(form * scale[:, :, None] * scale[:, None], steep)
    return _Dual(
        gap=gap,
        open=open_,
        form=form,
        linear=linear,
        alone=alone,
        inverse=inverse * scale[:, :, None] * scale[:, None],
        a=a,
        r=r,
        left=1 - 2 * r * turned,
        start=(open_.tangent, m, (steep / a).log() - math.log(max(reach, 1e-12))),
        rates=(RATES[0] / math.sqrt(many[0]), RATES[1] / math.sqrt(many[1]), PRICE_RATE),
        reach=reach,
    ), proved


def _products(open_: _Open, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With the rows of A and P, one above the other: [A; P] G [A; P]ᵀ, [A; P] G l₀ and l₀ᵀ G l₀."""
    half, (pair, sign, rows, l_0) = len(gram) // 2, (open_.pair, open_.sign, open_.rows, open_.l_0)
    g_rows, g_l = rows @ gram, l_0 @ gram
    corner = g_rows[:, :, half:].gather(2, _across(pair, rows)) * sign[:, None]
    last = gram[half:, half:][pair[:, :, None], pair[:, None]] * sign[:, :, None] * sign[:, None]
    form = torch.cat([torch.cat([g_rows @ rows.mT, corner], 2), torch.cat([corner.mT, last], 2)], 1)
    linear = torch.cat([(rows @ g_l[:, :, None])[:, :, 0], g_l[:, half:].gather(1, pair) * sign], 1)
    return form, linear, (l_0 * g_l).sum(1)


def _squared(y: Tensor, form: Tensor, linear: Tensor) -> Tensor:
    """yᵀ form y + 2 yᵀ linear, (M,)."""
    return (y * ((form @ y[:, :, None])[:, :, 0] + 2 * linear)).sum(1)


def _charged(charges: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For matrices K (M, n, n): a, a little more than the norm and no less than `least`, (M,), the inverse of a − K,
    and whether this is proved to be positive."""
    vector = torch.ones_like(charges[:, :, :1])
    for _ in range(TURNS):
        vector = torch.nn.functional.normalize(charges @ vector, dim=1, eps=1e-30)
    a = torch.maximum(ROOM * (charges @ vector).norm(dim=(1, 2)), least) + CUSHION
    eye = torch.eye(charges.shape[1], dtype=charges.dtype, device=charges.device)
    for _ in range(TRIES):  # the iteration may not have found the largest
        factor, failed = torch.linalg.cholesky_ex((a[:, None, None] - CUSHION) * eye - charges)
        if not failed.any():
            break
        a = torch.where(failed == 0, a, MORE * a)
    proved = failed == 0
    inverse = torch.cholesky_inverse(torch.where(proved[:, None, None], factor, eye))
    return a, inverse, proved


def _highest(dual: _Dual) -> tuple[Tensor, Tensor, Tensor]:
    """g, m and log n of the largest values that Adam meets, each row by itself."""
    variables = [value.clone().requires_grad_() for value in dual.start]
    most, best = torch.full_like(dual.gap, -math.inf), [value.detach().clone() for value in variables]
    groups = [{"params": [v], "lr": rate} for v, rate in zip(variables, dual.rates, strict=True)]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for _ in range(STEPS):
        with torch.enable_grad():
            value = dual.bound(*variables)
            slopes = torch.autograd.grad(value.sum(), variables)
        most, best = better(value, variables, most, best)
        for variable, slope in zip(variables, slopes, strict=True):
            variable.grad = -slope
        adam.step()
    return best[0], best[1], best[2]


def _padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The places (M, n) where each row of a mask (M, N) is true, as many as in the row with most, and which count."""
    most = max(1, int(mask.sum(1).max()))
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return places, mask.gather(1, places)


def _across(places: Tensor, rows: Tensor) -> Tensor:
    """(M, U, P): the same places for every row of (M, U, H)."""
    return places[:, None].expand(-1, rows.shape[1], -1)

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

Any g, m and n will do, so the search for the best of them may stop anywhere, and go by single precision. All that it
needs there is of the size of U and P: with y = (g, m) and F = S [A; P],

    lᵀGl + zᵀ(a − K)⁻¹z = yᵀTy + 2yᵀt + t₀,   T = S⁻¹ [a²(a − K)⁻¹ − a] S⁻¹,   t = a S⁻¹(a − K)⁻¹ S [A; P] G l₀,

where l₀ is the slope of what is sure. What it ends with is put into the bound in double precision: for any x and
ζ > 0 with a − K ≥ ζ, and the remainder ϱ = z − (a − K)x, no more is needed than zᵀ(a − K)⁻¹z ≤ xᵀ(z + ϱ) + ‖ϱ‖²/ζ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.precision import full_precision
from lipguide.robustness.certificates.block import Block
from lipguide.robustness.certificates.climb import highest

__all__ = ["Sorted", "least_gap_below"]

STEPS = 60  # of the search; wherever it ends, the bound is sound
RATES = 0.2, 0.1  # for g over √K, for m over the root of the number of all pairs
PRICE_RATE = 0.05  # for log n
MEMORY = 0.99  # of squared slopes
ROOM = 1.05  # a over ‖K‖, as far as a power iteration knows it
TURNS = 20  # of the power iteration
TRIES, MORE = 4, 1.2  # where it has not found the norm, a is raised so often, and by so much
FLOOR = 0.01  # ζ over a
SHARE = 0.5  # 2r‖B‖² at most
CUSHION = 1e-9  # of all that is summed up, for the rounding of float64
HALF_UNIT = 2.0**-24  # of the rounding of one operation in float32
PART = 16  # gaps at a time


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

    @cached_property
    def lengths(self) -> Tensor:
        """(H/2,), ‖C_p‖ of the differences."""
        return self.gram.diagonal()[len(self.gram) // 2 :].clamp(min=0).sqrt()

    @cached_property
    def single(self) -> Tensor:
        """The gram in single precision."""
        return self.gram.float()


class _Open(NamedTuple):
    """Of M gaps the units U and the pairs P that may switch, padded with what counts for nothing, and what is sure."""

    c: Tensor  # (M, U)
    x: Tensor  # (M, U)
    tangent: Tensor  # c where a unit is on, (M, U)
    units: Tensor  # which of U are no padding, (M, U)
    size: Tensor  # |τ|, (M, P)
    sign: Tensor  # of τ, (M, P), 0 for padding
    pair: Tensor  # where in all, (M, P)
    here: Tensor  # which of P are no padding, (M, P)
    q: Tensor  # the slope in |τ| of P without the units of U, (M, P)
    turns: Tensor  # B, what g adds to q, (M, U, P)
    l_0: Tensor  # the slope in h of what is sure without them, (M, H)
    rows: Tensor  # A, what g adds to that, (M, U, H)

    def single(self) -> _Open:
        """In single precision."""
        return _Open(*(part.float() if part.is_floating_point() else part for part in self))

    def slope(self, y: Tensor) -> Tensor:
        """[A; P]ᵀ y, (M, H), of y (M, U + P)."""
        of_units, of_pairs = y.split([self.c.shape[1], self.q.shape[1]], 1)
        of_rows = (of_units[:, None] @ self.rows)[:, 0]
        return of_rows.scatter_add(1, self.l_0.shape[1] // 2 + self.pair, of_pairs * self.sign)

    def along(self, v: Tensor) -> Tensor:
        """[A; P] v, (M, U + P), of vectors (M, H)."""
        of_pairs = v[:, self.l_0.shape[1] // 2 :].gather(1, self.pair) * self.sign
        return torch.cat([(self.rows @ v[:, :, None])[:, :, 0], of_pairs], 1)

    def sized(self) -> _Open:
        """With the sizes of all that is in A and P."""
        return self._replace(rows=self.rows.abs(), sign=self.sign.abs())


class _Charge(NamedTuple):
    """What the moves of M gaps are charged."""

    a: Tensor  # (M,)
    r: Tensor  # (M,)
    left: Tensor  # 1 − 2r‖B‖², (M,)
    scale: Tensor  # S, (M, U + P)
    inverse: Tensor  # about (a − K)⁻¹, (M, U + P, U + P), in single precision
    proved: Tensor  # whether a − K ≥ ζ, (M,)


class _Point(NamedTuple):
    """g (M, U), m (M, P) and log n (M,)."""

    g: Tensor
    m: Tensor
    log_n: Tensor


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
    gap, w, h = (every.clone() for every in (gap, w, h))
    half, through = h.shape[1] // 2, block.filters @ below.read
    many = (h[:, half:].abs() <= reach * below.lengths).sum(1)  # pairs that may swap: like are solved with like
    least = torch.full_like(gap, -torch.inf)
    with full_precision():
        for part in many.argsort().split(PART):
            open_ = _opened(w[part], h[part], block, below, through, reach, inner)
            least[part] = _least(gap[part], open_, below, reach, (len(block.filters), half))
    # The search may miss what constants know.
    return torch.fmax(least, gap - block.steepest * inner).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


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


def _least(gap: Tensor, open_: _Open, below: Sorted, reach: float, many: tuple[int, int]) -> Tensor:
    """The bounds (M,) of some gaps.

    Args:
        many: how many units and pairs there are.
    """
    single = open_.single()
    form, linear, alone = _products(single, below.single)
    m = open_.q + (open_.tangent[:, None] @ open_.turns)[:, 0]
    start = _Point(open_.tangent, m, torch.zeros_like(gap))  # if all stay as they are
    y = torch.cat([start.g, start.m], 1).float()
    steep = (_squared(y, form, linear) + alone).clamp(min=CUSHION).sqrt()
    charge = _charged(open_, form, steep, below)
    start = start._replace(log_n=(steep / charge.a).log().double() - math.log(max(reach, 1e-12)))
    rates = RATES[0] / math.sqrt(many[0]), RATES[1] / math.sqrt(many[1]), PRICE_RATE
    search = _Search.of(single, charge, linear, alone, reach)
    point = _Point(*(part.double() for part in highest(search.value, [p.float() for p in start], rates, STEPS, MEMORY)))
    return torch.where(charge.proved, _surely(gap, open_, charge, below, reach, point), -torch.inf)


def _products(open_: _Open, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With the rows of A and P, one above the other: [A; P] G [A; P]ᵀ, [A; P] G l₀ and l₀ᵀ G l₀."""
    half, (pair, sign, rows, l_0) = len(gram) // 2, (open_.pair, open_.sign, open_.rows, open_.l_0)
    g_rows, g_l = rows @ gram, l_0 @ gram
    corner = g_rows[:, :, half:].gather(2, _across(pair, rows)) * sign[:, None]
    last = gram[half:, half:][pair[:, :, None], pair[:, None]] * sign[:, :, None] * sign[:, None]
    form = torch.cat([torch.cat([g_rows @ rows.mT, corner], 2), torch.cat([corner.mT, last], 2)], 1)
    return form, open_.along(g_l), (l_0 * g_l).sum(1)


def _charged(open_: _Open, form: Tensor, least: Tensor, below: Sorted) -> _Charge:
    """With a that is a little more than ‖K‖ and no less than `least`.

    Single precision does, for what it may have done is known: K is not as computed by more than its terms' sizes
    allow, and a Cholesky factor that is found proves more than −(n + 2) n u times the largest entry of the diagonal.
    """
    turned = torch.linalg.eigvalsh(open_.turns @ open_.turns.mT)[:, -1].clamp(min=CUSHION) * (1 + CUSHION)  # ‖B‖²
    r = (SHARE / (2 * turned)).clamp(max=1.0)
    scale = torch.cat([(2 * r).sqrt()[:, None].expand_as(open_.c), torch.ones_like(open_.q)], 1)
    rooted = scale.float()
    k = form * rooted[:, :, None] * rooted[:, None]
    n, vector = k.shape[1], torch.ones_like(k[:, 0])
    for _ in range(TURNS):
        vector = torch.nn.functional.normalize(_times(vector, k), dim=1, eps=1e-30)
    wrong = _rounded(open_, rooted, below)
    share = FLOOR + (n + 2) * n * HALF_UNIT
    a = torch.maximum(ROOM * (_times(vector, k).norm(dim=1) + wrong) / (1 - share), least) + CUSHION
    for _ in range(TRIES):  # the iteration may not have found the largest
        _, failed = _factor(a * (1 - share) - wrong, k)
        if not failed.any():
            break
        a = torch.where(failed, MORE * a, a)
    factor, worse = _factor(a, k)
    proved = ~(failed | worse)
    factor[~proved] = torch.eye(n, dtype=k.dtype, device=k.device)
    return _Charge(a.double(), r, 1 - 2 * r * turned, scale, torch.cholesky_inverse(factor), proved)


def _factor(a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of a − K, (M, n, n), and for which there is none."""
    rest = -k
    rest.diagonal(dim1=1, dim2=2).add_(a[:, None])
    factor, failed = torch.linalg.cholesky_ex(rest)
    return factor, failed > 0


def _rounded(open_: _Open, rooted: Tensor, below: Sorted) -> Tensor:
    """By how much the norm of K may be wrong in single precision, (M,): no more than the largest row of |F||G||F|ᵀ
    times what a sum so long may lose."""
    sizes = open_.single().sized()
    largest = rooted * sizes.along(sizes.slope(rooted) @ below.single.abs())
    return 2 * (len(below.gram) + 8) * HALF_UNIT * largest.amax(1)


class _Search(NamedTuple):
    """What is searched, in single precision: the right side above without the gap."""

    open: _Open
    a: Tensor  # (M,)
    r: Tensor  # (M,)
    left: Tensor  # (M,)
    bent: Tensor  # T, (M, U + P, U + P)
    tilt: Tensor  # t, (M, U + P)
    alone: Tensor  # t₀, (M,)
    reach: float

    @classmethod
    def of(cls, open_: _Open, charge: _Charge, linear: Tensor, alone: Tensor, reach: float) -> _Search:
        a, r, left = charge.a.float(), charge.r.float(), charge.left.float()
        rooted = charge.scale.float()
        solved, rooted = _times(rooted * linear, charge.inverse), a[:, None] / rooted
        bent = charge.inverse * rooted[:, :, None]
        bent *= rooted[:, None]
        bent.diagonal(dim1=1, dim2=2).sub_(rooted.square() / a[:, None])
        more = (linear * solved * a[:, None] / rooted).sum(1)
        return cls(open_, a, r, left, bent, rooted * solved, alone + more, reach)

    def value(self, g: Tensor, m: Tensor, log_n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(M,), and its slopes in all three."""
        o, n = self.open, log_n.exp()[:, None]
        y = torch.cat([g, m], 1)
        half = _times(y, self.bent) + self.tilt  # of the slope of yᵀTy + 2yᵀt
        steep = (y * (half + self.tilt)).sum(1) + self.alone
        q = o.q + (g[:, None] @ o.turns)[:, 0]
        phi, in_g, _, of_units = _kinked(o.x, o.c, 0.0, g, self.r[:, None] * n)
        psi, in_m, in_q, of_pairs = _kinked(o.size, q, q, m, self.left[:, None] * n)
        spent, length = 1 / (self.a[:, None] * n), self.a * n[:, 0] * self.reach**2 / 2
        slope = steep * spent[:, 0] / 2
        of_g, of_m = (half * spent).split([g.shape[1], m.shape[1]], 1)
        turned = (o.turns @ in_q[:, :, None])[:, :, 0]
        in_n = self.r * n[:, 0] * of_units.sum(1) + self.left * n[:, 0] * of_pairs.sum(1)
        value = phi.sum(1) + psi.sum(1) - slope - length
        return value, (in_g + turned - of_g) * o.units, (in_m - of_m) * o.here, in_n + slope - length


def _surely(gap: Tensor, open_: _Open, charge: _Charge, below: Sorted, reach: float, point: _Point) -> Tensor:
    """The bound at a point, less what rounding may have added, in double precision."""
    o, (g, m, log_n), (a, r, left) = open_, point, charge[:3]
    n = log_n.exp()
    l = o.l_0 + o.slope(torch.cat([g * o.units, m * o.here], 1))  # noqa: E741
    g_l = l @ below.gram
    slope = (l * g_l).sum(1) + _solved(o.along(g_l), open_, charge, below)
    phi, psi = _kinks(o, r, left, point)
    terms = phi, psi, -slope / (2 * a * n), -a * n * reach**2 / 2
    units = ((g.abs() + o.c.abs()) * o.x.abs()).sum(1) + n * r * o.x.square().sum(1)
    pairs = ((m.abs() + o.q.abs()) * o.size).sum(1) + n * o.size.square().sum(1)
    return gap + sum(terms) - CUSHION * (gap.abs() + units + pairs + sum(term.abs() for term in terms))


def _solved(along: Tensor, open_: _Open, charge: _Charge, below: Sorted) -> Tensor:
    """No less than zᵀ(a − K)⁻¹z, (M,), where z = F G l, from [A; P] G l: the remainder of a solution in single
    precision is solved once more, and what is left is charged."""
    a, scale = charge.a[:, None], charge.scale

    def nearly(right: Tensor) -> Tensor:
        size = right.abs().amax(1, keepdim=True).clamp(min=1e-300)
        return size * _times((right / size).float(), charge.inverse).double()

    def remainder(x: Tensor) -> Tensor:
        return z - a * x + scale * open_.along(open_.slope(scale * x) @ below.gram)

    z = scale * along
    x = nearly(z)
    x = x + nearly(remainder(x))
    rest = remainder(x)
    return (x * (z + rest)).sum(1) + rest.square().sum(1) / (FLOOR * charge.a)


def _kinks(open_: _Open, r: Tensor, left: Tensor, point: _Point) -> tuple[Tensor, Tensor]:
    """Σ φ and Σ ψ, (M,) each."""
    o, n = open_, point.log_n.exp()[:, None]
    phi = _kinked(o.x, o.c, 0.0, point.g, r[:, None] * n)[0]
    q = o.q + (point.g[:, None] @ o.turns)[:, 0]
    psi = _kinked(o.size, q, q, point.m, left[:, None] * n)[0]
    return (phi * o.units).sum(1), (psi * o.here).sum(1)


def _kinked(
    at: Tensor, right: Tensor, left: Tensor | float, line: Tensor, price: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest that can be added to line · s − price · s² / 2 to stay below f(at + s) − f(at) for every s, where f
    rises by `right` to the right of 0 and by `left` to the left of it: φ and ψ. With its slopes in `line`, in `right`
    and `left` together, and in `price`."""
    over, under = right - line - price * at, left + line + price * at
    rate = torch.minimum(over, under).clamp(max=0) / price
    signed = torch.where(over < under, rate, -rate)
    value = line * at - right * at.relu() - left * (-at).relu() + price * (at.square() - rate.square()) / 2
    return value, at + signed, -at.abs() - rate, (at.square() + rate.square()) / 2 + signed * at


def _times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Symmetric matrices (M, n, n) times vectors (M, n); from this side it is twice as fast."""
    return (vectors[:, None] @ matrices)[:, 0]


def _squared(y: Tensor, form: Tensor, linear: Tensor) -> Tensor:
    """yᵀ form y + 2 yᵀ linear, (M,)."""
    return (y * (_times(y, form) + 2 * linear)).sum(1)


def _padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The places (M, n) where each row of a mask (M, N) is true, as many as in the row with most, and which count."""
    most = max(1, int(mask.sum(1).max()))
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return places, mask.gather(1, places)


def _across(places: Tensor, rows: Tensor) -> Tensor:
    """(M, U, P): the same places for every row of (M, U, H)."""
    return places[:, None].expand(-1, rows.shape[1], -1)

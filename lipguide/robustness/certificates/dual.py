"""Whether a label holds in a whole ball: the last SLL block minimised over the ball by its Lagrangian dual.

`local_radius` lets all units that may switch do so at once, each to the worst. Yet a move δ of length ρ cannot do that:
to switch unit k costs |x_k| / ‖v_k‖ of it, with x = Vᵀu + b. With w = w_y − w_j and c = −2 Vᵀw the gap of two logits is

    gap(δ) = gap(0) + wᵀδ + cᵀ (relu(x + Vᵀδ) − relu(x)),

and its least value over ‖δ‖ ≤ ρ is what is asked for. As in SDP-CROWN (Chiu et al., 2025), a multiplier λ > 0 prices
the length, and any vector g says how much of a unit's part is counted as linear. With s = Vᵀδ and θ‖V‖² < 1, ‖δ‖² is
δᵀ (I − θVVᵀ) δ + θ‖s‖². To forget that s comes from δ can only lower the least value, and leaves two problems that are
solved on paper, one in δ and one for every unit by itself:

    gap(δ) ≥ gap(0) − cᵀ relu(x) + gᵀx − (w + Vg)ᵀ (I − θVVᵀ)⁻¹ (w + Vg) / 2λ − λρ² / 2
             + Σ_k [ θλ x_k² / 2 − min(c_k − g_k − θλ x_k, g_k + θλ x_k, 0)² / 2θλ ].

(For unit k write x_k + s_k = p − n with p, n ≥ 0, of which one is zero: its part is (c_k − g_k) p + g_k n +
θλ (p − n − x_k)² / 2.) This holds for every g and every λ > 0, so that the search for the best of them may stop
anywhere. The right side is concave in both; some steps of Adam come near its top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lipguide.robustness.certificates.block import Block
from lipguide.robustness.certificates.climb import highest
from lipguide.robustness.certificates.local import Opened, opened
from lipguide.robustness.certificates.radii import ATTACKERS_FAVOUR, SMALLEST

__all__ = ["holds_within", "least_gap"]

STEPS = 100  # of the search; wherever it ends, the bound is sound
RATE = 0.2  # over √K, for g: an entry of c is about 2 / √K
PRICE_RATE = 0.1  # for log λ
MEMORY = 0.999  # of squared slopes
CUSHION = 1e-9  # of a gap in units of ‖w‖, for its own rounding in float64
ROUNDING = 4  # of a sum of K numbers, in units of K ε times the sum of their sizes


def holds_within(
    model: nn.Sequential, images: Tensor, eps: float, labels: Tensor | None = None, batch_size: int = 256
) -> Tensor:
    """Which pictures surely keep their label at every L2 distance up to `eps`, (N, ...) to (N,) of booleans.

    Those for which `local_radius` is above `eps`, and more, of the same networks: they end in `lip.SLLLinear` and a
    dense head. What `radius` leaves open costs a search for each pair of classes. It holds in exact arithmetic.

    Args:
        eps: in units of the pixels, which lie in [0, 1].
        labels: classes (N,); False where they are not predicted. Without them it is the prediction that stays.
        batch_size: pictures at a time.

    >>> import lipguide as lip
    >>> _ = torch.manual_seed(0)
    >>> top = lip.SLLLinear(8, 8), lip.unit_rows(nn.Linear(8, 3))
    >>> model = nn.Sequential(nn.Flatten(), lip.orthogonal(nn.Linear(12, 8)), *top).eval()
    >>> images = torch.rand(50, 3, 2, 2)
    >>> near = lip.certificates.local_radius(model, images)
    >>> bool((holds_within(model, images, 0.1) >= (near > 0.1)).all())
    True
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, and a distance is a number, 0 or more")
    end = opened(model, images, labels, batch_size)
    sure = end.radius(batch_size) > eps
    reach = eps * end.below * (1 + ATTACKERS_FAVOUR)
    right = end.logits.argmax(1) == end.labels
    for part in (right & ~sure).nonzero()[:, 0].split(batch_size):
        sure[part] = _held(end, part, reach)
    return sure


def _held(end: Opened, pictures: Tensor, reach: float) -> Tensor:
    """Of some pictures: whether every other class stays below, wherever the features move by `reach`."""
    u, z, y = end.features[pictures], end.logits[pictures], end.labels[pictures]
    w = end.rows[y][:, None] - end.rows  # (N, C, D)
    gap, length = z.gather(1, y[:, None]) - z, w.norm(dim=2)  # (N, C)
    fall = end.block.steepest * (1 + CUSHION) * reach * length
    asked = (gap <= fall).scatter(1, y[:, None], False)
    held = ~asked
    if asked.any():
        unit = length[asked, None].clamp(min=SMALLEST)
        of = asked.nonzero()[:, 0]
        least = least_gap(gap[asked] / unit[:, 0], w[asked] / unit, u[of], end.block, reach)
        held[asked] = least > CUSHION
    return held.all(1)


def least_gap(gap: Tensor, w: Tensor, u: Tensor, block: Block, reach: float) -> Tensor:
    """Lower bounds of M gaps, (M,), wherever the features u (M, D) of a block move by `reach`; all in float64.

    Args:
        gap: (M,), what wᵀ times the outputs of the block is now, up to what does not move.
        w: (M, D), of norm 1.
    """
    v_t, inverse = block.filters, block.free
    c, x = block.pull(w), block.before(u)  # (M, K)
    # (w + Vg)ᵀ (I − θVVᵀ)⁻¹ (w + Vg) = alone + 2 gᵀ mixed + gᵀ both g
    dual = _Dual(
        there=gap - (c * x.relu()).sum(1),
        c=c,
        x=x,
        alone=(w @ inverse * w).sum(1),
        mixed=w @ inverse @ v_t.mT,
        both=v_t @ inverse @ v_t.mT,
        theta=block.theta,
        reach=reach,
    )
    with torch.inference_mode(False), torch.no_grad():
        # Wherever the search ends the bound holds, so it may go by single precision; what it ends with may not.
        start, rates = _start(dual), (RATE / math.sqrt(c.shape[1]), PRICE_RATE)
        g, log_price = highest(dual.single().bound, start, rates, STEPS, MEMORY)
        least = dual.surely(g.double(), log_price.double())
    return torch.fmax(least, gap - block.steepest * reach)  # the search may miss what constants know


@dataclass(frozen=True)
class _Dual:
    """The right side above, for M gaps."""

    there: Tensor  # gap(0) − cᵀ relu(x), (M,)
    c: Tensor  # (M, K)
    x: Tensor  # (M, K)
    alone: Tensor  # (M,)
    mixed: Tensor  # (M, K)
    both: Tensor  # (K, K)
    theta: float
    reach: float

    def single(self) -> _Dual:
        """In single precision."""
        parts = (getattr(self, field.name) for field in fields(self))
        return _Dual(*(part.float() if isinstance(part, Tensor) else part for part in parts))

    def surely(self, g: Tensor, log_price: Tensor) -> Tensor:
        """The bound, less what the rounding of its sums may have added: where λ is large they cancel."""
        value, _, _ = self.bound(g, log_price)
        c, x, price = self.c, self.x, log_price.exp()
        own = self.theta * price[:, None]
        units = (g * x).abs() + own * x.square() + ((c - g).square() + g.square()) / own + (c * x).abs()
        a = self.alone + (g.abs() * (2 * self.mixed.abs() + g.abs() @ self.both.abs())).sum(1)
        size = self.there.abs() + units.sum(1) + a / price + price * self.reach**2
        return value - ROUNDING * c.shape[1] * torch.finfo(value.dtype).eps * size

    def bound(self, g: Tensor, log_price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At g (M, K) and log λ (M,), and its slopes in both."""
        c, x, price = self.c, self.x, log_price.exp()
        bent, own = g @ self.both, self.theta * price[:, None]  # θλ
        a = self.alone + (g * (2 * self.mixed + bent)).sum(1)
        on, off = c - g - own * x, g + own * x
        falls = torch.minimum(on, off).clamp(max=0)
        units = (g * x + own * x.square() / 2 - falls.square() / (2 * own)).sum(1)
        value = self.there + units - a / (2 * price) - price * self.reach**2 / 2
        rate, sign = falls / own, 1 - 2 * (on < off).to(x)  # of what a fall is in g
        in_g = x - rate * sign - (self.mixed + bent) / price[:, None]
        in_price = self.theta * (x.square() / 2 - rate * sign * x + rate.square() / 2).sum(1)
        return value, in_g, price * in_price + a / (2 * price) - price * self.reach**2 / 2


def _start(dual: _Dual) -> tuple[Tensor, Tensor]:
    """The best g and λ, in single precision, for units that stay as they are and a gap of slope 1."""
    g, log_price = dual.c * (dual.x > 0), torch.full_like(dual.there, -math.log(max(dual.reach, 1e-12)))
    return g.float(), log_price.float()

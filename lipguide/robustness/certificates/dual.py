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
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lipguide.robustness.certificates.local import Opened, opened
from lipguide.robustness.certificates.radii import ATTACKERS_FAVOUR, SMALLEST

__all__ = ["holds_within", "least_gap"]

SHARE = 0.9  # θ‖V‖², where ‖V‖ ≥ 1: of the length, what the units are charged for
STEPS = 100  # of the search; wherever it ends, the bound is sound
RATE = 0.2  # over √K, for g: an entry of c is about 2 / √K
PRICE_RATE = 0.1  # for log λ
CUSHION = 1e-9  # of a gap in units of ‖w‖, far above the rounding of float64 sums


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
    block = opened(model, images, labels, batch_size)
    sure = block.radius(batch_size) > eps
    reach = eps * block.below * (1 + ATTACKERS_FAVOUR)
    right = block.logits.argmax(1) == block.labels
    square = _square(block)
    for part in (right & ~sure).nonzero()[:, 0].split(batch_size):
        sure[part] = _held(block, part, reach, square)
    return sure


def _held(block: Opened, pictures: Tensor, reach: float, square: float) -> Tensor:
    """Of some pictures: whether every other class stays below, wherever the features move by `reach`; `square` is
    ‖V‖² or 1."""
    u, z, y = block.features[pictures], block.logits[pictures], block.labels[pictures]
    w = block.rows[y][:, None] - block.rows  # (N, C, D)
    gap, length = z.gather(1, y[:, None]) - z, w.norm(dim=2)  # (N, C)
    fall = (2 * square - 1) * (1 + CUSHION) * reach * length  # at most, for ‖I − 2 V D Vᵀ‖ ≤ max(1, 2 ‖V‖² − 1)
    asked = (gap <= fall).scatter(1, y[:, None], False)
    held = ~asked
    if asked.any():
        unit = length[asked, None].clamp(min=SMALLEST)
        of = asked.nonzero()[:, 0]
        least = _dual(gap[asked] / unit[:, 0], w[asked] / unit, u[of], block, reach, SHARE / square)
        held[asked] = least > CUSHION
    return held.all(1)


class Ends(Protocol):
    """An SLL block in float64: its filters Vᵀ (K, D) and its bias (K,)."""

    @property
    def filters(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor: ...


def least_gap(gap: Tensor, w: Tensor, u: Tensor, block: Ends, reach: float) -> Tensor:
    """Lower bounds of M gaps, (M,), wherever the features u (M, D) of a block move by `reach`; all in float64.

    Args:
        gap: (M,), what wᵀ times the outputs of the block is now, up to what does not move.
        w: (M, D), of norm 1.
        block: its filters and bias.
    """
    return _dual(gap, w, u, block, reach, SHARE / _square(block))


def _square(block: Ends) -> float:
    """‖V‖² or 1."""
    return max(1.0, float(torch.linalg.eigvalsh(block.filters @ block.filters.mT)[-1]))


def _dual(gap: Tensor, w: Tensor, u: Tensor, block: Ends, reach: float, theta: float) -> Tensor:
    """A lower bound of every gap (M,) in the ball, with w (M, D) of norm 1 and the features u (M, D)."""
    v_t = block.filters
    c, x = -2 * w @ v_t.mT, u @ v_t.mT + block.bias  # (M, K)
    there = gap - (c * x.relu()).sum(1)
    eye = torch.eye(v_t.shape[1], dtype=v_t.dtype, device=v_t.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(eye - theta * v_t.mT @ v_t))
    # (w + Vg)ᵀ (I − θVVᵀ)⁻¹ (w + Vg) = alone + 2 gᵀ mixed + gᵀ both g
    alone, mixed, both = (w @ inverse * w).sum(1), w @ inverse @ v_t.mT, v_t @ inverse @ v_t.mT

    def bound(g: Tensor, log_price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """And its slopes in g and in log λ."""
        price = log_price.exp()
        bent, own = g @ both, theta * price[:, None]  # θλ
        a = alone + (g * (2 * mixed + bent)).sum(1)
        on, off = c - g - own * x, g + own * x
        falls = torch.minimum(on, off).clamp(max=0)
        units = (g * x + own * x.square() / 2 - falls.square() / (2 * own)).sum(1)
        value = there + units - a / (2 * price) - price * reach**2 / 2
        rate, sign = falls / own, 1 - 2 * (on < off).to(x)  # of what a fall is in g
        in_g = x - rate * sign - (mixed + bent) / price[:, None]
        in_price = theta * (x.square() / 2 - rate * sign * x + rate.square() / 2).sum(1)
        return value, in_g, price * in_price + a / (2 * price) - price * reach**2 / 2

    with torch.inference_mode(False), torch.no_grad():
        log_price = torch.full_like(gap, -math.log(max(reach, 1e-12)))
        rates = (RATE / math.sqrt(len(v_t)), PRICE_RATE)
        return _highest(bound, (c * (x > 0), log_price), rates)


def _highest(
    function: Callable[..., tuple[Tensor, ...]], variables: tuple[Tensor, ...], rates: tuple[float, ...]
) -> Tensor:
    """The largest values (M,) that Adam meets, each row of the variables by itself.

    Args:
        function: of the variables, the values and their slopes in each variable.
    """
    best = torch.full_like(variables[-1], -math.inf)
    moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in variables]
    for step in range(1, STEPS + 1):
        values, *slopes = function(*variables)
        best = torch.fmax(best, values)
        for v, slope, rate, (mean, square) in zip(variables, slopes, rates, moments, strict=True):
            mean.lerp_(slope, 0.1)
            square.lerp_(slope.square(), 1e-3)
            spread = (square / (1 - 0.999**step)).sqrt() + 1e-12
            v += rate * mean / (1 - 0.9**step) / spread
    return best

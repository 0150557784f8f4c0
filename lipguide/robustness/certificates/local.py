"""A larger radius for a network that ends in an SLL block: what the block can do near *this* picture.

`radius` divides the gap of two logits by L ‖w‖, w = w_y − w_j, as if the last block could pass a gradient on at its
full length anywhere. An SLL block, z = u − 2 V relu(Vᵀu + b), seldom does. With D the diagonal of its units that are
on, the gradient of the gap is w + V D c, where c = −2 Vᵀw, and because D² = D

    ‖w + V D c‖² = ‖w‖² − (Dc)ᵀ (I − VᵀV) (Dc).

So it loses length by every unit that is on and does not merely reflect. Within a distance t of u, unit k cannot switch
if |v_kᵀu + b_k| > t ‖v_k‖. Those are decided; the others may be on or off, and each is let take any value between.
That leaves a convex quadratic over a box, which a tangent plane bounds from below wherever it is laid. (It is convex
for ‖V‖ ≤ 1; by what ‖V‖ is above 1, the bound is lowered.) The result N(t) bounds the gradient at every point within
t, so on a straight way out the gap falls by ∫ N at most. N is taken constant on short pieces, at its value at their
far end, and the features move by no more than L ε. The radius is where the integral has used up the gap; it is never
below `radius`.

Orthogonal layers and sorted pairs have nothing to gain here: in them a gradient keeps its length whichever pairs are
swapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipguide.bounds.network import lipschitz_bound
from lipguide.bounds.walk import check_untouched
from lipguide.layers.brick import computes_as
from lipguide.layers.export import uncached
from lipguide.layers.sll import SLLLinear
from lipguide.robustness.certificates.block import CUSHION, Block
from lipguide.robustness.certificates.conditions import checked_logits, in_float64
from lipguide.robustness.certificates.radii import ATTACKERS_FAVOUR, SMALLEST, check_logits

__all__ = ["Opened", "farthest", "local_radius", "opened"]

PIECES, FEW = 8, 4  # on which the gradient's bound is constant
REACH = 1.5  # of the pieces together, in units of `radius`; beyond, the gradient is bounded by ‖w‖
DESCENTS = 10  # steps towards the smallest value of the quadratic; a tangent laid anywhere is sound


def local_radius(model: nn.Sequential, images: Tensor, labels: Tensor | None = None, batch_size: int = 256) -> Tensor:
    """Certified L2 radius of every picture, (N, ...) to (N,) in float64: at least that of `radius`, often more.

    The network has to end in `lip.SLLLinear` and a dense head. Everything below these two counts by its bound, so that
    only the block is looked into. The conditions are checked as `checked_logits` does. It is zero or below where the
    label is wrong, and holds in exact arithmetic: see `lipguide.robustness.certificates.radii`.

    Args:
        labels: classes (N,); without them it is the radius in which the prediction stays.
        batch_size: pictures at a time.

    >>> import lipguide as lip
    >>> _ = torch.manual_seed(0)
    >>> block = lip.SLLLinear(8, 4)
    >>> model = nn.Sequential(nn.Flatten(), lip.orthogonal(nn.Linear(12, 8)), block, lip.unit_rows(nn.Linear(8, 3)))
    >>> _ = nn.utils.parametrize.remove_parametrizations(block, "weight")
    >>> block.weight.data, block.bias.data = 0.8 * block.weight.data, torch.ones(4)
    >>> images = torch.rand(4, 3, 2, 2)
    >>> everywhere = lip.certificates.radius(model.eval()(images).detach(), rows=model[-1].weight)
    >>> bool((local_radius(model, images) > 1.05 * everywhere).any())
    True
    """
    return opened(model, images, labels, batch_size).radius(batch_size)


@dataclass(frozen=True)
class Opened:
    """The last block and the head of a network as a function of the features below, for some pictures, in float64."""

    features: Tensor  # u (N, D)
    logits: Tensor  # z (N, C)
    labels: Tensor  # y (N,)
    block: Block
    rows: Tensor  # of the head (C, D)
    below: float  # the constant of the features in the picture

    def radius(self, batch_size: int) -> Tensor:
        """What `local_radius` says, (N,)."""
        columns = (every.split(batch_size) for every in (self.features, self.logits, self.labels))
        pairs = (_pairs(*part, self.block, self.rows) for part in zip(*columns, strict=True))
        moves = torch.cat([_reach(part) for part in pairs])
        return (moves - ATTACKERS_FAVOUR * moves.abs()) / self.below


def opened(model: nn.Sequential, images: Tensor, labels: Tensor | None, batch_size: int) -> Opened:
    """What the last block of a network is given by these pictures; ValueError where there is no such block."""
    block, head = _ending(model)
    check_untouched(model)
    below = lipschitz_bound(nn.Sequential(*model[:-2]).eval(), tuple(images.shape[1:])).value
    through = below * lipschitz_bound(nn.Sequential(block).eval(), (block.features,)).value
    logits = checked_logits(model, images, through, head.weight.detach(), batch_size)
    labels = check_logits(logits, logits.argmax(1) if labels is None else labels, head.weight)
    with torch.inference_mode(False), torch.no_grad(), uncached():
        twin = in_float64(model)
        features = torch.cat([twin[:-2](part.double()) for part in images.split(batch_size)])
        end = Block(twin[-2].weight.detach(), twin[-2].bias.detach())
    return Opened(features, logits, labels, end, twin[-1].weight.detach(), below)


def _ending(model: nn.Sequential) -> tuple[SLLLinear, nn.Linear]:
    parts = list(model) if computes_as(model, nn.Sequential) else [model]
    if len(parts) > 2 and computes_as(parts[-2], SLLLinear) and computes_as(parts[-1], nn.Linear):
        return parts[-2], parts[-1]
    ends = ", ".join(type(part).__name__ for part in parts[-2:])
    raise ValueError(
        "what is looked into is the last block of an nn.Sequential that ends in SLLLinear and nn.Linear; this ends in "
        f"{ends}: use radius, which asks for nothing but logits"
    )


@dataclass(frozen=True)
class _Pairs:
    """For each picture and class j the gap z_y − z_j as a function of the features."""

    gap: Tensor  # (N, C), infinite for the class itself
    length: Tensor  # ‖w‖ (N, C)
    pull: Tensor  # c = −2 Vᵀw, (N, C, K)
    before: Tensor  # Vᵀu + b, (N, K)
    block: Block

    def steepest(self) -> Tensor:
        """What bounds the gradient of the gap everywhere, (N, C): the block's constant is at most 1 + 2 `lifted`."""
        return (self.length * (1 + 2 * self.block.lifted)).clamp(min=SMALLEST)

    def steepness(self, distance: Tensor) -> Tensor:
        """N: what bounds the gradient of the gap within `distance` (N,) of the features, (N, C)."""
        low, high = self._box(distance)
        loss, lifted = self.block.loss, self.block.lifted
        y = _low_point(low, high, loss)  # (N, C, K), Dc or anything else in the box
        slope = 2 * y @ loss
        tangent = torch.minimum(slope * (low - y), slope * (high - y)).sum(2)
        kept = (slope * y).sum(2) / 2 + tangent  # ≤ yᵀ (I − VᵀV + lifted) y over the box
        slack = (lifted + CUSHION) * self.pull.square().sum(2)
        squared = self.length.square() * (1 + CUSHION) - (kept - slack)  # of a V above norm 1 this may add
        return torch.minimum(squared.clamp(min=0).sqrt(), self.steepest()).clamp(min=SMALLEST)

    def _box(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Between which values the entries of Dc lie, each (N, C, K)."""
        moved = distance[:, None] * self.block.lengths * (1 + CUSHION) + CUSHION  # (N, K)
        on, off = self.before > moved, self.before < -moved
        low = torch.where(on[:, None], self.pull, torch.where(off[:, None], 0.0, self.pull.clamp(max=0)))
        high = torch.where(on[:, None], self.pull, torch.where(off[:, None], 0.0, self.pull.clamp(min=0)))
        return low, high


def _low_point(low: Tensor, high: Tensor, loss: Tensor) -> Tensor:
    """Some y (N, C, K) of a box near which yᵀ loss y is smallest. Any will do, so single precision does."""
    least, most, matrix = low.float(), high.float(), loss.float()
    y = (least + most) / 2
    for _ in range(DESCENTS):
        y = (y - y @ matrix).clamp(least, most)
    return y.double().clamp(low, high)


def _pairs(features: Tensor, logits: Tensor, labels: Tensor, block: Block, rows: Tensor) -> _Pairs:
    gap = (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], math.inf)
    return _directed(gap, rows[labels][:, None] - rows, features, block)


def _directed(gap: Tensor, w: Tensor, features: Tensor, block: Block) -> _Pairs:
    """From gaps (N, C) with their directions (N, C, D)."""
    return _Pairs(gap, w.norm(dim=2), block.pull(w), block.before(features), block)


def farthest(w: Tensor, u: Tensor, block: Block, distance: float) -> Tensor:
    """How far wᵀ times the outputs of a block can move, up or down, while its features u (M, D) move by `distance`.

    Args:
        w: (M, D), directions, in float64 as the features.
    """
    pairs = _directed(torch.zeros_like(w[:, :1]), w[:, None], u, block)
    piece = distance / FEW
    ends = (w.new_full((len(w),), piece * (k + 1)) for k in range(FEW))
    return sum((piece * pairs.steepness(end)[:, 0] for end in ends), torch.zeros_like(w[:, 0]))


def _reach(pairs: _Pairs) -> Tensor:
    """How far the features may move before another class can catch up, (N,)."""
    everywhere = pairs.gap / pairs.steepest()  # (N, C)
    sure = everywhere.amin(1).clamp(min=0)  # (N,), what `radius` says
    left, reached = pairs.gap, torch.zeros_like(pairs.gap)
    for _ in range(PIECES):
        piece = sure[:, None] * REACH / PIECES
        steepness = pairs.steepness(reached.amax(1) + piece.squeeze(1))
        step = torch.minimum(piece, (left / steepness).clamp(min=0))
        left, reached = left - step * steepness, reached + step
    rest = reached + left.clamp(min=0) / pairs.steepest()
    return torch.where(everywhere > 0, rest, everywhere).amin(1)

"""Logits for a loss of margins, in units of what the last SLL block lets through near the picture.

`lipguide.robustness.certificates.local` has the certificate that this is the training for, and its algebra.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["local_logits", "local_slopes"]

LEAST = 1e-4  # of a squared slope: below, a gap that shrinks with its slope would be worth any margin


def local_logits(
    features: Tensor, target: Tensor, block: nn.Module, head: nn.Linear, reach: float = 36 / 255
) -> Tensor:
    r"""The logits of `head(block(features))`, (N, D) to (N, C), as a loss that asks for a margin should see them.

    .. math:: \sqrt2\,\frac{z_j - z_y}{s_j}, \qquad 0 \text{ for } j = y,

    with the slope :math:`s_j` of the gap :math:`z_y - z_j` within `reach`: see `local_slopes`. A loss such as
    `OffsetCrossEntropy` takes it for granted that a gap moves by :math:`\sqrt2` per unit of the picture. That is what
    these do, where the gap of the logits moves less: the block may let less of a gradient through.

    Args:
        target: classes (N,).
        block: an `lip.SLLLinear`.
        reach: how far the features are to be moved.

    >>> import torch
    >>> import lipguide as lip
    >>> _ = torch.manual_seed(0)
    >>> block, head = lip.SLLLinear(8, 8), nn.Linear(8, 3)
    >>> u, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    >>> local_logits(u, y, block, head).gather(1, y[:, None]).abs().max().item()
    0.0
    """
    logits = head(block(features))
    gap = logits.gather(1, target[:, None]) - logits
    return -math.sqrt(2) * gap / local_slopes(features, target, block, head, reach)


def local_slopes(features: Tensor, target: Tensor, block: nn.Module, head: nn.Linear, reach: float) -> Tensor:
    r"""How fast each gap to the right class changes on the way out of the features, (N, D) to (N, C).

    .. math:: s_j^2 = \lVert w + V D c \rVert^2 = \lVert w \rVert^2 - (Dc)^\top (I - V^\top V) (Dc),
        \qquad w = w_y - w_j,\; c = -2 V^\top w,

    D being the share of the way on which unit k is sure to be on, :math:`(v_k^\top u + b_k) / (\lVert v_k \rVert\,
    \text{reach})` between 0 and 1. It is an estimate with a gradient, for training. `lip.certificates.local_radius`
    has the bound.

    >>> import torch
    >>> import lipguide as lip
    >>> _ = torch.manual_seed(0)
    >>> block, head = lip.SLLLinear(8, 8), nn.Linear(8, 2)
    >>> slopes = local_slopes(torch.randn(4, 8), torch.tensor([0, 1, 1, 0]), block, head, 0.1)
    >>> bool((slopes[:, 0] <= (head.weight[0] - head.weight[1]).norm() * 1.0001).all())
    True
    """
    v_t, rows = block.weight, head.weight  # (K, D), (C, D)
    w = rows[target][:, None] - rows  # (N, C, D)
    c = -2 * w @ v_t.mT  # (N, C, K)
    room = reach * v_t.norm(dim=1)
    on = ((features @ v_t.mT + block.bias) / room.clamp(min=LEAST * reach)).clamp(0, 1)  # (N, K)
    y = on[:, None] * c
    kept = y.square().sum(2) - (y @ v_t).square().sum(2)  # yᵀ (I − VᵀV) y
    return (w.square().sum(2) - kept).clamp(min=LEAST).sqrt()

"""Losses of one logit an entry: two classes, labelled 0 and 1, or -1 and 1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lipguide.losses.base import BinaryLoss, check_alpha, check_range, kantorovich_rubinstein

__all__ = ["HKR", "KR", "HingeMargin", "TauBCEWithLogits"]


class KR(BinaryLoss):
    r"""Kantorovich-Rubinstein estimate of the distance between two classes, an amount to *maximise*:

    .. math:: \mathrm{KR} = \mathbb{E}[f(x) \mid y = 1] - \mathbb{E}[f(x) \mid y = -1]

    Its negative, to minimise, is `HKR(alpha=0)`. A batch of one class only has no estimate and gives 0.

    >>> KR()(torch.tensor([0.5, 1.5, -0.5, -0.5, -1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0, 0]))
    tensor(1.)
    """

    def per_entry(self, f: Tensor, positive: Tensor) -> Tensor:
        return _kr(f, positive)


class HingeMargin(BinaryLoss):
    r"""Binary hinge with a margin: :math:`\mathbb{E}\,[m/2 - y f(x)]_+`. The same as `HKR(alpha=math.inf)`.

    >>> HingeMargin(margin=2)(torch.tensor([0.5, 1.5]), torch.tensor([1, 1]))
    tensor(0.2500)
    """

    def __init__(self, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_range(margin=margin)
        self.margin = margin

    def per_entry(self, f: Tensor, positive: Tensor) -> Tensor:
        return F.relu(self.margin / 2 - torch.where(positive, f, -f))


class HKR(HingeMargin):
    r"""Hinge-Kantorovich-Rubinstein loss (Serrurier et al., 2021), to minimise:

    .. math:: \alpha\,\mathbb{E}\,[m/2 - y f(x)]_+ - \mathrm{KR}

    A larger `alpha` gives accuracy, a smaller one robustness; `math.inf` is the hinge alone, 0 is -KR alone.
    deel-torchlip's `HKRLoss(a)` is this loss with `alpha = a / (1 - a)`, divided by `1 + alpha`.

    >>> HKR(alpha=1, margin=2)(torch.tensor([0.5, 1.5, -0.5, 0.5]), torch.tensor([1, 1, -1, -1]))
    tensor(-0.3750)
    """

    def __init__(self, alpha: float, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(margin, reduction)
        self.alpha = check_alpha(alpha)

    def per_entry(self, f: Tensor, positive: Tensor) -> Tensor:
        hinge = super().per_entry(f, positive)
        if self.alpha == math.inf:
            return hinge
        return self.alpha * hinge - kantorovich_rubinstein(
            f.unsqueeze(1), positive.unsqueeze(1), torch.ones_like(positive)
        )


class TauBCEWithLogits(BinaryLoss):
    r"""Tempered binary cross-entropy: :math:`\mathrm{BCE}(\tau f(x), y) / \tau`.

    >>> TauBCEWithLogits(tau=2)(torch.tensor([0.0, 2.0]), torch.tensor([1, 1]))
    tensor(0.1778)
    """

    def __init__(self, tau: float, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_range(tau=tau)
        self.tau = tau

    def per_entry(self, f: Tensor, positive: Tensor) -> Tensor:
        return F.softplus(-self.tau * torch.where(positive, f, -f)) / self.tau


def _kr(f: Tensor, positive: Tensor) -> Tensor:
    """Entry i of the KR estimate between the two classes."""
    return kantorovich_rubinstein(f.unsqueeze(1), positive.unsqueeze(1), torch.ones_like(positive))

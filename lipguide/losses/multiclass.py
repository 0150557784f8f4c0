"""Losses of C logits an entry and the index of the right class."""

from __future__ import annotations

import math
from typing import SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor

from lipguide.checks import IGNORE, lipschitz_constant
from lipguide.distributed import sum_over_ranks
from lipguide.losses.base import CategoricalLoss, check_alpha, check_range, kantorovich_rubinstein

__all__ = [
    "EMMA",
    "CategoricalHinge",
    "CosineSimilarity",
    "LogitAnnealing",
    "MultiMargin",
    "MulticlassHKR",
    "MulticlassHinge",
    "MulticlassKR",
    "MulticlassLseHKR",
    "MulticlassSoftHKR",
    "OffsetCrossEntropy",
    "TauCrossEntropy",
    "TauFocal",
]


class MulticlassKR(CategoricalLoss):
    r"""Mean over the classes of the one-against-all KR estimate, an amount to *maximise*:

    .. math:: \frac1C \sum_c \mathbb{E}[f_c(x) \mid y = c] - \mathbb{E}[f_c(x) \mid y \ne c]

    A class missing from the batch has no estimate and is left out of the mean; if none has one, the value is 0.

    >>> MulticlassKR()(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor(1.5000)
    """

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        return kantorovich_rubinstein(logits, _one_hot(logits, label), valid)


class MulticlassHinge(CategoricalLoss):
    r"""One binary hinge a class, the right class weighing as much as all others together:

    .. math:: \frac1C \Big((C-1)\,[m/2 - f_y]_+ + \sum_{j \ne y} [m/2 + f_j]_+\Big)

    >>> MulticlassHinge(margin=2)(torch.tensor([[0.5, -0.5]]), torch.tensor([0]))
    tensor(0.5000)
    """

    def __init__(self, margin: float = 1.0, ignore_index: int = IGNORE, reduction: str = "mean") -> None:
        super().__init__(ignore_index, reduction)
        check_range(margin=margin)
        self.margin = margin

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        right = _one_hot(logits, label)
        hinge = F.relu(self.margin / 2 - torch.where(right, logits, -logits))
        return torch.where(right, (logits.shape[1] - 1) * hinge, hinge).mean(1)


class MulticlassHKR(MulticlassHinge):
    r"""HKR for several classes: `alpha` times `MulticlassHinge` minus `MulticlassKR`; `math.inf`: hinge alone.

    >>> MulticlassHKR(alpha=1, margin=2)(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor(-1.)
    """

    def __init__(self, alpha: float, margin: float = 1.0, ignore_index: int = IGNORE, reduction: str = "mean") -> None:
        super().__init__(margin, ignore_index, reduction)
        self.alpha = check_alpha(alpha)

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        hinge = super().per_entry(logits, label, valid)
        if self.alpha == math.inf:
            return hinge
        return self.alpha * hinge - kantorovich_rubinstein(logits, _one_hot(logits, label), valid)


class MulticlassSoftHKR(CategoricalLoss):
    r"""HKR in which the wrong classes share one vote by softmax, for many classes (Serrurier et al., 2024):

    .. math:: \alpha \Big([m/2 - f_y]_+ + \sum_{j \ne y} s_j [m/2 + f_j]_+\Big)
        - \Big(f_y - \sum_{j \ne y} s_j f_j\Big), \qquad s = \operatorname{softmax}_{j \ne y}(t f_j)

    The sharpness :math:`t = m / \overline{|f|}` follows a running mean of :math:`|f|`, a buffer that is updated, with
    weight `1 - momentum`, by each call in training mode with gradients enabled (evaluation leaves it alone).

    >>> loss = MulticlassSoftHKR(alpha=5, margin=0.2)
    >>> loss(torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]]), torch.tensor([0, 1]))
    tensor(-0.9594)
    """

    def __init__(
        self,
        alpha: float,
        margin: float = 1.0,
        momentum: float = 0.99,
        ignore_index: int = IGNORE,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_range(margin=margin)
        check_range(high=1.0, momentum=momentum)
        self.alpha = check_alpha(alpha)
        self.margin, self.momentum = margin, momentum
        self.register_buffer("mean", torch.tensor(float(margin)))

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        right = _one_hot(logits, label)
        sharpness = (self.margin / self._running_mean(logits, valid)).clamp(0.005, 250).to(logits.dtype)
        share = torch.softmax((sharpness * logits).masked_fill(right, -math.inf), 1)
        share = torch.where(right, 1.0, share)
        signed = torch.where(right, logits, -logits)
        hinge = (share * F.relu(self.margin / 2 - signed)).sum(1)
        if self.alpha == math.inf:
            return hinge
        return self.alpha * hinge - (share * signed).sum(1)

    def _running_mean(self, logits: Tensor, valid: Tensor) -> Tensor:
        mean = self.mean
        if self.training and torch.is_grad_enabled():
            size = torch.where(valid.unsqueeze(1), logits.detach().abs(), 0.0).sum().double()
            size, n = sum_over_ranks(torch.stack([size, valid.sum().double() * logits.shape[1]]), logits)
            now = self.momentum * mean + (1 - self.momentum) * (size / n.clamp(min=1)).to(mean.dtype)
            mean = torch.where(n > 0, now, mean)
            self.mean.copy_(mean.clamp(0.005, 1000))
        return mean.clamp(min=self.margin)


class MulticlassLseHKR(CategoricalLoss):
    r"""HKR against a smooth maximum of the wrong logits, :math:`\ell = \frac1t \log \sum_{j \ne y} e^{t f_j}`:

    .. math:: \alpha \big([m/2 - f_y]_+ + [m/2 + \ell]_+\big) - (f_y - \ell),
        \qquad t = \tfrac{2}{m} \log(C - 1)

    so that l lies between the largest wrong logit and that plus m/2.

    >>> MulticlassLseHKR(alpha=5, margin=0.2)(torch.tensor([[2.0, 0.2, -0.5]]), torch.tensor([0]))
    tensor(-0.2933)
    """

    def __init__(self, alpha: float, margin: float = 1.0, ignore_index: int = IGNORE, reduction: str = "mean") -> None:
        super().__init__(ignore_index, reduction)
        check_range(margin=margin)
        self.alpha, self.margin = check_alpha(alpha), margin

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        right, other = _right_and_best_other(logits, label)
        if logits.shape[1] > 2:
            t = 2 / self.margin * math.log(logits.shape[1] - 1)
            other = torch.logsumexp(t * logits.masked_fill(_one_hot(logits, label), -math.inf), 1) / t
        hinge = F.relu(self.margin / 2 - right) + F.relu(self.margin / 2 + other)
        return hinge if self.alpha == math.inf else self.alpha * hinge - (right - other)


class CategoricalHinge(MulticlassHinge):
    r"""Hinge on the runner-up (Keras' version): :math:`[m - (f_y - \max_{j \ne y} f_j)]_+`.

    >>> CategoricalHinge(margin=1)(torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([0]))
    tensor(0.7000)
    """

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        right, other = _right_and_best_other(logits, label)
        return F.relu(self.margin - (right - other))


class MultiMargin(MulticlassHinge):
    r"""Hinge on every wrong class (torch's version): :math:`\frac1C \sum_{j \ne y} [m - (f_y - f_j)]_+`.

    >>> MultiMargin(margin=1)(torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([0]))
    tensor(0.4000)
    """

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        hinge = F.relu(self.margin - (logits.gather(1, label) - logits))
        return hinge.masked_fill(_one_hot(logits, label), 0.0).mean(1)


class TauCrossEntropy(CategoricalLoss):
    r"""Tempered cross-entropy :math:`\mathrm{CE}(\tau f(x), y) / \tau`: large tau for accuracy, small for robustness.

    >>> TauCrossEntropy(tau=10)(torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([0]))
    tensor(0.0055)
    """

    def __init__(self, tau: float, ignore_index: int = IGNORE, reduction: str = "mean") -> None:
        super().__init__(ignore_index, reduction)
        check_range(tau=tau)
        self.tau = tau

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        return _cross_entropy(self.tau * logits, label) / self.tau


class TauFocal(TauCrossEntropy):
    r"""Tempered focal loss, for unbalanced classes; `gamma=0` is `TauCrossEntropy`:

    .. math:: (1 - p_y)^\gamma\, \mathrm{CE}(\tau f, y) / \tau, \qquad p = \operatorname{softmax}(\tau f)

    >>> TauFocal(tau=10)(torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([0]))
    tensor(1.5739e-05)
    """

    def __init__(self, tau: float, gamma: float = 2.0, ignore_index: int = IGNORE, reduction: str = "mean") -> None:
        super().__init__(tau, ignore_index, reduction)
        self.gamma = _check_focus(gamma)

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        cross_entropy = _cross_entropy(self.tau * logits, label)
        return _focus(cross_entropy, self.gamma) * cross_entropy / self.tau


class CosineSimilarity(CategoricalLoss):
    r"""Minus the cosine between the logits and the one-hot label: :math:`-f_y / \lVert f \rVert`. It has no dial.

    >>> CosineSimilarity()(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
    tensor(-0.8000)
    """

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(logits, dim=1).clamp(min=1e-8)
        return -logits.gather(1, label).squeeze(1) / norm


class OffsetCrossEntropy(CategoricalLoss):
    r"""Cross-entropy with temperature T and an offset that asks for a margin (Prach and Lampert, 2022):

    .. math:: T\, \mathrm{CE}\big((f(x) - \xi\, \mathbf{1}_y) / T,\; y\big)

    The default :math:`\xi = 2\sqrt2\,\varepsilon` asks for twice the margin that certifies :math:`\varepsilon =
    36/255`.

    >>> OffsetCrossEntropy()(torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]]), torch.tensor([0, 1]))
    tensor(0.0127)
    """

    def __init__(
        self,
        offset: float = 2 * math.sqrt(2) * 36 / 255,
        temperature: float = 0.25,
        ignore_index: int = IGNORE,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_range(temperature=temperature)
        check_range(low=-math.inf, offset=offset)
        self.offset, self.temperature = offset, temperature

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        shifted = logits - self.offset * _one_hot(logits, label)
        return self.temperature * _cross_entropy(shifted / self.temperature, label)


class LogitAnnealing(OffsetCrossEntropy):
    r"""Offset cross-entropy that lets go of entries already certified well (Lai et al., 2025):

    .. math:: T\,(1 - p_y)^\beta\, \mathrm{CE}(z, y),
        \qquad z = (f(x) - \xi\,\mathbf{1}_y)/T,\; p = \operatorname{softmax}(z)

    >>> LogitAnnealing()(torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]]), torch.tensor([0, 1]))
    tensor(0.3641)
    """

    def __init__(
        self,
        offset: float = 2.0,
        temperature: float = 0.75,
        beta: float = 5.0,
        ignore_index: int = IGNORE,
        reduction: str = "mean",
    ) -> None:
        super().__init__(offset, temperature, ignore_index, reduction)
        self.beta = _check_focus(beta)

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        cross_entropy = super().per_entry(logits, label, valid)
        return _focus(cross_entropy / self.temperature, self.beta) * cross_entropy


class EMMA(CategoricalLoss):
    r"""Efficient margin maximisation (Hu et al., 2023): cross-entropy of the logits as the worst perturbation leaves
    them.

    .. math:: \mathrm{CE}\big(f_j + \varepsilon_j L \lVert w_y - w_j \rVert,\; y\big), \qquad
        \varepsilon_j = \varepsilon\; \mathrm{clip}\Big(\frac{f_y - f_j}{\varepsilon L \lVert w_y - w_j
        \rVert}, 0.01, 1\Big)

    Class j is pushed by no more than takes it to the right class, and :math:`\varepsilon_j` carries no gradient.
    `rows`, given at the call as `loss(logits, target, head.weight)`, are the rows w of a linear head over a trunk of
    Lipschitz constant L; without them L is that of the whole network and :math:`\lVert w_y - w_j \rVert = \sqrt2`.

    >>> EMMA(epsilon=0.5)(torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]]), torch.tensor([0, 1]))
    tensor(0.5972)
    """

    def __init__(
        self,
        epsilon: float,
        lipschitz: float | SupportsFloat = 1.0,
        ignore_index: int = IGNORE,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_range(epsilon=epsilon)
        self.epsilon = epsilon
        self.lipschitz = lipschitz_constant(lipschitz)

    def forward(self, logits: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        return super().forward(logits, target, rows)

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor, rows: Tensor | None) -> Tensor:
        distance = self._row_distances(logits, label, rows)
        reach = self.lipschitz * distance
        gap = logits.gather(1, label) - logits
        epsilon = self.epsilon * (gap / (self.epsilon * reach).clamp(min=1e-8)).clamp(0.01, 1)
        return _cross_entropy(logits + epsilon.detach() * reach, label)

    @staticmethod
    def _row_distances(logits: Tensor, label: Tensor, rows: Tensor | None) -> Tensor:
        """‖w_y − w_j‖ of each entry and class, in the shape of the logits."""
        if rows is None:
            return torch.where(_one_hot(logits, label), 0.0, math.sqrt(2))
        if len(rows) != logits.shape[1]:
            raise ValueError(f"rows {tuple(rows.shape)} must hold one row for each of {logits.shape[1]} classes")
        flat = rows.flatten(1).to(logits.dtype)
        size = flat.detach().abs().amax().clamp(min=torch.finfo(flat.dtype).tiny)  # squares of the rest cannot overflow
        pairs = size * torch.cdist(flat / size, flat / size, compute_mode="donot_use_mm_for_euclid_dist")
        return pairs[label.squeeze(1)].movedim(-1, 1)


def _one_hot(logits: Tensor, label: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, label, True)


def _right_and_best_other(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    right = logits.gather(1, label).squeeze(1)
    other = logits.masked_fill(_one_hot(logits, label), -math.inf).amax(1)
    return right, other


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label.squeeze(1), reduction="none")


def _focus(cross_entropy: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma with p = exp(-cross_entropy), the weight that the focal loss gives to hard entries."""
    return (-torch.expm1(-cross_entropy)).pow(gamma)


def _check_focus(exponent: float) -> float:
    if exponent != 0 and not 1 <= exponent < math.inf:
        raise ValueError(
            "the exponent of 1 - p must be 0 or at least 1 (in between, its gradient is infinite at p = 1), "
            f"not {exponent}"
        )
    return exponent

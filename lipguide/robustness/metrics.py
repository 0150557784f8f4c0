"""Metrics that only a network of known Lipschitz constant has, as torchmetrics classes (states sum over processes).

`lipschitz` is the constant from pixels in [0, 1] to the logits, normalisation included (`certificates.checked_logits`
looks for a refutation). For a head whose rows are known, `update(logits, target, rows=head.weight)` with the constant
of what lies below the head: the rows are given with every update, so that they are never those of an earlier step.

A metric of a network that answers NaN or infinity is an error. The provable ones hold in exact arithmetic with the
logits as they are given, in float32 or better: `lipguide.robustness.certificates.radii` says what rounding may take.
"""

from __future__ import annotations

import math
import warnings
from typing import SupportsFloat

import torch
from torch import Tensor
from torchmetrics import Metric

from lipguide.checks import IGNORE, check_binary, check_numbers, class_indices, lipschitz_constant, positives
from lipguide.robustness.certificates.radii import check_precision, exact_radius

__all__ = [
    "KR",
    "BinaryProvableAvgRobustness",
    "BinaryProvableRobustAccuracy",
    "CategoricalProvableAvgRobustness",
    "CategoricalProvableRobustAccuracy",
    "MulticlassKR",
]


class MulticlassKR(Metric):
    r"""Mean over the classes of :math:`\mathbb{E}[f_c \mid y = c] - \mathbb{E}[f_c \mid y \ne c]` over all updates.

    It is the estimate of the loss of the same name on the whole data set at once, not a mean of batch estimates.
    Classes that never occur are left out, with a warning.

    >>> metric = MulticlassKR(classes=2)
    >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    >>> metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    >>> metric.compute()
    tensor(1.5000, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, classes: int, ignore_index: int = IGNORE) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        for name in ("sum_right", "sum_all"):
            self.add_state(name, torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        classes = len(self.count)
        if logits.shape[1] != classes or target.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(
                f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must be (N, {classes}, ...), (N, ...)"
            )
        check_numbers(logits)
        label, valid = class_indices(target, self.ignore_index, "the target")
        if ((label < 0) | (label >= classes)).any():
            raise ValueError(f"a label lies outside 0..{classes - 1} and is not ignore_index = {self.ignore_index}")
        z = logits.detach().double().movedim(1, -1)[valid]
        right = torch.nn.functional.one_hot(label[valid], classes)
        self.sum_right += (z * right).sum(0)
        self.sum_all += z.sum(0)
        self.count += right.sum(0)

    def compute(self) -> Tensor:
        others = self.count.sum() - self.count
        estimable = (self.count > 0) & (others > 0)
        if not estimable.all():
            missing = (~estimable).nonzero().flatten().tolist()
            warnings.warn(f"no estimate for classes {missing}: no sample inside or none outside of them", stacklevel=2)
        difference = self.sum_right / self.count.clamp(min=1) - (self.sum_all - self.sum_right) / others.clamp(min=1)
        return torch.where(estimable, difference, 0.0).sum() / estimable.sum().clamp(min=1)


class KR(MulticlassKR):
    r""":math:`\mathbb{E}[f \mid y = 1] - \mathbb{E}[f \mid y = -1]` over all updates: an estimate of the distance
    between two classes. Labels are 0 and 1, or -1 and 1.

    >>> metric = KR()
    >>> metric.update(torch.tensor([0.5, 1.5, -0.5, -0.5, -1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0, 0]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    def __init__(self) -> None:
        super().__init__(classes=2)

    def update(self, logits: Tensor, target: Tensor) -> None:
        f, positive = _binary(logits, target)
        super().update(torch.stack([-f, f], 1), positive.long())


class _Average(Metric):
    """The mean of one number a sample, over all updates."""

    full_state_update = False
    higher_is_better = True

    def __init__(self, lipschitz: float | SupportsFloat) -> None:
        super().__init__()
        self.lipschitz = lipschitz_constant(lipschitz)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        self.total += values.sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        if self.count == 0:
            raise ValueError(f"{type(self).__name__} was given no samples: its mean is undefined")
        return self.total / self.count


class _Binary(_Average):
    def _radius(self, logits: Tensor, target: Tensor) -> Tensor:
        """y f(x) / L: the sign of a single L-Lipschitz output cannot change within |f(x)| / L."""
        f, positive = _binary(logits, target)
        return torch.where(positive, f, -f) / self.lipschitz


class _Categorical(_Average):
    def __init__(self, lipschitz: float | SupportsFloat, ignore_index: int) -> None:
        super().__init__(lipschitz)
        self.ignore_index = ignore_index

    def _radius(self, logits: Tensor, target: Tensor, rows: Tensor | None) -> Tensor:
        label, valid = class_indices(target, self.ignore_index, "the target")
        return exact_radius(logits, label, self.lipschitz, rows)[valid]


def _binary(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Flat logits in float64 and whether each belongs to the positive class."""
    check_binary(logits, target)
    check_precision(logits)
    check_numbers(logits)
    positive, known = positives(target)
    if not known.all():
        raise ValueError("a binary label must be 0 or 1 (or -1 or 1); the target holds another value")
    return logits.detach().double().reshape(-1), positive.reshape(-1)


def _check_epsilon(epsilon: float) -> float:
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be 0 or more and finite, not {epsilon}")
    return epsilon


class BinaryProvableRobustAccuracy(_Binary):
    """Share of samples with y f(x) / L above `epsilon`: no perturbation of that norm can misclassify them.

    >>> metric = BinaryProvableRobustAccuracy(epsilon=0.25)
    >>> metric(torch.tensor([1.0, 0.1, 1.0, 0.1]), torch.tensor([1, 1, 0, 0]))
    tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, epsilon: float, lipschitz: float | SupportsFloat = 1.0) -> None:
        super().__init__(lipschitz)
        self.epsilon = _check_epsilon(epsilon)

    def update(self, logits: Tensor, target: Tensor) -> None:
        self._add(self._radius(logits, target) > self.epsilon)


class BinaryProvableAvgRobustness(_Binary):
    """Mean certified radius, [y f(x)]_+ / L: 0 for a sample that is classified wrongly.

    >>> metric = BinaryProvableAvgRobustness()
    >>> metric(torch.tensor([1.0, 0.1, 1.0, 0.1]), torch.tensor([1, 1, 0, 0]))
    tensor(0.2750, dtype=torch.float64)
    """

    def __init__(self, lipschitz: float | SupportsFloat = 1.0) -> None:
        super().__init__(lipschitz)

    def update(self, logits: Tensor, target: Tensor) -> None:
        self._add(self._radius(logits, target).clamp(min=0))


class CategoricalProvableRobustAccuracy(_Categorical):
    """Share of samples (or pixels) whose `certificates.radius` is above `epsilon`.

    >>> metric = CategoricalProvableRobustAccuracy(epsilon=0.25)
    >>> metric(torch.tensor([[1.0, 0, 0], [0.1, 0, 0], [0, 0, 1], [0, 0, 0.1]]), torch.tensor([0, 0, 1, 1]))
    tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, epsilon: float, lipschitz: float | SupportsFloat = 1.0, ignore_index: int = IGNORE) -> None:
        super().__init__(lipschitz, ignore_index)
        self.epsilon = _check_epsilon(epsilon)

    def update(self, logits: Tensor, target: Tensor, rows: Tensor | None = None) -> None:
        self._add(self._radius(logits, target, rows) > self.epsilon)


class CategoricalProvableAvgRobustness(_Categorical):
    """Mean certified radius over the samples (or pixels): 0 for those classified wrongly.

    >>> metric = CategoricalProvableAvgRobustness()
    >>> metric(torch.tensor([[1.0, 0, 0], [0.1, 0, 0], [0, 0, 1], [0, 0, 0.1]]), torch.tensor([0, 0, 1, 1]))
    tensor(0.1945, dtype=torch.float64)
    """

    def __init__(self, lipschitz: float | SupportsFloat = 1.0, ignore_index: int = IGNORE) -> None:
        super().__init__(lipschitz, ignore_index)

    def update(self, logits: Tensor, target: Tensor, rows: Tensor | None = None) -> None:
        self._add(self._radius(logits, target, rows).clamp(min=0))

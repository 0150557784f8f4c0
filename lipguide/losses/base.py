"""What every loss shares: its checks, its reduction, and its behaviour when a batch is split over several processes.

"mean" is the mean over the whole batch, also where it is split (`lipguide.distributed`), and the class counts that the
Kantorovich-Rubinstein losses need are those of the whole batch; "sum" and "none" are a rank's own share and need to be
added up, not averaged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipguide.checks import HALF, IGNORE, check_binary, class_indices, positives
from lipguide.distributed import mean_over_ranks, sum_over_ranks

__all__ = ["BinaryLoss", "CategoricalLoss", "Loss", "check_alpha", "check_range", "kantorovich_rubinstein"]


def check_range(low: float = 0.0, high: float = math.inf, **values: float) -> None:
    """Raise unless every value lies strictly between `low` and `high`.

    >>> check_range(tau=10.0)
    """
    for name, value in values.items():
        if not low < value < high:
            raise ValueError(f"{name} must lie strictly between {low:g} and {high:g}, not be {value}")


def _expect(ok: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(ok, message)
    elif not ok:
        raise ValueError(message)


class Loss(nn.Module):
    """Reduction, and the decision when to look at values.

    Looking at values means waiting for a GPU. Labels are therefore looked at in every call on the CPU, but elsewhere in
    the first call only: afterwards an index out of range is stopped by torch's own kernels. A softmax at the end of a
    model is there from the start, so the first call shows it. A compiled graph asserts on the device instead.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')
        self.reduction = reduction
        self._called = False

    def _is_first_call(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        first, self._called = not self._called, True
        return first

    def _reduce(self, values: Tensor, valid: Tensor, logits: Tensor) -> Tensor:
        """`values` holds one value an entry, 0 where `valid` is false. The mean over no entry is 0."""
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum()
        return mean_over_ranks(values.sum(), valid.sum(), logits)


class BinaryLoss(Loss):
    """One logit an entry; labels are 0 and 1, or -1 and 1. The target may lack a channel of size 1."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        check_binary(logits, target)
        first = self._is_first_call()
        positive, known = positives(target)
        if target.numel() and (first or target.device.type == "cpu"):
            _expect(known.all(), "a binary label must be 0 or 1 (or -1 or 1); the target holds another value")
        if logits.dtype in HALF:
            logits = logits.float()
        f, positive = logits.reshape(-1), positive.reshape(-1)
        values = self.per_entry(f, positive).reshape(target.shape)
        return self._reduce(values, torch.ones_like(values, dtype=torch.bool), logits)

    def per_entry(self, f: Tensor, positive: Tensor) -> Tensor:
        """Loss of every entry; both arguments are flat."""
        raise NotImplementedError


class CategoricalLoss(Loss):
    """C logits an entry along dimension 1, and the index of the right class or `ignore_index`."""

    def __init__(self, ignore_index: int = IGNORE, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor, *extra: Tensor | None) -> Tensor:
        self._check_shapes(logits, target)
        label, valid = class_indices(target, self.ignore_index, "the target")
        self._check_values(logits, label)
        if logits.dtype in HALF:
            logits = logits.float()
        label = label.unsqueeze(1)
        values = self.per_entry(logits, label, valid, *extra)
        return self._reduce(torch.where(valid, values, 0.0), valid, logits)

    def per_entry(self, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        """Loss of every entry; `label` is (N, 1, ...), ready to index the classes."""
        raise NotImplementedError

    def _check_shapes(self, logits: Tensor, target: Tensor) -> None:
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ValueError(
                f"logits {tuple(logits.shape)} must be (N, C, ...) with at least two classes; for one logit "
                "an entry take a binary loss (KR, HKR, HingeMargin, TauBCEWithLogits)"
            )
        if target.shape != logits.shape[:1] + logits.shape[2:] or target.is_floating_point():
            raise ValueError(
                f"target {tuple(target.shape)} ({target.dtype}) must hold one integer class index for each "
                f"entry of logits {tuple(logits.shape)}; a one-hot target becomes one by target.argmax(1)"
            )

    def _check_values(self, logits: Tensor, label: Tensor) -> None:
        first = self._is_first_call()
        if label.numel() == 0:
            return
        if first:
            tolerance = 1e-2 if logits.dtype in HALF else 1e-5
            scores = logits.detach().float()
            softmax = (scores >= 0).all() & ((scores.sum(1) - 1).abs() <= tolerance).all()
            _expect(
                ~softmax,
                "these logits look like the output of a softmax (none is negative, every entry sums to 1): "
                "the loss takes raw logits, so remove the softmax at the end of the model",
            )
        if first or label.device.type == "cpu":
            classes = logits.shape[1]
            known = (label >= 0) & (label < classes)
            _expect(
                known.all(),
                f"a label lies outside 0..{classes - 1} (the logits have {classes} classes) and is not "
                f"ignore_index = {self.ignore_index}",
            )


def check_alpha(alpha: float) -> float:
    """The weight of the hinge against KR, or ValueError.

    >>> check_alpha(math.inf)
    inf
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be 0 or more (math.inf for the hinge alone), not {alpha}")
    return alpha


def kantorovich_rubinstein(logits: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    """Entry i of the KR estimate: averaged over all entries, the mean over c of E[f_c | c] - E[f_c | not c].

    A class that the batch lacks, or that fills it, has no estimate: it is left out of the mean over classes.

    Args:
        logits, positive: (N, C, ...), and which entries belong to class c.
        valid: (N, ...), which entries count.

    >>> f = torch.tensor([[1.0], [3.0]])
    >>> kantorovich_rubinstein(f, torch.tensor([[False], [True]]), torch.tensor([True, True])).mean()
    tensor(2.)
    """
    classes = (1, -1) + (1,) * (logits.ndim - 2)
    all_but_classes = (0, *range(2, logits.ndim))
    counts = torch.cat([(positive & valid.unsqueeze(1)).sum(all_but_classes), valid.sum().reshape(1)])
    counts = sum_over_ranks(counts, logits)
    n, n_positive = counts[-1], counts[:-1].reshape(classes)
    n_negative = n - n_positive
    estimable = (n_positive > 0) & (n_negative > 0)
    n = n.to(logits.dtype)  # the quotient of two integers would be a float32 whatever the logits are
    weight = torch.where(positive, n / n_positive.clamp(min=1), -n / n_negative.clamp(min=1))
    weight = torch.where(estimable, weight, 0.0)
    return (weight * logits).sum(1) / estimable.sum().clamp(min=1)

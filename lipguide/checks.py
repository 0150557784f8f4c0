"""What every room asks of its arguments: labels that are labels, a model in eval mode, outputs that are numbers.

A label is a whole number, the index of a class, or the number that stands for "not counted". Labels arrive in whatever
type a file has them in. They are compared in int64 and nowhere else: in eight bits without a sign -100 would be 156,
and -1 would be 255.
"""

from __future__ import annotations

import math
from typing import SupportsFloat

import torch
from torch import Tensor, nn

__all__ = [
    "HALF",
    "IGNORE",
    "check_binary",
    "check_eval",
    "check_numbers",
    "class_indices",
    "decisions",
    "lipschitz_constant",
    "positives",
]

HALF = (torch.float16, torch.bfloat16)
IGNORE = -100  # the label of entries that are not counted, as in torch


def class_indices(labels: Tensor, ignore_index: int | None = IGNORE, what: str = "labels") -> tuple[Tensor, Tensor]:
    """Labels of any whole type as indices in int64, 0 where they are not counted, and which of them count.

    Args:
        ignore_index: the label of entries that do not count; None if all do.
        what: a name of the labels for the message.

    >>> class_indices(torch.tensor([3, 156], dtype=torch.uint8))
    (tensor([  3, 156]), tensor([True, True]))
    >>> class_indices(torch.tensor([3, -100], dtype=torch.int8))
    (tensor([3, 0]), tensor([ True, False]))
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{what} hold one whole number an entry, the class, not {labels.dtype}")
    index = labels.long()
    if ignore_index is None:
        return index, torch.ones_like(index, dtype=torch.bool)
    counts = index != ignore_index
    return torch.where(counts, index, 0), counts


def positives(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which binary labels stand for the positive class, and which are binary labels at all: 0 and 1, or -1 and 1.

    >>> positives(torch.tensor([1, 0, 255], dtype=torch.uint8))
    (tensor([ True, False,  True]), tensor([ True,  True, False]))
    """
    values = labels if labels.is_floating_point() else labels.long()
    known = (values == 1) | (values == 0) | (values == -1)
    return values > 0, known


def check_binary(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless there is one logit and one label an entry; a channel of size 1 may be left out.

    >>> check_binary(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
    """
    without_channel = logits.shape[:1] + logits.shape[2:] if logits.shape[1:2] == (1,) else logits.shape
    if labels.shape not in (logits.shape, without_channel):
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(labels.shape)} must have the same shape: "
            "there is one logit and one label an entry"
        )


def check_eval(model: nn.Module, before: str) -> None:
    """Raise ValueError for a model in training mode: it would not answer as it will in use.

    A slice `model[:-1]` of an `nn.Sequential` is a new module, in training mode whatever the model is in. It computes
    what its parts compute one after the other, in either mode: so a plain `nn.Sequential` is judged by its parts.

    Args:
        before: what is about to be done, for the message.

    >>> check_eval(nn.Linear(2, 3).eval(), "measuring its robustness")
    >>> check_eval(nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).eval()[:-1], "measuring its robustness")
    >>> check_eval(nn.Sequential(nn.Dropout()), "measuring its robustness")
    Traceback (most recent call last):
    ...
    ValueError: the model (Sequential) is in training mode: call model.eval() before measuring its robustness
    """
    in_training = [(name, module) for name, module in model.named_modules() if module.training]
    if all(_merely_a_row(module) for _, module in in_training):
        return
    for name, module in in_training:
        if not _merely_a_row(module) or module is model:
            where = f"module {name!r}" if name else "the model"
            kind = type(module).__name__
            raise ValueError(f"{where} ({kind}) is in training mode: call model.eval() before {before}")


def _merely_a_row(module: nn.Module) -> bool:
    """A plain `nn.Sequential`, whose mode nothing looks at: neither a forward of its own nor a hook."""
    return type(module) is nn.Sequential and not (module._forward_hooks or module._forward_pre_hooks)


def check_numbers(output: Tensor, what: str = "the model's output", infinite: bool = True) -> None:
    """Raise ValueError for NaN: every comparison with it is false, and an argmax of it is a class like any other.

    Args:
        output: (N, ...), one entry a sample.
        infinite: whether infinite values are refused too.

    >>> check_numbers(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))
    Traceback (most recent call last):
    ...
    ValueError: the model's output was NaN or infinite for 1 of 2 samples, first for sample 1
    """
    good = output.isfinite() if infinite else ~output.isnan()
    bad = ~(good.flatten(1).all(1) if good.ndim > 1 else good)
    if bad.any():
        kind = "NaN or infinite" if infinite else "NaN"
        first = int(bad.nonzero()[0])
        raise ValueError(f"{what} was {kind} for {int(bad.sum())} of {len(bad)} samples, first for sample {first}")


def decisions(logits: Tensor) -> Tensor:
    """The class of the largest logit, (N, C, ...) to (N, ...); ValueError where a logit is NaN.

    >>> decisions(torch.tensor([[2.0, 0.5], [0.0, 1.0]]))
    tensor([0, 1])
    """
    check_numbers(logits, infinite=False)
    return logits.argmax(1)


def lipschitz_constant(lipschitz: float | SupportsFloat) -> float:
    """A Lipschitz constant as a positive, finite number; the value of a `Bound` as `lip.lipschitz_bound` gives it.

    >>> lipschitz_constant(-1.0)
    Traceback (most recent call last):
    ...
    ValueError: lipschitz must be positive and finite, not -1.0
    """
    constant = float(getattr(lipschitz, "value", lipschitz))
    if not 0 < constant < math.inf:
        raise ValueError(f"lipschitz must be positive and finite, not {constant}")
    return constant

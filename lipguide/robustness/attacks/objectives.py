"""What an attack on a classifier ascends and is judged by, and what all attacks ask of pictures and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipguide.checks import class_indices, decisions

__all__ = ["Model", "Objective", "margin", "misclassified", "raise_one_class", "rescaled_cross_entropy"]

Model = Callable[[Tensor], Any]
Objective = Callable[[Any, Any], Tensor]
SPREAD = 10.0  # between the largest and the smallest logit, once rescaled


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class is above the right one: positive once the sample is misclassified.

    >>> margin(torch.tensor([[2.0, 0.5], [0.0, 1.0]]), torch.tensor([0, 0]))
    tensor([-1.5000,  1.0000])
    """
    label, logits = _label(logits, y), _exact(logits)
    best_wrong = logits.scatter(1, label, -math.inf).amax(1)
    return best_wrong - logits.gather(1, label).squeeze(1)


def rescaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the logits scaled, sample by sample, to a spread of 10: the default objective.

    Plain cross-entropy attacks badly at either end of the scale. Logits in the hundreds saturate the softmax and the
    gradient is exactly 0; the small logits of a 1-Lipschitz network leave it nearly uniform and the gradient pulls at
    all classes at once. The scale itself carries no gradient. An entry labelled -100 counts 0.

    >>> small, large = torch.tensor([[0.02, 0.01]]), torch.tensor([[2000.0, 1000.0]])
    >>> rescaled_cross_entropy(small, torch.tensor([0])) == rescaled_cross_entropy(large, torch.tensor([0]))
    tensor([True])
    """
    label, counts = class_indices(y)
    logits = _exact(logits)
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
    tiny = torch.finfo(logits.dtype).tiny
    loss = F.cross_entropy(SPREAD * logits / spread.clamp(min=tiny), label, reduction="none")
    return torch.where(counts, loss, 0.0)


def raise_one_class(logits: Tensor, y: Tensor, turn: int) -> Objective:
    """The objective z_k − z_y, k being the wrong classes in turn, from the best at x to the worst and round again.

    >>> aim = raise_one_class(torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([0]), turn=0)
    >>> aim(torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([0]))
    tensor([5.])
    """
    wrong = logits.detach().scatter(1, _label(logits, y), -math.inf).argsort(1, descending=True)
    aim = wrong[:, turn % (logits.shape[1] - 1), None]  # (N, 1)

    def difference(z: Tensor, y: Tensor) -> Tensor:
        label, z = _label(z, y), _exact(z)
        return (z.gather(1, aim) - z.gather(1, label)).squeeze(1)

    return difference


@torch.no_grad()
def misclassified(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Which samples the model gets wrong; ValueError where it says NaN, or where a label is none of its classes.

    >>> misclassified(lambda x: x, torch.tensor([[0.9, 0.1]]), torch.tensor([1], dtype=torch.uint8))
    tensor([True])
    """
    logits = model(x)
    label, _ = class_indices(y, None)
    classes = logits.shape[1]
    if ((label < 0) | (label >= classes)).any():
        raise ValueError(f"a label lies outside 0..{classes - 1}, the {classes} classes of the model")
    return decisions(logits) != label


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One number a sample, (N,), of an objective that gives one, or one a pixel, which are averaged.

    >>> per_sample(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 3, 1, 2))
    tensor([2.])
    """
    if values.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"the objective has shape {tuple(values.shape)} for {len(x)} samples: it must give one number a sample; "
            'a torch loss does with reduction="none"'
        )
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def undefined(output: Any, value: Tensor) -> Tensor:
    """For which samples the model, or what was made of its output, is NaN: (N,).

    A score that takes an argmax hides a NaN: so the output itself is looked at, whatever holds its tensors.

    >>> undefined({"z": torch.tensor([[0.0], [math.nan]])}, torch.tensor([1.0, 1.0]))
    tensor([False,  True])
    """
    bad = value.isnan()
    for tensor in _tensors(output):
        nan = tensor.isnan()
        by_sample = nan.flatten(1).any(1) if tensor.ndim > 1 else nan
        bad = bad | (by_sample if by_sample.shape == bad.shape else nan.any())
    return bad


def raise_undefined(bad: Tensor) -> None:
    """Raise ValueError if the model said NaN for any sample.

    >>> raise_undefined(torch.tensor([False]))
    """
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"the model's output was NaN for {int(bad.sum())} of {len(bad)} samples under attack, first for sample "
            f"{first}: nothing can be said of its robustness"
        )


def check_pictures(x: Tensor, strength: float | Tensor, unbounded: bool = False) -> None:
    """Raise ValueError unless pixels lie in [0, 1] and the strength of an attack is a number, 0 or more.

    Args:
        unbounded: whether an infinite strength means something.

    >>> check_pictures(torch.rand(1, 3, 2, 2), 0.1)
    """
    if not x.is_floating_point() or (x.numel() and not (x.min() >= 0 and x.max() <= 1)):
        raise ValueError(
            "attacks move pixels within [0, 1], and x holds other values: give the pictures as they are and make a "
            "normalisation the first layer of the model"
        )
    strengths = torch.as_tensor(strength, device="cpu")
    if not (strengths >= 0).all():
        raise ValueError(f"the strength of an attack must be 0 or more, not {strength}")
    if not unbounded and strengths.isinf().any():
        raise ValueError(f"the strength of a corruption must be finite, not {strength}")


def like(per_sample: Tensor, x: Tensor) -> Tensor:
    """(N,) to (N, 1, 1, 1), so that it broadcasts over pixels.

    >>> like(torch.zeros(2), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 1, 1, 1])
    """
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers in the shape of x, in float32 or better.

    >>> normal(torch.zeros(2, 3), default_generator(torch.zeros(0))).shape
    torch.Size([2, 3])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=dtype)


def default_generator(x: Tensor) -> torch.Generator:
    """A generator on the device of x, always with the same seed.

    >>> default_generator(torch.zeros(0)).initial_seed()
    0
    """
    return torch.Generator(x.device).manual_seed(0)


def _label(logits: Tensor, y: Tensor) -> Tensor:
    """Labels as an index into dimension 1: (N, 1, ...)."""
    if logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} hold one class: there is no wrong one to attack towards")
    label, _ = class_indices(y, None)
    return label.unsqueeze(1)


def _exact(logits: Tensor) -> Tensor:
    """In float32 or better: in half precision a probability close to 1 is 1, and its gradient is gone."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)

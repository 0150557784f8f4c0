"""What a perturbation of the whole picture can do to its pixels: pixel accuracy and mIoU.

The certificates of all pixels hold at once, and more: a perturbation that flips the pixels in B has to spend
Σ_{p ∈ B} radius_p² ≤ ε² (see `_shared_budget`). `certified_miou` is the worst that this allows. In which arithmetic all
of this holds, and which `rows` may be given, `lipguide.robustness.certificates.radii` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor

from lipguide.checks import IGNORE
from lipguide.robustness.certificates.radii import (
    ATTACKERS_FAVOUR,
    budgets,
    check_logits,
    displacement,
    exact_radius,
    slopes,
)
from lipguide.robustness.scores import labelled

__all__ = ["ClassAttacks", "certified_miou", "certified_pixel_accuracy", "certified_pooled_miou", "class_attacks"]


def certified_pixel_accuracy(
    logits: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float] | Tensor,
    lipschitz: float | SupportsFloat = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = IGNORE,
    bound: str = "both",
) -> Tensor:
    """Share of each picture's pixels that stay right under any perturbation of norm `epsilon`: (N,), or (E, N).

    The mean over equally large pictures bounds the accuracy of the data set, for each picture is attacked with its own
    `epsilon`.

    Args:
        lipschitz: the constant of the whole map of logits (of features, with `rows`), all pixels together.
        bound: "independent" counts the pixels of radius above `epsilon`; "shared" lets the attacker buy the cheapest
            pixels from one budget; "both" lets it buy only those that it could reach alone, which is the better bound
            for a head with a kernel larger than 1×1 and the same as "shared" for any other.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> labels = torch.zeros(1, 2, 2, dtype=torch.long)
    >>> certified_pixel_accuracy(logits, labels, [0.0, 2.2, 3.1])
    tensor([[0.7500],
            [0.5000],
            [0.2500]], dtype=torch.float64)
    >>> certified_pixel_accuracy(logits, labels, 2.2, bound="independent")
    tensor([0.], dtype=torch.float64)
    """
    if bound not in ("independent", "shared", "both"):
        raise ValueError(f'bound must be "independent", "shared" or "both", not {bound!r}')
    labels, counts = labelled(labels, ignore_index)
    counts = counts.flatten(1)  # (N, P)
    radii = exact_radius(logits, labels, lipschitz, rows).flatten(1)
    right = counts & (radii > 0)
    epsilons = budgets(epsilon, logits.device)
    shares = []
    for reach in epsilons.reshape(-1):
        for_sale = right if bound == "shared" else right & (radii <= reach)
        limit = math.inf if bound == "independent" else _shared_budget(reach, rows, radii.shape[1])
        cheapest_first = torch.where(for_sale, radii.square(), math.inf).sort(1).values
        broken = (cheapest_first.isfinite() & (cheapest_first.cumsum(1) <= limit)).sum(1)
        shares.append((right.sum(1) - broken) / counts.sum(1).double())
    return torch.stack(shares).reshape(*epsilons.shape, len(logits))


@dataclass(frozen=True)
class ClassAttacks:
    """What one budget buys an attacker against each class of one picture, as far as its IoU goes.

    The intersection over union of class c is TP / (G + FP) for G pixels labelled c. The attacker breaks a of the TP
    true positives, and adds at most `added[c, a]` false positives with what is left of its budget; -1 stands where
    breaking a true positives is out of reach.
    """

    correct: Tensor  # (C,) TP
    union: Tensor  # (C,) G + FP
    labelled: Tensor  # (C,) G
    added: Tensor  # (C, A)


def class_attacks(
    logits: Tensor,
    labels: Tensor,
    epsilon: float,
    lipschitz: float | SupportsFloat = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> list[ClassAttacks]:
    """For every picture, all that a perturbation of norm `epsilon` could do to each class.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> class_attacks(logits, torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2), epsilon=1.0)[0].added
    tensor([[ 1, -1],
            [ 0,  0]])
    """
    labels, counts = labelled(labels, ignore_index)
    check_logits(logits, labels, rows)
    slope = slopes(logits.shape[1], lipschitz, rows, logits.device)
    reach = budgets(epsilon, logits.device) * (1 + ATTACKERS_FAVOUR)
    budget = _shared_budget(reach, rows, labels[0].numel())
    attacks = []
    for z, label, count in zip(logits.detach(), labels, counts, strict=True):
        z = z.flatten(1).double()  # (C, P)
        attacks.append(_attack_picture(z, label.flatten(), count.flatten(), slope, reach, budget))
    return attacks


def certified_miou(
    logits: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float] | Tensor,
    lipschitz: float | SupportsFloat = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Lower bound, for each picture, of its mIoU under any perturbation of norm `epsilon`: (N,), or (E, N).

    The mIoU is taken over the classes that the picture's *labels* hold, a set that no attack can change. Each class is
    attacked with the whole budget, and the minima are averaged: a sound bound, as no one attack does better than that
    against all of them. For the IoU of a data set take `certified_pooled_miou`.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> labels = torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2)
    >>> certified_miou(logits, labels, [0.0, 1.0])
    tensor([[1.0000],
            [0.3750]], dtype=torch.float64)
    """
    epsilons = budgets(epsilon, logits.device)
    bounds = []
    for budget in epsilons.reshape(-1).tolist():
        pictures = class_attacks(logits, labels, budget, lipschitz, rows, ignore_index)
        bounds.append(torch.stack([_picture_miou(attacks) for attacks in pictures]))
    return torch.stack(bounds).reshape(*epsilons.shape, len(logits))


def certified_pooled_miou(attacks: Iterable[ClassAttacks]) -> Tensor:
    """Lower bound of a data set's mIoU, Σ TP / Σ (G + FP) a class, when every picture is attacked: a scalar.

    Every picture's worst case depends on the pooled ratio itself: against a low ratio, breaking true positives counts
    for more than adding false ones. Pooling each picture's own minimiser is therefore *not* a bound. Dinkelbach's
    iteration finds the minimum.

    Args:
        attacks: those of all pictures, gathered from `class_attacks` batch by batch.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> labels = torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2)
    >>> certified_pooled_miou(class_attacks(logits, labels, 1.0) + class_attacks(logits, labels, 0.0))
    tensor(0.6786, dtype=torch.float64)
    """
    attacks = list(attacks)
    if not attacks:
        raise ValueError("the mIoU of no pictures is undefined")
    present = sum(a.labelled for a in attacks) > 0
    iou = sum(a.correct for a in attacks) / sum(a.union for a in attacks).clamp(min=1).double()
    while True:  # each round lowers a ratio of whole numbers, so the rounds come to an end
        lower = _pooled_iou(attacks, iou)
        if (lower >= iou)[present].all():
            return iou[present].mean()
        iou = torch.minimum(iou, lower)


def _pooled_iou(attacks: list[ClassAttacks], iou: Tensor) -> Tensor:
    """IoU (C,) of all pictures together, when each is attacked as hurts most against the ratio `iou`."""
    correct, union = torch.zeros_like(iou), torch.zeros_like(iou)
    for picture in attacks:
        broken = torch.arange(picture.added.shape[1], device=iou.device)  # (A,)
        harm = broken + iou[:, None] * picture.added  # (C, A)
        chosen = torch.where(picture.added >= 0, harm, -1.0).argmax(1, keepdim=True)
        correct += picture.correct - chosen.squeeze(1)
        union += picture.union + picture.added.gather(1, chosen).squeeze(1)
    return correct / union.clamp(min=1)


def _picture_miou(attacks: ClassAttacks) -> Tensor:
    broken = torch.arange(attacks.added.shape[1], device=attacks.added.device)  # (A,)
    iou = (attacks.correct[:, None] - broken).double() / (attacks.union[:, None] + attacks.added)  # (C, A)
    worst = torch.where(attacks.added >= 0, iou, math.inf).amin(1)
    return worst[attacks.labelled > 0].mean()


def _attack_picture(
    z: Tensor, labels: Tensor, counts: Tensor, slope: Tensor, reach: Tensor, budget: Tensor
) -> ClassAttacks:
    """What one picture's logits z (C, P) leave to the attacker.

    To break a true positive, one class must catch up with it; to add a false positive of class c, c must overtake every
    class. Both costs are displacements, in units of the input.
    """
    every_class = torch.arange(len(z), device=z.device)[:, None]  # (C, 1)
    predicted = z.argmax(0)  # (P,)
    labelled_so = counts & (labels == every_class)  # (C, P)
    claimed = counts & (predicted == every_class)
    quiet = counts & ~labelled_so & ~claimed
    top = z.gather(0, predicted[None])  # (1, P)
    to_break = displacement(top - z, slope[predicted].T).scatter(0, predicted[None], math.inf).amin(0)  # (P,)
    to_add = torch.stack([displacement(z - z[c], slope[c][:, None]).amax(0) for c in range(len(z))])  # (C, P)

    def total_cost(pixels: Tensor, cost: Tensor) -> Tensor:
        """Entry n: what the n + 1 cheapest of these pixels cost together."""
        affordable = pixels & (cost <= reach)
        return torch.where(affordable, cost.square(), math.inf).sort(1).values.cumsum(1)

    breaking = F.pad(total_cost(labelled_so & claimed, to_break), (1, 0))  # (C, P + 1), entry a: to break a pixels
    breaking = breaking[:, : int((breaking <= budget).sum(1).max())]
    left = budget - breaking
    added = torch.searchsorted(total_cost(quiet, to_add), left.contiguous(), right=True)
    return ClassAttacks(
        correct=(labelled_so & claimed).sum(1),
        union=(labelled_so | claimed).sum(1),
        labelled=labelled_so.sum(1),
        added=torch.where(left >= 0, added, -1),
    )


def _shared_budget(epsilon: Tensor, rows: Tensor | None, pixels: int) -> Tensor:
    """What Σ radius² over the flipped pixels cannot exceed, as it is summed in float64.

    To flip pixel p, its logits (or features) have to move by L radius_p, and the squares of these moves add up, over
    the map, to (L ε)² at most. Under a k×k head it is a patch of features that moves, and a feature is in k² patches.

    Args:
        pixels: of a picture. A sum of so many squares may come out too large by so many roundings, which is more than
            the other slack covers where there are thousands; the attacker is granted twice as much.
    """
    taps = 1 if rows is None else rows.shape[2:].numel()
    return taps * epsilon.square() * (1 + ATTACKERS_FAVOUR + 2 * pixels * 2.0**-53)

r"""Which objects a 1-Lipschitz Tinier SSD surely finds, however a picture moves within ε.

The features under a head change by no more than Lε, with L the bound of the stages up to it. So of one prior

* the difference of two logits z_i − z_j changes by no more than ‖w_i − w_j‖ Lε, which bounds each probability of the
  softmax from both sides;
* the four offsets, as one vector, change by no more than ρ = ‖W‖ Lε, with W their four filters. A centre is 10 times
  finer told than an offset, and a half size h = (s/2) exp(o/5) moves by no more than h exp(ρ/5)/5 times what its offset
  does. A side is a centre and a half size together, so that the box moves within a ball of radius √2 ρ times the
  largest of those four rates.

*Before suppression* an object is surely found by a prior whose probability of its class stays above the threshold, and
whose box stays on it. *After suppression*, by such a prior p if moreover no prior whose box may leave the object, and
which may score as well as p for the class, may come to overlap p's box by as much as silences it: whoever then silences
p is right itself. And fewer than the 20 that a scene keeps may score as well as p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipguide.bounds.network import lipschitz_bound
from lipguide.bounds.walk import check_untouched
from lipguide.layers.brick import computes_as
from lipguide.layers.export import without_parametrizations
from lipguide.losses.base import check_range
from lipguide.precision import full_precision
from lipguide.robustness.certificates.conditions import check_full_precision
from lipguide.robustness.certificates.radii import slopes
from lipguide.tasks.detection.boxes import CENTRE, NOTHING, SIZE, Targets, check_finite, check_number, check_targets
from lipguide.tasks.detection.certificates.answers import ROUNDING
from lipguide.tasks.detection.certificates.objects import right
from lipguide.tasks.detection.suppression import KEPT, MIN_SCORE, SILENCES
from lipguide.tasks.detection.tinier_ssd import PICTURE, RATIOS, TinierSSD

__all__ = ["Rates", "rates", "surely_found"]


class Rates(NamedTuple):
    """How fast each prior's answers can move, on the CPU. gaps: (P, C + 1, C + 1), of the difference of two logits;
    offsets: (P,), of the four offsets as one vector."""

    gaps: Tensor
    offsets: Tensor


@torch.no_grad()
def rates(model: TinierSSD) -> Rates:
    """The constants of a model in eval mode: those of its trunk times those of the filters of a prior.

    >>> from lipguide.tasks.detection.unlearnt import unlearnt
    >>> found = rates(unlearnt("sll", width=4).eval())
    >>> tuple(found.gaps.shape), tuple(found.offsets.shape), bool((found.offsets <= 1.001).all())
    ((1700, 11, 11), (1700,), True)
    """
    if not computes_as(model, TinierSSD):
        raise ValueError(
            f"{type(model).__name__} is no TinierSSD, or changes what one computes: its rates are not known"
        )
    check_untouched(model)
    check_full_precision(model)
    plain = without_parametrizations(model).cpu()
    gaps, offsets = [], []
    trunk, shape = 1.0, (3, PICTURE, PICTURE)
    for stage, *heads in zip(plain.stages, plain.class_heads, plain.box_heads, strict=True):
        of_classes, of_boxes = map(_filters, heads)
        trunk *= lipschitz_bound(stage.eval(), shape).value
        shape = tuple(stage(torch.zeros(1, *shape, dtype=plain.priors.dtype, device="cpu"))[0].shape)
        gap = torch.stack([slopes(len(rows), trunk, rows, rows.device) for rows in of_classes])
        offset = trunk * torch.linalg.matrix_norm(of_boxes, 2) * (1 + 1e-9)  # (4,)
        cells = shape[1] * shape[2]
        gaps.append(gap.repeat(cells, 1, 1))
        offsets.append(offset.repeat(cells))
    return Rates(torch.cat(gaps), torch.cat(offsets))


def _filters(head: nn.Module) -> Tensor:
    """(ratios, filters of a prior, features of a patch): each output of the head is one of them times a patch."""
    if not computes_as(head, nn.Conv2d) or head.padding_mode != "zeros" or head.groups > 1:
        raise ValueError(
            f"a head is {head}: what its filters add up is known of an nn.Conv2d without groups that pads with zeros"
        )
    return head.weight.double().flatten(1).unflatten(0, (len(RATIOS), -1))


@torch.no_grad()
def surely_found(model: TinierSSD, speeds: Rates, images: Tensor, targets: Targets, eps: float) -> tuple[float, float]:
    """The share of objects, in per cent, that are found on every picture within `eps`: with their label and an overlap
    of a half or more, before suppression and after it.

    Args:
        speeds: the model's `rates`.
        images: (N, 3, 74, 74) in [0, 1].
        eps: 0 or more, of the L2 norm.
    """
    check_number("eps", eps, 0)
    check_range(tau=model.tau)  # a negative one would turn the bounds around
    check_full_precision(model, images)
    boxes, labels = (part.cpu() for part in check_targets(targets, classes=model.classes))
    model, images = without_parametrizations(model).cpu(), images.cpu()
    before, after = [], []
    for scene, (own, things) in enumerate(zip(boxes, labels, strict=True)):
        there = things != NOTHING
        with full_precision():
            output = model(images[scene : scene + 1])
        check_finite(output[0], model.boxes(output), scene)  # NaN would be nobody's rival
        found = _found(model, output, speeds, own[there], things[there], eps)
        before.append(found[0])
        after.append(found[1])
    return tuple(100 * float(torch.cat(part).double().mean()) for part in (before, after))


def _found(
    model: TinierSSD, output: tuple[Tensor, Tensor], speeds: Rates, truth: Tensor, labels: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Of one scene: which objects are surely found, before and after suppression, (n,) each."""
    low, high = _scores(model.tau * output[0][0].double(), model.tau * (speeds.gaps * eps + ROUNDING))
    placed = model.boxes(output)[0].double()
    radius = _radius(output[1][0].double(), model.priors.double(), speeds.offsets * eps + ROUNDING)
    good = right(placed, radius, truth.double(), labels)  # (n, P)
    least = low[:, labels].T.masked_fill(~good, 0.0)  # (n, P)
    before, after = least.amax(1) > MIN_SCORE, []
    for thing, label in enumerate(labels.tolist()):
        prior = int(least[thing].argmax())
        rivals = ~good[thing] & (high[:, label] >= least[thing, prior])
        near = _most_overlap(placed[prior], radius[prior], placed, radius) > SILENCES
        few = int((high >= least[thing, prior]).sum()) <= KEPT
        after.append(bool(before[thing]) and few and not bool((rivals & near).any()))
    return before, torch.tensor(after, dtype=torch.bool, device=before.device)


def _scores(logits: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest probability of each class but the last, (P, C) each, of logits (P, C + 1) whose
    differences move by up to (P, C + 1, C + 1)."""
    lead = logits[:, None] - logits[:, :, None]  # [p, i, j] = z_j − z_i
    moves = moves * (1 - torch.eye(logits.shape[1], dtype=moves.dtype, device=moves.device))
    low, high = (1 / (lead + sign * moves).exp().sum(2) for sign in (1, -1))
    return low[:, :-1], high[:, :-1]


def _radius(offsets: Tensor, priors: Tensor, moves: Tensor) -> Tensor:
    """(P,): the ball in which a box moves while its offsets (P, 4) move within `moves` (P,)."""
    size = priors[:, 2:]
    half = size * (offsets[:, 2:] / SIZE).exp() / 2
    fastest = torch.cat([size / CENTRE, half * (moves / SIZE).exp()[:, None] / SIZE], 1).amax(1)
    return 2**0.5 * fastest * moves


def _most_overlap(box: Tensor, own: Tensor, others: Tensor, radius: Tensor) -> Tensor:
    """(P,): an upper bound of the overlap of a moving box with moving boxes (P, 4), all cut at the picture's edge."""
    outward = box.new_tensor([-1.0, -1.0, 1.0, 1.0])
    large, small = ((box + sign * own * outward).clamp(0, 1) for sign in (1, -1))
    larger, smaller = ((others + sign * radius[:, None] * outward).clamp(0, 1) for sign in (1, -1))
    shared = torch.minimum(large[2:], larger[:, 2:]) - torch.maximum(large[:2], larger[:, :2])
    both = shared.clamp(min=0).prod(1)
    areas = (small[2:] - small[:2]).clamp(min=0).prod() + (smaller[:, 2:] - smaller[:, :2]).clamp(min=0).prod(1)
    return torch.where(both > 0, both / (areas - both).clamp(min=1e-12), 0.0)

r"""Certified recall, precision and average precision: what no attack within ε brings a detector below.

At threshold t let R(t) be the share of objects that are surely found, F(t) their number, and A(t) the largest possible
number of false alarms, or a bound of it. On every attacked copy of the scenes, recall at t is R(t) or more, and
precision is

.. math:: P(t) = \frac{F(t)}{F(t) + A(t)}

or more: it grows with true detections, of which there are F(t) or more, and falls with false ones. There are no more of
these than possible detections without F(t) of them, either. To divide by all that are possible, as others do, is to
count what an attacker may leave as what he makes up.

*Lemma.* The attacked average precision of a class is at least

.. math:: \mathrm{AP} = \frac1{101} \sum_{k=0}^{100} \max\{P(t) : R(t) \ge k / 100\},

whatever the attack, another one for each scene. *Proof.* Interpolated precision at recall r is the best precision at
any threshold with recall r or more. For every t with R(t) ≥ r the attacked recall at t is r or more and the attacked
precision P(t) or more; take the best such t. ∎

Between two thresholds at which nothing changes, nothing is gained, so t runs over those just below each height. Recall
is read at the very numbers k / 100 at which `score` reads it, which are those of single precision: with others the
certified value would come to lie above the measured one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.tasks.detection.boxes import NOTHING, Targets, check_number, check_targets
from lipguide.tasks.detection.certificates.answers import Answers
from lipguide.tasks.detection.certificates.scene import Scene, moved
from lipguide.tasks.detection.scores import MOST, RECALLS

__all__ = [
    "Certificate",
    "certified_ap",
    "certified_precision",
    "certified_recall",
    "certify",
    "joined",
    "object_radii",
    "part_of",
]

PIECE = 64  # scenes at a time


class Certificate(NamedTuple):
    """What holds for every picture within `eps` of N scenes. All objects and all alarms stand in one row.

    Args:
        eps: L2 norm.
        least: the threshold above which detections are counted; below it nothing is said.
        scene, label: (n,) of each object.
        before: (n,), a right window of the object surely speaks below this threshold; −∞: none does.
        heights: (n,), the object is surely found, after suppression, below this threshold.
        births: (K,), below this threshold one more detection is possible.
        alarms: (K,), below this one it can be false; −∞: never.
        alarm_scene, alarm_label: (K,) of each of these.
    """

    eps: float
    least: float
    scene: Tensor
    label: Tensor
    before: Tensor
    heights: Tensor
    births: Tensor
    alarms: Tensor
    alarm_scene: Tensor
    alarm_label: Tensor


@torch.no_grad()
def certify(given: Answers, targets: Targets, eps: float, least: float = 0.0) -> Certificate:
    """The certificates of all scenes at `eps`, for every threshold from `least` on.

    A class of which more than 100 detections are possible in a scene has no certified object there: an evaluator might
    cut one off.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> box = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    >>> one = torch.ones(1)
    >>> given = Answers(torch.tensor([[[0.9]]]), box[None], torch.ones(1, 1).bool(), 1.0, 0.1 * one, one)
    >>> certificate = certify(given, pad_targets([box], [torch.tensor([0])]), eps=0.25)
    >>> [round(float(part), 2) for part in (certificate.heights, certificate.births)]
    [0.65, 1.15]
    """
    check_number("eps", eps, 0)
    check_number("least", least)
    given.check()
    boxes, labels = (part.cpu() for part in check_targets(targets, classes=given.scores.shape[2]))
    if len(labels) != len(given.scores):
        raise ValueError(f"answers to {len(given.scores)} pictures, but the objects of {len(labels)} scenes")
    if not len(labels):
        raise ValueError("there is no scene to certify: give the answers to one picture or more")
    objects: list[tuple[Tensor, ...]] = []
    alarms: list[tuple[Tensor, ...]] = []
    for first in range(0, len(labels), PIECE):
        some = slice(first, min(first + PIECE, len(labels)))
        part, things = given.part(some), zip(boxes[some], labels[some], strict=True)
        scenes = [
            Scene.of(part, number, eps, least, truth[classes != NOTHING], classes[classes != NOTHING])
            for number, (truth, classes) in enumerate(things)
        ]
        closer, scenes = moved(part, scenes, eps, least)
        for scene, *bounds in zip(scenes, *closer, strict=True):
            before, after = scene.heights(*bounds)
            possible, false = scene.possible(*bounds, least)
            alarms.append((possible.label, possible.highest(bounds[1])[0], possible.highest(false)[0]))
            many = torch.bincount(possible.label, minlength=given.scores.shape[2])
            after = after.masked_fill(many[scene.labels] > MOST, -torch.inf)
            objects.append((scene.labels, before, after))
    label, before, after = (torch.cat(parts) for parts in zip(*objects, strict=True))
    alarm_label, births, false = (torch.cat(parts) for parts in zip(*alarms, strict=True))
    numbers = torch.arange(len(labels), device="cpu")
    of_objects = numbers.repeat_interleave(torch.tensor([len(part[0]) for part in objects], device="cpu"))
    of_alarms = numbers.repeat_interleave(torch.tensor([len(part[0]) for part in alarms], device="cpu"))
    return Certificate(eps, least, of_objects, label, before, after, births, false, of_alarms, alarm_label)


def joined(parts: Sequence[Certificate], scenes: Sequence[int]) -> Certificate:
    """One certificate from those of several parts of so many scenes each, at one eps and above one threshold.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> box, one = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.ones(1)
    >>> given = Answers(torch.tensor([[[0.9]]]), box[None], torch.ones(1, 1).bool(), 1.0, 0.1 * one, one)
    >>> certificate = certify(given, pad_targets([box], [torch.tensor([0])]), eps=0.25)
    >>> joined([certificate, certificate], [1, 1]).scene
    tensor([0, 1])
    """
    if len(parts) != len(scenes):
        raise ValueError(f"{len(parts)} certificates, and the numbers of scenes of {len(scenes)}")
    if not parts or any((part.eps, part.least) != (parts[0].eps, parts[0].least) for part in parts):
        raise ValueError("certificates of different eps or thresholds are not one: join some of the same")
    first = [sum(scenes[:number]) for number in range(len(parts))]
    moved = [
        part._replace(scene=part.scene + start, alarm_scene=part.alarm_scene + start)
        for part, start in zip(parts, first, strict=True)
    ]
    return Certificate(*parts[0][:2], *(torch.cat(columns) for columns in list(zip(*moved, strict=True))[2:]))


def part_of(certificate: Certificate, scenes: slice) -> Certificate:
    """The certificate of some of the scenes.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> box, one = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.ones(1)
    >>> given = Answers(torch.tensor([[[0.9]]]), box[None], torch.ones(1, 1).bool(), 1.0, 0.1 * one, one)
    >>> certificate = certify(given, pad_targets([box], [torch.tensor([0])]), eps=0.25)
    >>> part_of(joined([certificate, certificate], [1, 1]), slice(1, 2)).scene
    tensor([0])
    """
    mine, own = (
        (column >= scenes.start) & (column < scenes.stop) for column in (certificate.scene, certificate.alarm_scene)
    )
    objects = (column[mine] for column in (certificate.label, certificate.before, certificate.heights))
    possible = certificate.births[own], certificate.alarms[own]
    alarms = certificate.alarm_scene[own] - scenes.start, certificate.alarm_label[own]
    first = certificate.scene[mine] - scenes.start
    return Certificate(*certificate[:2], first, *objects, *possible, *alarms)


def certified_recall(certificate: Certificate, least: float | None = None) -> float:
    """The share of objects, in per cent, that are found above threshold `least` on every picture within eps: with
    their label, an overlap above a half, and after suppression. This says nothing about false alarms.

    Args:
        certificate: as `certify` gives it.
        least: the threshold; None for the certificate's own, the lowest one.
    """
    least = _threshold(certificate, least)
    return 100 * float((certificate.heights > least).double().mean()) if len(certificate.heights) else 0.0


def certified_precision(certificate: Certificate, least: float | None = None) -> float:
    """The share of true ones among all detections above `least`, in per cent, that no attack within eps undercuts."""
    least = _threshold(certificate, least)
    columns = certificate.heights, certificate.births, certificate.alarms
    found, possible, false = ((column > least).sum() for column in columns)
    return 100 * int(found) / max(int(_reported(found, possible, false)), 1)


def _threshold(certificate: Certificate, least: float | None) -> float:
    if least is None:
        return certificate.least
    check_number("least", least, certificate.least)  # below, no alarms are counted
    return least


def certified_ap(certificate: Certificate, of_all: bool = False) -> float:
    """Mean over the classes that occur of the average precision, in per cent, that no attack within eps undercuts.

    Args:
        certificate: of some scenes.
        of_all: the lower one whose precision is over all detections that are possible, as in Chiang et al. (2020).

    >>> alone, height, birth = torch.tensor([0]), torch.tensor([0.5]), torch.tensor([0.7])
    >>> certificate = Certificate(0.1, 0.0, alone, alone, height, height, birth, birth, alone, alone)
    >>> certified_ap(certificate, of_all=True)  # one detection at most, and one that is right
    100.0
    """
    classes = certificate.label.unique().tolist()
    values = []
    for c in classes:
        own = certificate.heights[certificate.label == c]
        levels = own[own > certificate.least].sort(descending=True).values
        mine, found = certificate.alarm_label == c, _count(own, levels)
        possible = _count(certificate.births[mine], levels)
        false = possible if of_all else _count(certificate.alarms[mine], levels)
        values.append(_average(found / len(own), found / _reported(found, possible, false)))
    return 100 * sum(values) / max(len(values), 1)


def _reported(found: Tensor, possible: Tensor, false: Tensor) -> Tensor:
    """How many detections there are at most where so many of them are surely right: by all that are possible, or by
    those that can be false."""
    return torch.minimum(torch.maximum(possible, found), found + false)


def _count(values: Tensor, levels: Tensor) -> Tensor:
    """How many of the values stand at each of these levels or above."""
    return (values[None] >= levels[:, None]).sum(1).double()


def _average(recall: Tensor, precision: Tensor) -> float:
    """Of one class, from both at falling thresholds, (K,) each."""
    best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or more
    place = torch.searchsorted(recall, RECALLS)
    return float(torch.cat([best, best.new_zeros(1)])[place].mean())


def object_radii(given: Answers, targets: Targets, grid: list[float], least: float = 0.0) -> Tensor:
    """The largest ε of a grid at which each object is surely found, (n,); 0 where it is at none.

    What is found within a ball is found within a smaller one, so the certificate may come from any ε.
    """
    radii = None
    for eps in sorted(grid):
        found = certify(given, targets, eps, least).heights > least
        radii = torch.zeros(len(found), device="cpu") if radii is None else radii
        radii[found] = eps
    if radii is None:
        raise ValueError("the grid of eps is empty: give one or more")
    return radii

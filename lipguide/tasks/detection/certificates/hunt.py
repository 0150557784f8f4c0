"""Attacks aimed at certificates: each certified object is hunted inside its ball, in four ways.

A certificate that falls is wrong. That none falls proves nothing, but a hunt that catches certificates with a known
mistake in them is worth something against an unknown one.

* *label*: lower the object's class at every window that is right for it;
* *box*: push the box of the best of them off the object;
* *suppressor*: raise a rival that is not right over the right ones;
* *alarm*: raise whatever speaks, or nearly does, anywhere in the scene.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipguide.arguments import whole
from lipguide.robustness.attacks import pgd_l2
from lipguide.tasks.detection.boxes import NOTHING, Targets
from lipguide.tasks.detection.certificates.answers import said_of
from lipguide.tasks.detection.certificates.objects import needed
from lipguide.tasks.detection.certificates.overlap import overlap
from lipguide.tasks.detection.certificates.summary import Certificate
from lipguide.tasks.detection.decision import reported
from lipguide.tasks.detection.scores import right

__all__ = ["AIMS", "Hunted", "hunt"]

SHARP = 30.0  # of soft maxima
NEARLY = 0.4  # overlap from which a window could be right after a little push


class Hunted(NamedTuple):
    """hunted: certified objects; fallen: how many of them some attack loses, by its aim; overrun: how many attacked
    scenes have more detections of a class above some threshold than the bounds allow, or more false ones."""

    hunted: int
    fallen: dict[str, int]
    overrun: int


class _Prey(NamedTuple):
    """One row for each object that is hunted. labels: (K,); good, beside: (K, P), the windows that are right for it, or
    nearly, and the others that are their rivals; truth: (K, 4)."""

    labels: Tensor
    good: Tensor
    beside: Tensor
    truth: Tensor


def _label(scores: Tensor, boxes: Tensor, prey: _Prey) -> Tensor:
    return -_soft_maximum(_own(scores, prey), prey.good)


def _box(scores: Tensor, boxes: Tensor, prey: _Prey) -> Tensor:
    best = _own(scores, prey).masked_fill(~prey.good, -torch.inf).argmax(1)
    return -overlap(boxes[torch.arange(len(best), device=best.device), best], prey.truth)


def _suppressor(scores: Tensor, boxes: Tensor, prey: _Prey) -> Tensor:
    own = _own(scores, prey)
    return _soft_maximum(own, prey.beside) - _soft_maximum(own, prey.good)


def _alarm(scores: Tensor, boxes: Tensor, prey: _Prey) -> Tensor:
    return (SHARP / 3 * scores).sigmoid().sum((1, 2))


AIMS: dict[str, Callable[[Tensor, Tensor, _Prey], Tensor]] = {
    "label": _label,
    "box": _box,
    "suppressor": _suppressor,
    "alarm": _alarm,
}


def _own(scores: Tensor, prey: _Prey) -> Tensor:
    """(K, P): the scores of each object's class."""
    return scores[torch.arange(len(prey.labels), device=scores.device), :, prey.labels]


def _soft_maximum(values: Tensor, among: Tensor) -> Tensor:
    """(K,): of each row the largest value among some, smoothed; far below all where there is none."""
    return (SHARP * values).masked_fill(~among, -1e4).logsumexp(1) / SHARP


def hunt(
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    certificate: Certificate,
    steps: int = 20,
    batch_size: int = 32,
) -> Hunted:
    """Attack every object that is certified at the certificate's threshold, within the certificate's `eps`.

    Args:
        model: as `lipguide.tasks.detection.certificates.answers` takes it.
        images, targets: the scenes that were certified.
        certificate: what is put to the test.
        steps: of each of the four attacks.
    """
    whole("steps", steps, "an attack takes one step or more")
    targets = Targets(*(part.cpu() for part in targets))  # where the certificate is
    rows = (certificate.heights > certificate.least).nonzero().squeeze(1)
    fallen = dict.fromkeys(AIMS, 0)
    overrun = 0
    if not len(rows):
        return Hunted(0, fallen, overrun)
    for part in rows.split(batch_size):
        scenes = certificate.scene[part]
        labels, truths, needs = _wanted(targets, certificate, part)
        prey = _prey(model, images[scenes], labels, truths)
        for aim, function in AIMS.items():

            def ascend(output: Any, some: _Prey, function: Callable[..., Tensor] = function) -> Tensor:
                return function(model.scores(output), model.boxes(output), some)

            moved = pgd_l2(model, images[scenes], prey, certificate.eps, steps, loss=ascend)
            found = reported(*said_of(model, moved), certificate.least)
            rightly = right(found, Targets(targets.boxes[scenes], targets.labels[scenes]))
            for detections, label, truth, least in zip(found, labels, truths, needs, strict=True):
                there = (detections["labels"] == label) & (overlap(detections["boxes"], truth) > least)
                fallen[aim] += not bool(there.any())
            overrun += sum(map(partial(_overrun, certificate), scenes.tolist(), found, rightly))
    return Hunted(len(rows), fallen, overrun)


def _wanted(targets: Targets, certificate: Certificate, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Label, box and needed overlap of the objects in some rows of a certificate."""
    labels, truths, least = [], [], []
    for row in part.tolist():
        scene = int(certificate.scene[row])
        there = targets.labels[scene] != NOTHING
        boxes, classes = targets.boxes[scene, there], targets.labels[scene, there]
        number = row - int((certificate.scene < scene).sum())  # objects stand scene after scene
        labels.append(classes[number])
        truths.append(boxes[number])
        least.append(needed(boxes, classes)[number])
    return torch.stack(labels), torch.stack(truths), torch.stack(least)


def _prey(model: nn.Module, images: Tensor, labels: Tensor, truths: Tensor) -> _Prey:
    """What is hunted goes by the boxes as they stand, not by what a certificate, which may be wrong, says of them. It
    is on the device of the pictures."""
    _, boxes, graph = said_of(model, images)
    good = overlap(boxes, truths[:, None]) > NEARLY
    beside = (good.float() @ graph.float() > 0) & ~good
    return _Prey(*(part.to(images.device) for part in (labels, good, beside, truths)))


def _overrun(certificate: Certificate, scene: int, detections: dict[str, Tensor], rightly: Tensor) -> bool:
    """Whether there is a threshold above which a scene has more detections of some class than its certificate allows,
    or more that are not right."""
    labels, scores = detections["labels"], detections["scores"]
    for label in labels.unique().tolist():
        own, mine = (certificate.alarm_scene == scene) & (certificate.alarm_label == label), labels == label
        made, false = scores[mine], scores[mine & ~rightly]
        if _beyond(made, certificate.births[own]) or _beyond(false, certificate.alarms[own]):
            return True
    return False


def _beyond(scores: Tensor, bound: Tensor) -> bool:
    """Whether there are more scores above some threshold than there are entries of a bound."""
    made, allowed = (part.sort(descending=True).values for part in (scores, bound))
    return len(made) > len(allowed) or bool((made > allowed[: len(made)]).any())

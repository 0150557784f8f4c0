"""What a detector finds, and how good that is: mAP by torchmetrics, recall and false positives beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from lipguide.checks import check_eval
from lipguide.tasks.detection.boxes import MIN_SCORE, NOTHING, Targets, detect

__all__ = ["Score", "detections", "hits", "score"]

OVERLAP = 0.5  # at which a detection counts as right


class Score(NamedTuple):
    """map50: mean average precision at an overlap of 0.5, in per cent; false_positives and detections: a scene."""

    map50: float
    recall: float
    false_positives: float
    detections: float


def check_call(model: nn.Module, batch_size: int) -> None:
    """Raise ValueError for a model in training mode, whose statistics a mere look would move, and for empty batches."""
    check_eval(model, "it detects or is attacked")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


@torch.no_grad()
def detections(
    model: nn.Module, images: Tensor, batch_size: int = 256, min_score: float = MIN_SCORE
) -> list[dict[str, Tensor]]:
    """What ``model``, which has methods ``log_scores`` and ``boxes`` of its output, detects in each picture.

    Raises ValueError for a model in training mode, and, naming the scene, for scores or boxes that are not finite.

    >>> from lipguide.tasks.detection.configurations import naive
    >>> found = detections(naive().eval(), torch.rand(2, 3, 74, 74))
    >>> len(found), sorted(found[0])
    (2, ['boxes', 'labels', 'scores'])
    """
    check_call(model, batch_size)
    found: list[dict[str, Tensor]] = []
    with parametrize.cached():
        for part in images.split(batch_size):
            output = model(part)
            scores, boxes = model.log_scores(output).exp(), model.boxes(output).clamp(0, 1)
            found += detect(scores, boxes, min_score, first=len(found))
    return found


def score(found: list[dict[str, Tensor]], targets: Targets) -> Score:
    """Rate detections. mAP averages over the classes that occur; a scene without detections counts like any other.

    Raises ValueError, and names the scene, for detections whose boxes or scores are not finite.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> boxes, labels = torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([3])
    >>> score([{"boxes": boxes, "scores": torch.tensor([0.9]), "labels": labels}], pad_targets([boxes], [labels]))
    Score(map50=100.0, recall=100.0, false_positives=0.0, detections=1.0)
    """
    metric = MeanAveragePrecision(iou_thresholds=[OVERLAP])
    found, truth = _compared(found, targets)
    metric.update(found, truth)
    scenes, objects = max(len(truth), 1), sum(len(true["labels"]) for true in truth)
    made, right = sum(len(scene["labels"]) for scene in found), sum(map(_hits, found, truth))
    return Score(
        map50=100 * max(float(metric.compute()["map_50"]), 0.0),  # torchmetrics says -1 where there is no object
        recall=100 * right / max(objects, 1),
        false_positives=(made - right) / scenes,
        detections=made / scenes,
    )


def hits(found: list[dict[str, Tensor]], targets: Targets) -> list[int]:
    """How many detections of each scene are right: by falling score, each takes, of the objects of its class that are
    still free, the one that it overlaps most, if by half or more."""
    return list(map(_hits, *_compared(found, targets)))


def _compared(
    found: list[dict[str, Tensor]], targets: Targets
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Detections and targets on the CPU, one a scene each, the former finite and the latter without padding."""
    there = targets.labels.cpu() != NOTHING
    scenes = zip(targets.boxes.cpu(), targets.labels.cpu(), there, strict=True)
    truth = [{"boxes": boxes[real], "labels": labels[real]} for boxes, labels, real in scenes]
    if len(found) != len(truth):
        raise ValueError(f"detections of {len(found)} scenes, but targets of {len(truth)}")
    found = [{name: column.cpu() for name, column in scene.items()} for scene in found]
    for index, scene in enumerate(found):
        if not (scene["boxes"].isfinite().all() and scene["scores"].isfinite().all()):
            raise ValueError(f"scene {index}: a detection has a box or a score that is not finite")
    return found, truth


def _hits(found: dict[str, Tensor], true: dict[str, Tensor]) -> int:
    if not len(found["labels"]) or not len(true["labels"]):
        return 0
    overlaps = box_iou(found["boxes"], true["boxes"])
    overlaps = overlaps.masked_fill(found["labels"][:, None] != true["labels"], 0.0).tolist()
    free, count = set(range(len(true["labels"]))), 0
    for row in found["scores"].argsort(descending=True).tolist():
        best = max(free, key=lambda thing: overlaps[row][thing], default=None)
        if best is not None and overlaps[row][best] >= OVERLAP:
            free.remove(best)
            count += 1
    return count

"""What a detector finds, and how good that is: mAP by torchmetrics, recall and false positives beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from lipguide.checks import check_eval
from lipguide.layers.arguments import whole
from lipguide.tasks.detection.boxes import (
    MIN_SCORE,
    NOTHING,
    Targets,
    check_finite,
    check_number,
    check_targets,
    detect,
    single,
)

__all__ = ["Score", "detections", "hits", "score"]

OVERLAP = 0.5  # at which a detection counts as right


class Score(NamedTuple):
    """map50: mean average precision at an overlap of 0.5, in per cent; false_positives and detections: a scene."""

    map50: float
    recall: float
    false_positives: float
    detections: float


def check_call(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Raise ValueError for a model in training mode, whose statistics a mere look would move, for pictures that are
    still bytes, and for empty batches."""
    check_eval(model, "it detects or is attacked")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"pictures must be (N, C, H, W) in [0, 1], not {tuple(images.shape)} of {images.dtype}: unit_range divides "
            "bytes by 255"
        )
    whole("batch_size", batch_size, "a batch has one picture or more")


@torch.no_grad()
def detections(
    model: nn.Module, images: Tensor, batch_size: int = 256, min_score: float = MIN_SCORE
) -> list[dict[str, Tensor]]:
    """What `model`, which has methods `log_scores` and `boxes` of its output, detects in each picture.

    Raises ValueError for a model in training mode, and, naming the scene, for scores or boxes that are not finite.

    >>> from lipguide.tasks.detection.configurations import naive
    >>> found = detections(naive().eval(), torch.rand(2, 3, 74, 74))
    >>> len(found), sorted(found[0])
    (2, ['boxes', 'labels', 'scores'])
    """
    check_call(model, images, batch_size)
    check_number("min_score", min_score)
    found: list[dict[str, Tensor]] = []
    if not len(images):  # many a model refuses an empty batch
        return found
    with parametrize.cached():
        for part in images.split(batch_size):
            output = model(part)
            scores = model.log_scores(output).exp()
            boxes = model.boxes(output)
            check_finite(scores, boxes, len(found))  # before the cut at the picture's edge, which would hide infinity
            found += detect(scores, boxes.clamp(0, 1), min_score, first=len(found))
    return found


def score(found: list[dict[str, Tensor]], targets: Targets) -> Score:
    """Rate detections. mAP averages over the classes that occur; a scene without detections counts like any other.

    Raises ValueError, and names the scene, for detections whose boxes or scores are not finite, and for targets that
    `pad_targets` would not have made.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> boxes, labels = torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([3])
    >>> score([{"boxes": boxes, "scores": torch.tensor([0.9]), "labels": labels}], pad_targets([boxes], [labels]))
    Score(map50=100.0, recall=100.0, false_positives=0.0, detections=1.0)
    """
    found, truth = _compared(found, targets)
    metric = MeanAveragePrecision(iou_thresholds=[OVERLAP])
    metric.update(found, truth)
    scenes = max(len(truth), 1)
    objects = sum(len(true["labels"]) for true in truth)
    made = sum(len(scene["labels"]) for scene in found)
    right = sum(map(_hits, found, truth))
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
    """Detections and targets on the CPU, one a scene each, the former checked and the latter without padding."""
    boxes, labels = (part.cpu() for part in check_targets(targets, classes=None))
    there = labels != NOTHING
    truth = [{"boxes": b[real], "labels": c[real]} for b, c, real in zip(boxes, labels, there, strict=True)]
    if len(found) != len(truth):
        raise ValueError(f"detections of {len(found)} scenes, but targets of {len(truth)}")
    return [_checked(index, scene) for index, scene in enumerate(found)], truth


def _checked(index: int, scene: dict[str, Tensor]) -> dict[str, Tensor]:
    """The detections of one scene on the CPU, boxes and scores in single precision or better, labels in int64."""
    boxes, scores, labels = scene["boxes"].cpu(), scene["scores"].cpu(), scene["labels"].cpu()
    if boxes.shape != (len(labels), 4) or scores.shape != labels.shape:
        raise ValueError(
            f"scene {index}: boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)} and labels {tuple(labels.shape)} "
            "of detections; (n, 4), (n,) and (n,) are expected"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or (labels.long() < 0).any():
        raise ValueError(f"scene {index}: labels of detections are whole numbers from 0, not {labels.tolist()}")
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ValueError(f"scene {index}: a detection has a box or a score that is not finite")
    return {"boxes": single(boxes), "scores": single(scores), "labels": labels.long()}


def _hits(found: dict[str, Tensor], true: dict[str, Tensor]) -> int:
    if not len(found["labels"]) or not len(true["labels"]):
        return 0
    overlaps = box_iou(found["boxes"], true["boxes"])  # (detections, objects)
    overlaps = overlaps.masked_fill(found["labels"][:, None] != true["labels"], 0.0).tolist()
    free = set(range(len(true["labels"])))
    count = 0
    for row in found["scores"].argsort(descending=True, stable=True).tolist():
        best = max(free, key=overlaps[row].__getitem__, default=None)
        if best is not None and overlaps[row][best] >= OVERLAP:
            free.remove(best)
            count += 1
    return count

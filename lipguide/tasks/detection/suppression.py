"""What is read off a detector in the end: the boxes that score well, less those that a better one silences.

All scenes of a batch are treated at once, and a turn of suppression costs the same however many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipguide.arguments import whole
from lipguide.tasks.detection.boxes import check_finite, check_number, single

__all__ = ["KEPT", "MIN_SCORE", "SILENCES", "detect"]

MIN_SCORE = 0.2  # above which a box counts as a detection
SILENCES = 0.3  # the overlap above which a better box silences one
KEPT = 20  # how many a scene keeps


@torch.no_grad()
def detect(
    scores: Tensor,
    boxes: Tensor,
    min_score: float = MIN_SCORE,
    overlap: float = SILENCES,
    most: int = KEPT,
    first: int = 0,
) -> list[dict[str, Tensor]]:
    """Detections of every scene, as torchmetrics takes them: the boxes of each class that score above `min_score`,
    less those that overlap a better one of their class by more than `overlap`, the `most` best of a scene.

    Raises ValueError, and names the scene, for scores or boxes that are not finite: nothing found is another answer.
    What comes in half precision goes out in single precision.

    Args:
        scores: (N, P, C), of the classes alone, without background.
        boxes: (N, P, 4) xyxy.
        first: the number of the first scene, for errors.

    >>> boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    >>> found = detect(torch.tensor([[[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]]]), boxes)
    >>> found[0]["labels"].tolist(), found[0]["boxes"][1].tolist()
    ([0, 1], [0.5, 0.5, 1.0, 1.0])
    """
    check_number("min_score", min_score)
    check_number("overlap", overlap, 0, 1)
    whole("most", most, "that many boxes of a scene are kept")
    whole("first", first, "it is the number of a scene", least=0)
    if scores.ndim != 3 or boxes.shape != (*scores.shape[:2], 4):
        raise ValueError(
            f"scores must be (N, P, C) and boxes (N, P, 4), not {tuple(scores.shape)} and {tuple(boxes.shape)}"
        )
    scores, boxes = single(scores), single(boxes)
    check_finite(scores, boxes, first)
    scenes, _, classes = scores.shape
    scene, prior, label = (scores > min_score).nonzero(as_tuple=True)
    order = scores[scene, prior, label].argsort(descending=True, stable=True)
    scene, prior, label = scene[order], prior[order], label[order]
    kept = _suppressed(boxes[scene, prior], scene * classes + label, scenes * classes, overlap, most)
    kept = kept[scene[kept].argsort(stable=True)]  # by scene, and within one by falling score
    kept = kept[_places(scene[kept], scenes) < most]
    scene, prior, label = scene[kept], prior[kept], label[kept]
    columns = {"boxes": boxes[scene, prior], "scores": scores[scene, prior, label], "labels": label}
    counts = torch.bincount(scene, minlength=scenes).tolist()
    by_scene = (column.split(counts) for column in columns.values())
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*by_scene, strict=True)]


def _suppressed(boxes: Tensor, groups: Tensor, number: int, overlap: float, most: int) -> Tensor:
    """Which of K boxes no better one of their group overlaps; of each group the `most` first ones, in rising order.

    In each turn the best box that a group has left is kept and silences those that it overlaps, in all groups of all
    scenes at once. So there are as many turns as the fullest group keeps boxes, however many scenes there are.

    Args:
        boxes: (K, 4), by falling score.
        groups: (K,), one for each scene and class: only within one do boxes silence each other.
        number: of groups.
    """
    boxes = boxes.double()
    rest = torch.arange(len(boxes), device=boxes.device)
    kept = [rest[:0]]
    for _ in range(most):
        if not len(rest):
            break
        own = groups[rest]
        best = rest.new_full((number,), len(boxes)).scatter_reduce(0, own, rest, "amin")
        leader = best[own]
        kept.append(rest[rest == leader])
        silenced = _overlaps(boxes[rest], boxes[leader]) > overlap
        rest = rest[~silenced & (rest != leader)]
    return torch.cat(kept).sort().values


def _overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """(K,): intersection over union of each box with the one beside it."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others)]
    return both / (areas[0] + areas[1] - both)


def _places(groups: Tensor, number: int) -> Tensor:
    """The place of each within its group, from 0.

    Args:
        groups: (K,), rising.
        number: of groups.

    >>> _places(torch.tensor([0, 0, 2]), 3)
    tensor([0, 1, 0])
    """
    counts = torch.bincount(groups, minlength=number)
    first = counts.cumsum(0) - counts
    return torch.arange(len(groups), device=groups.device) - first[groups]

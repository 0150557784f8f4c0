"""What a detector finds, and how good that is: mAP as COCO defines it, recall and false positives beside it.

All scenes are rated at once, on tensors: thousands in less than a second. The values are those of torchmetrics, whose
`MeanAveragePrecision` loops over scenes and classes; a test holds the two together. (A box whose corners are swapped
is a false alarm here. There it has a negative area, and is left out.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipguide.arguments import whole
from lipguide.checks import check_eval
from lipguide.layers.export import remembered
from lipguide.tasks.detection.boxes import NOTHING, Targets, check_finite, check_number, check_targets
from lipguide.tasks.detection.suppression import MIN_SCORE, detect

__all__ = ["Score", "detections", "hits", "on_cpu", "right", "score"]

OVERLAP = 0.5  # at which a detection counts as right
MOST = 100  # detections of one class in one scene that count for mAP
# Where precision is read. In single precision, as torchmetrics has it: one of ten objects is not yet a recall of 0.1.
RECALLS = torch.linspace(0.0, 1.0, 101, device="cpu").double()


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

    Boxes that overlap are suppressed, unless the model has a method `decide` of its own, as the reader has.

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
    with remembered(model):
        for part in images.split(batch_size):
            output = model(part)
            if hasattr(model, "decide"):
                found += model.decide(output, len(found))
                continue
            scores = model.log_scores(output).exp()
            boxes = model.boxes(output)
            check_finite(scores, boxes, len(found))  # before the cut at the picture's edge, which would hide infinity
            found += detect(scores, boxes.clamp(0, 1), min_score, first=len(found))
    return found


def on_cpu(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Detections on the CPU: moved from a GPU all at once, which waits once and not three times a scene.

    >>> on_cpu([{"boxes": torch.zeros(2, 4), "scores": torch.ones(2)}])[0]["boxes"].shape
    torch.Size([2, 4])
    """
    if not found:
        return []
    counts = [len(scene["boxes"]) for scene in found]
    columns = {name: torch.cat([scene[name] for scene in found]).cpu().split(counts) for name in found[0]}
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


def score(found: list[dict[str, Tensor]], targets: Targets) -> Score:
    """Rate detections. mAP averages over the classes that occur; a scene without detections counts like any other.

    Raises ValueError, and names the scene, for detections whose boxes or scores are not finite, and for targets that
    `pad_targets` would not have made.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> boxes, labels = torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([3])
    >>> score([{"boxes": boxes, "scores": torch.tensor([0.9]), "labels": labels}], pad_targets([boxes], [labels]))
    Score(map50=100.0, recall=100.0, false_positives=0.0, detections=1.0)
    """
    made, truth = _compared(found, targets)
    right = _right(made, truth)
    scenes = max(len(found), 1)
    objects = int((truth.labels != NOTHING).sum())
    hit = int(right.sum())
    return Score(
        map50=100 * _mean_average_precision(made, right, truth.labels),
        recall=100 * hit / max(objects, 1),
        false_positives=(len(right) - hit) / scenes,
        detections=len(right) / scenes,
    )


def right(found: list[dict[str, Tensor]], targets: Targets) -> list[Tensor]:
    """Which detections of each scene are right: by falling score, each takes, of the objects of its class that are
    still free, the one that it overlaps most, if by half or more."""
    made, truth = _compared(found, targets)
    counts = torch.bincount(made.scenes, minlength=len(found)).tolist()
    return list(_right(made, truth).split(counts)) if counts else []


def hits(found: list[dict[str, Tensor]], targets: Targets) -> list[int]:
    """How many detections of each scene are right."""
    return [int(scene.sum()) for scene in right(found, targets)]


class _Made(NamedTuple):
    """The K detections of all scenes, one after the other: (K, 4), (K,), (K,), and the scene of each, (K,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    scenes: Tensor


def _compared(found: list[dict[str, Tensor]], targets: Targets) -> tuple[_Made, Targets]:
    """Detections and targets on the CPU, checked; boxes and scores in single precision or better, labels in int64."""
    truth = Targets(*(part.cpu() for part in check_targets(targets, classes=None)))
    if len(found) != len(truth.labels):
        raise ValueError(f"detections of {len(found)} scenes, but targets of {len(truth.labels)}")
    for index, scene in enumerate(found):
        _check_shapes(index, *(scene[name] for name in ("boxes", "scores", "labels")))
    device = found[0]["boxes"].device if found else torch.device("cpu")
    none = {
        "boxes": torch.zeros(0, 4, device=device),
        "scores": torch.zeros(0, device=device),
        "labels": torch.zeros(0, dtype=torch.long, device=device),
    }
    columns = [torch.cat([empty, *(scene[name] for scene in found)]).cpu() for name, empty in none.items()]
    counts = torch.tensor([len(scene["labels"]) for scene in found], dtype=torch.long, device="cpu")
    made = _Made(*columns, torch.arange(len(found), device="cpu").repeat_interleave(counts))
    _check_values(made)
    return made, truth


def _check_shapes(index: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    if boxes.shape != (len(labels), 4) or scores.shape != labels.shape:
        raise ValueError(
            f"scene {index}: boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)} and labels {tuple(labels.shape)} "
            "of detections; (n, 4), (n,) and (n,) are expected"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"scene {index}: labels of detections are whole numbers from 0, not {labels.tolist()}")


def _check_values(made: _Made) -> None:
    broken = ~(made.boxes.isfinite().all(1) & made.scores.isfinite())
    if broken.any():
        index = int(made.scenes[broken][0])
        raise ValueError(f"scene {index}: a detection has a box or a score that is not finite")
    wrong = made.labels < 0
    if wrong.any():
        index = int(made.scenes[wrong][0])
        labels = made.labels[made.scenes == index].tolist()
        raise ValueError(f"scene {index}: labels of detections are whole numbers from 0, not {labels}")


def _right(made: _Made, truth: Targets) -> Tensor:
    """(K,): which detections are right. The best of every scene choose first, then the second of every scene, …"""
    right = torch.zeros_like(made.scores, dtype=torch.bool)
    free = truth.labels != NOTHING  # (N, M)
    if not free.numel():
        return right
    rank = _ranks(made.scores, made.scenes)
    turns = torch.bincount(rank).tolist()
    for chosen in rank.argsort(stable=True).split(turns):
        scenes = made.scenes[chosen]  # (n,), each but once
        able = free[scenes] & (truth.labels[scenes] == made.labels[chosen, None])
        overlaps = _overlaps(made.boxes[chosen, None], truth.boxes[scenes]).masked_fill(~able, -1.0)  # (n, M)
        best, back = overlaps.flip(1).max(1)  # of equals COCO takes the last
        taken = best >= OVERLAP
        right[chosen] = taken
        free[scenes[taken], free.shape[1] - 1 - back[taken]] = False
    return right


def _overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, to the last bit as pycocotools computes it: sizes first, and from there in float64."""
    size, size0 = ((b[..., 2:] - b[..., :2]).double() for b in (boxes, others))
    low, low0 = boxes[..., :2].double(), others[..., :2].double()
    shared = torch.minimum(low + size, low0 + size0) - torch.maximum(low, low0)
    both = shared.clamp(min=0).prod(-1)
    return both / (size.prod(-1) + size0.prod(-1) - both)


def _ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """(K,): the place of each in its group by falling score, from 0; equals in the order in which they stand.

    >>> _ranks(torch.tensor([0.1, 0.3, 0.2, 0.3]), torch.tensor([5, 0, 5, 0]))
    tensor([1, 0, 0, 1])
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    _, counts = groups[order].unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - first
    return ranks


def _mean_average_precision(made: _Made, right: Tensor, truth: Tensor) -> float:
    """The mean over the classes among `truth`, labels (N, M); 0 where there is no object."""
    classes, objects = truth[truth != NOTHING].unique(return_counts=True)
    values = []
    for label, count in zip(classes.tolist(), objects.tolist(), strict=True):
        own = (made.labels == label).nonzero().squeeze(1)
        own = own[_ranks(made.scores[own], made.scenes[own]) < MOST]
        values.append(_average_precision(made.scores[own], right[own], count))
    return sum(values) / max(len(values), 1)


def _average_precision(scores: Tensor, right: Tensor, objects: int) -> float:
    """The mean, over the recalls 0, 0.01, … 1, of the best precision at that recall or beyond; 0 beyond the last."""
    found = right[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    precision = found / torch.arange(1, len(found) + 1, device=found.device)
    best = precision.flip(0).cummax(0).values.flip(0)
    place = torch.searchsorted(found / objects, RECALLS)
    return float(torch.cat([best, best.new_zeros(1)])[place].mean())

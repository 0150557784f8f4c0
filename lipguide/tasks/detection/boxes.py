"""Boxes of single-shot detectors: priors, and the targets that they are matched with.

Boxes are xyxy in [0, 1] of the picture, priors are centres and sizes, and a batch of scenes is one padded tensor, so
that matching runs over the whole batch at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from lipguide.arguments import whole

__all__ = [
    "Checked",
    "Matches",
    "Targets",
    "check_finite",
    "check_number",
    "check_targets",
    "decode",
    "encode",
    "match",
    "offsets",
    "pad_targets",
    "prior_boxes",
    "single",
    "unit_range",
]

CENTRE, SIZE = 10.0, 5.0  # how finely offsets of centres and of logarithms of sizes are told apart
NOTHING = -1  # the label of padding


class Targets(NamedTuple):
    """The objects of N scenes, as many columns as the fullest scene has. boxes: (N, M, 4) xyxy in [0, 1];
    labels: (N, M) int64, -1 where a scene has no further object."""

    boxes: Tensor
    labels: Tensor


class Checked(Targets):
    """Targets that `check_targets` has let pass. Nobody need look at them again, which on a GPU means: wait for it.

    Only who has checked, or takes a part of what is checked, makes one.

    Args:
        boxes, labels: as of all targets.
        classes: above all labels. Who makes a copy of the two without it, as torch does, has checked nothing.
    """

    classes: float

    def __new__(cls, boxes: Tensor, labels: Tensor, classes: float = math.inf) -> Checked:
        made = super().__new__(cls, boxes, labels)
        made.classes = classes
        return made

    def part(self, where: Tensor | slice) -> Checked:
        """Those of some scenes."""
        return Checked(self.boxes[where], self.labels[where], self.classes)


class Matches(NamedTuple):
    """What each prior is to predict. classes: (N, P), the number of classes standing for background; boxes: (N, P, 4),
    of the object that it is matched with, and meaningless for background."""

    classes: Tensor
    boxes: Tensor


def unit_range(images: Tensor) -> Tensor:
    """Pictures of whole numbers, 0 to 255, which need a quarter of the memory, as numbers in [0, 1]; others unchanged.

    >>> unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise ValueError(f"pictures are bytes (torch.uint8) or numbers in [0, 1], not {images.dtype}")
    return images.float() / 255


def single(values: Tensor) -> Tensor:
    """Numbers in single precision, or better where they are.

    >>> single(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless a value is a finite number from `low` to `high`: with NaN every comparison is false.

    >>> check_number("overlap", float("nan"), 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: overlap is nan: give a finite number from 0 to 1
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        limits = "" if low == -math.inf else f", {low:g} or more"
        if high < math.inf:
            limits = f" from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value!r}: give a finite number{limits}")


def check_finite(scores: Tensor, boxes: Tensor, first: int = 0) -> None:
    """Raise ValueError, and name the scene, if a detector's scores (N, P, C) or boxes (N, P, 4) are not finite.

    Nothing found is an honest answer; NaN, which exceeds no threshold, would pass for it.

    Args:
        first: the number of the first scene, for the message.

    >>> check_finite(torch.rand(2, 5, 3), torch.rand(2, 5, 4))
    """
    good = _finite(scores) & _finite(boxes)
    if not good.all():
        bad = ~good
        raise ValueError(
            f"scene {first + int(bad.nonzero()[0])}: the detector's scores or boxes are not finite, in "
            f"{int(bad.sum())} of {len(bad)} scenes: its weights have diverged, or the pictures are not"
        )


def _finite(values: Tensor) -> Tensor:
    """(N,): whether all of a scene's values are; by their extremes, which costs a fraction of asking each."""
    rows = values.flatten(1)
    if not rows.shape[1]:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor], classes: int = 10) -> Targets:
    """Lists of boxes and labels, one a scene, as padded tensors. A scene may be empty, labels of any type.

    Raises ValueError, and names the scene, for a box without area or outside [0, 1], and for a label that is out of
    range or no whole number.

    >>> one, none = torch.tensor([[0.1, 0.2, 0.5, 0.6]]), torch.zeros(0, 4)
    >>> pad_targets([one, none], [torch.tensor([7]), torch.tensor([])]).labels
    tensor([[ 7],
            [-1]])
    """
    _check_classes(classes)
    if len(boxes) != len(labels):
        raise ValueError(f"boxes of {len(boxes)} scenes, but labels of {len(labels)}")
    for index, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        _check_scene(index, b, c, classes)
    most = max((len(c) for c in labels), default=0)
    device = boxes[0].device if len(boxes) else None
    padded = torch.zeros(len(boxes), most, 4, device=device)
    names = torch.full((len(boxes), most), NOTHING, device=device)
    for index, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        padded[index, : len(c)] = b
        names[index, : len(c)] = c.long()
    return Targets(padded, names)


def _check_classes(classes: int) -> None:
    whole("classes", classes, "labels count from 0 to classes - 1")


def _check_scene(index: int, boxes: Tensor, labels: Tensor, classes: int | None) -> None:
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"scene {index}: boxes {tuple(boxes.shape)} for {len(labels)} labels; (n, 4) is expected")
    if not ((boxes >= 0) & (boxes <= 1)).all():
        raise ValueError(f"scene {index}: a box lies outside the picture, [0, 1]: {boxes.tolist()}")
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"scene {index}: a box has no area: {boxes.tolist()}")
    if labels.is_floating_point() and not (labels == labels.round()).all():
        raise ValueError(f"scene {index}: labels must be whole numbers, not {labels.tolist()}")
    limit = math.inf if classes is None else classes
    if len(labels) and not (labels.min() >= 0 and labels.max() < limit):
        raise ValueError(f"scene {index}: labels must be 0 to {limit - 1}, not {labels.tolist()}")


def check_targets(targets: Targets, classes: int | None = 10) -> Checked:
    """The targets, with labels in int64; ValueError, which names the scene, for what `pad_targets` would not have made.

    A label out of range would pass for background, and a box without area makes the loss infinite. In a type without
    sign no label is padding: 255 would be -1 there.

    Args:
        classes: how many there are; None for any number.

    >>> check_targets(Targets(torch.tensor([[[0.1, 0.2, 0.5, 0.6]]]), torch.tensor([[7]], dtype=torch.uint8))).labels
    tensor([[7]])
    """
    if classes is not None:
        _check_classes(classes)
    if isinstance(targets, Checked) and targets.classes <= (sys.maxsize if classes is None else classes):
        return targets
    boxes, labels = targets
    whole_numbers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if labels.ndim != 2 or not whole_numbers or boxes.shape != (*labels.shape, 4):
        raise ValueError(
            f"targets must be boxes (N, M, 4) and labels (N, M) of whole numbers, not {tuple(boxes.shape)} and "
            f"{tuple(labels.shape)} of {labels.dtype}: pad_targets makes them of lists"
        )
    labels = labels.long()
    there = labels != NOTHING
    inside = ((boxes >= 0) & (boxes <= 1)).all(2)
    area = (boxes[..., 2:] > boxes[..., :2]).all(2)
    known = labels >= 0
    if classes is not None:
        known &= labels < classes
    wrong = (there & ~(inside & area & known)).any(1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        real = there[index]
        _check_scene(index, boxes[index, real], labels[index, real], classes)
    return Checked(boxes, labels, int(labels.amax()) + 1 if labels.numel() else 0)


def prior_boxes(sides: Sequence[int], scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Priors (P, 4) as centre x, centre y, width, height: on a map of each side, in every cell, one for each ratio of
    width to height, of the map's scale. Order: map, row, column, ratio; widths and heights end at 1.

    >>> prior_boxes([2], [0.4], [0.25])[:2]
    tensor([[0.2500, 0.2500, 0.2000, 0.8000],
            [0.7500, 0.2500, 0.2000, 0.8000]])
    """
    for size in (*scales, *ratios):
        if not 0 < size < math.inf:
            raise ValueError(f"a prior's scale and ratio are finite and above 0, not {size}")
    maps = []
    for side, scale in zip(sides, scales, strict=True):
        whole("side", side, "a map has one cell or more")
        centres = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        shapes = torch.tensor([[scale * math.sqrt(r), scale / math.sqrt(r)] for r in ratios])
        cells = torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, len(ratios), -1)
        maps.append(torch.cat([cells, shapes.expand(len(cells), -1, -1)], -1).flatten(0, 1))
    return torch.cat(maps).clamp(max=1.0)


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """The offsets (…, 4) that lead from priors to boxes: 10 (c − c₀) / s₀ for centres, 5 log(s / s₀) for sizes.

    Raises ValueError for a box or a prior without area: no finite offset leads to it.

    >>> encode(torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.3, 0.3, 0.4, 0.4]])).abs().max() < 1e-5
    tensor(True)
    """
    size, size0 = boxes[..., 2:] - boxes[..., :2], priors[..., 2:]
    if not ((size > 0).all() and (size0 > 0).all()):
        raise ValueError("a box or a prior has no area, or is NaN: no finite offset leads to it")
    return offsets(boxes, priors)


def offsets(boxes: Tensor, priors: Tensor) -> Tensor:
    """As `encode`, of boxes and priors that are known to have an area: nothing is read back from the device.

    >>> offsets(torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.3, 0.3, 0.4, 0.4]])).shape
    torch.Size([1, 4])
    """
    centre, size = box_convert(boxes, "xyxy", "cxcywh").split(2, -1)
    centre0, size0 = priors.split(2, -1)
    return torch.cat([CENTRE * (centre - centre0) / size0, SIZE * (size / size0).log()], -1)


def decode(offsets: Tensor, priors: Tensor) -> Tensor:
    """The boxes (…, 4) that offsets make of priors: the inverse of `encode`.

    >>> priors, boxes = torch.tensor([[0.3, 0.3, 0.4, 0.4]]), torch.tensor([[0.1, 0.2, 0.4, 0.9]])
    >>> torch.allclose(decode(encode(boxes, priors), priors), boxes)
    True
    """
    if offsets.shape[-2] != priors.shape[-2]:
        raise ValueError(
            f"{offsets.shape[-2]} offsets for {priors.shape[-2]} priors: a detector takes pictures of one size"
        )
    centre0, size0 = priors.split(2, -1)
    to_centre, to_size = offsets.split(2, -1)
    centre = centre0 + size0 * to_centre / CENTRE
    size = size0 * (to_size / SIZE).exp()
    return box_convert(torch.cat([centre, size], -1), "cxcywh", "xyxy")


def match(targets: Targets, priors: Tensor, classes: int = 10, threshold: float = 0.5) -> Matches:
    """Give each prior the object that it overlaps most, if their overlap is `threshold` or more, else background.

    Before that, each object gets a prior of its own: of all pairs the one with the largest overlap first, then of
    those that remain. So no object is left without a prior. Bad targets are refused as by `check_targets`.

    >>> targets = pad_targets([torch.tensor([[0.0, 0.0, 0.4, 0.4]])], [torch.tensor([3])])
    >>> match(targets, torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.8, 0.8, 0.3, 0.3]])).classes
    tensor([[ 3, 10]])
    """
    check_number("threshold", threshold, 0, 1)
    boxes, labels = check_targets(targets, classes)
    scenes, objects = labels.shape
    nothing = torch.full((scenes, len(priors)), classes, device=labels.device)
    if objects == 0:
        return Matches(nothing, boxes.new_zeros(scenes, len(priors), 4))
    overlaps = box_iou(boxes.flatten(0, 1), box_convert(priors, "cxcywh", "xyxy")).unflatten(0, (scenes, objects))
    overlaps = overlaps.masked_fill((labels == NOTHING)[..., None], -1.0)
    best, owner = overlaps.max(1)
    own = _one_prior_each(overlaps)
    best = torch.where(own >= 0, 1.0, best)
    owner = torch.where(own >= 0, own, owner)
    found = torch.where(best >= threshold, labels.gather(1, owner), nothing)
    return Matches(found, boxes.gather(1, owner[..., None].expand(-1, -1, 4)))


def _one_prior_each(overlaps: Tensor) -> Tensor:
    """(N, P): the object that a prior belongs to by the pairing of objects and priors, or -1."""
    scenes, objects, priors = overlaps.shape
    rest = overlaps.clone()
    rows = torch.arange(scenes, device=overlaps.device)
    owner = torch.full((scenes, priors), NOTHING, device=overlaps.device)
    gone = torch.full((), -1.0, dtype=rest.dtype, device=rest.device)  # a number of the host would be waited for
    for _ in range(objects):
        value, pair = rest.flatten(1).max(1)
        thing = pair // priors
        prior = pair % priors
        owner[rows, prior] = torch.where(value >= 0, thing, owner[rows, prior])
        rest[rows, thing] = gone  # where no object is left, all of a scene is -1 already
        rest[rows, :, prior] = gone
    return owner

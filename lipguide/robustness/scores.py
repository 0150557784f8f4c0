"""How good an answer is, pixel by pixel: accuracy and mIoU, of pictures and of a data set.

A certificate is a bound of one of these, and counts the same pixels (`counted`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipguide.checks import IGNORE, class_indices

__all__ = ["check_masks", "confusion", "counted", "labelled", "miou", "pixel_accuracy", "pooled_miou"]


def check_masks(model: nn.Module, masks: Tensor, ignore_index: int = IGNORE) -> None:
    """Raise ValueError unless every pixel's label is a class that the network's head has, or `ignore_index`.

    >>> check_masks(nn.Sequential(nn.Conv2d(3, 10, 1)), torch.full((1, 4, 4), 10))
    Traceback (most recent call last):
    ...
    ValueError: the head has 10 classes, labelled 0 to 9, but the masks hold 10 too: build the network with \
classes=11, or mark these pixels with ignore_index = -100
    """
    if masks.dim() != 3 or masks.numel() == 0:
        raise ValueError(f"masks are (N, H, W) with a pixel or more, not {tuple(masks.shape)}: one class a pixel")
    head = model[-1] if isinstance(model, nn.Sequential) else None
    if not isinstance(head, nn.Conv2d):
        raise ValueError("the network must be an nn.Sequential that ends in its head, an nn.Conv2d with a row a class")
    index, counts = class_indices(masks, ignore_index, "masks")
    classes = head.out_channels
    found = index[counts].unique()
    unknown = found[(found < 0) | (found >= classes)].tolist()
    if unknown:
        none = min(unknown) < 0 or 255 in unknown  # numbers that commonly stand for "no label"
        build = "" if none else f"build the network with classes={max(unknown) + 1}, or "
        raise ValueError(
            f"the head has {classes} classes, labelled 0 to {classes - 1}, but the masks hold "
            f"{', '.join(map(str, unknown[:5]))} too: {build}mark these pixels with ignore_index = {ignore_index}"
        )


def labelled(masks: Tensor, ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Labels in int64, 0 where a pixel is ignored, and which pixels count; ValueError for a picture without any.

    >>> labelled(torch.tensor([[[3, -100]]], dtype=torch.int8))
    (tensor([[[3, 0]]]), tensor([[[ True, False]]]))
    """
    if masks.ndim < 2:
        raise ValueError(f"labels {tuple(masks.shape)} must be one map of classes a picture, (N, H, W)")
    if len(masks) == 0:
        raise ValueError("a score of no pictures is undefined: there is none in labels")
    index, counts = class_indices(masks, ignore_index)
    empty = ~counts.flatten(1).any(1)
    if empty.any():
        picture = int(empty.nonzero()[0])
        raise ValueError(f"picture {picture} has no labelled pixel (all are ignored): leave it out, it has no score")
    return index, counts


def counted(
    predicted: Tensor, masks: Tensor, ignore_index: int = IGNORE, classes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and masks in int64, and which pixels a score counts; ValueError for what it cannot compare.

    Args:
        classes: how many labels there are; None for any number.

    >>> counted(torch.tensor([[[3, 1]]]), torch.tensor([[[0, -100]]]), classes=2)
    Traceback (most recent call last):
    ...
    ValueError: the predictions hold label 3, and a score of 2 classes knows 0 to 1
    """
    if predicted.shape != masks.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and masks {tuple(masks.shape)} must agree in shape")
    guess, _ = class_indices(predicted, None, "predictions")
    truth, counts = class_indices(masks, ignore_index, "masks")
    if classes is not None:
        for what, labels in (("predictions", guess[counts]), ("masks", truth[counts])):
            wrong = labels[(labels < 0) | (labels >= classes)]
            if len(wrong):
                known = f"a score of {classes} classes knows 0 to {classes - 1}"
                raise ValueError(f"the {what} hold label {int(wrong[0])}, and {known}")
    return guess, truth, counts


def confusion(predicted: Tensor, masks: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Counts (C, C) over all pixels that are not ignored: how often class i (row) is predicted as j (column).

    >>> confusion(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), classes=2).tolist()
    [[1, 1], [0, 0]]
    """
    guess, truth, counts = counted(predicted, masks, ignore_index, classes)
    pairs = truth[counts] * classes + guess[counts]
    if pairs.numel() == 0:
        raise ValueError("every pixel is ignored: nothing is left to score")
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def pixel_accuracy(predicted: Tensor, masks: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Share of each picture's pixels that are right: (N,).

    >>> pixel_accuracy(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, -100]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    guess, truth, _ = counted(predicted, masks, ignore_index)
    _, counts = labelled(masks, ignore_index)
    right = (guess == truth) & counts
    return right.flatten(1).sum(1) / counts.flatten(1).sum(1).double()


def miou(predicted: Tensor, masks: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Each picture's mean IoU over the classes that its *mask* holds: (N,), as `certified_miou` bounds it.

    For the pooled mIoU of a data set see `pooled_miou`.

    >>> miou(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]]), classes=2)
    tensor([0.5000], dtype=torch.float64)
    """
    counts = [confusion(p[None], m[None], classes, ignore_index) for p, m in zip(predicted, masks, strict=True)]
    return torch.stack([_miou(c) for c in counts])


def pooled_miou(predicted: Tensor, masks: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    """mIoU of the counts of all pictures together, over the classes that the masks hold: a scalar.

    >>> pooled_miou(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]]), classes=2)
    tensor(0.5000, dtype=torch.float64)
    """
    return _miou(confusion(predicted, masks, classes, ignore_index))


def _miou(counts: Tensor) -> Tensor:
    right = counts.diag()
    iou = right / (counts.sum(0) + counts.sum(1) - right).clamp(min=1).double()
    return iou[counts.sum(1) > 0].mean()

"""A small FCOS: trunk and class head 1-Lipschitz, the heads for boxes and centerness free, as the guide advises.

Every cell of one map of 18×18 says which class its centre lies on, how far the four sides of the box are, and how near
the middle of the box it is. There are no priors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from lipguide.distributed import mean_over_ranks
from lipguide.layers.affine import orthogonal, unit_rows
from lipguide.layers.brick import Brick, Through
from lipguide.layers.sll import SLL
from lipguide.losses.base import check_range
from lipguide.tasks.detection.boxes import NOTHING, Targets, check_number, check_targets, single
from lipguide.tasks.detection.losses import check_output

__all__ = ["FCOS", "Brightless", "FCOSLoss", "FCOSOutput", "assign", "fcos", "ordinary_fcos"]

SIDE = 18  # cells of the map, for pictures of 74 pixels
TINY = 1e-7  # added to areas that are divided by
RARE = 0.01  # probability of an object at the start, as the focal loss wants it


class FCOSOutput(NamedTuple):
    """logits: (N, 324, classes), one sigmoid each; sides: (N, 324, 4), distances to left, top, right and bottom in
    pictures; centerness: (N, 324), a logit."""

    logits: Tensor
    sides: Tensor
    centerness: Tensor


class FCOS(nn.Module):
    """One map, three heads.

    Args:
        trunk: pictures to (N, channels, 18, 18).
        class_head, box_head: of `channels` to classes, and to four sides and the centerness.
        tau: temperature of the class logits, in the loss and in the scores. The larger, the more accurate; the
            smaller, the more robust.

    >>> output = fcos(width=8)(torch.rand(2, 3, 74, 74))
    >>> [tuple(part.shape) for part in output]
    [(2, 324, 10), (2, 324, 4), (2, 324)]
    """

    centres: Tensor

    def __init__(self, trunk: nn.Module, class_head: nn.Module, box_head: nn.Module, tau: float = 1.0) -> None:
        super().__init__()
        check_range(tau=tau)
        self.trunk, self.class_head, self.box_head = trunk, class_head, box_head
        self.tau = tau
        middles = (torch.arange(SIDE) + 0.5) / SIDE
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> FCOSOutput:
        x = self.trunk(x)
        logits = self.class_head(x).flatten(2).mT
        left, top, right, bottom, centerness = self.box_head(x).flatten(2).unbind(1)
        sides = torch.stack([left, top, right, bottom], -1).clamp(-8, 1).exp()
        return FCOSOutput(logits, sides, centerness)

    def log_scores(self, output: FCOSOutput) -> Tensor:
        """(N, 324, classes): log of √(class probability · centerness)."""
        return (F.logsigmoid(self.tau * output.logits) + F.logsigmoid(output.centerness)[..., None]) / 2

    def boxes(self, output: FCOSOutput) -> Tensor:
        """(N, 324, 4) xyxy, which may stick out of the picture."""
        return _boxes(self.centres, output.sides)

    def training_loss(self, reduction: str = "mean") -> FCOSLoss:
        """Tempered focal loss, GIoU and centerness, with this model's temperature."""
        return FCOSLoss(self.centres, self.tau, reduction=reduction)


def _boxes(centres: Tensor, sides: Tensor) -> Tensor:
    """The boxes (N, P, 4), xyxy, whose sides are so far from the centres (P, 2)."""
    if sides.shape[1] != len(centres):
        raise ValueError(
            f"the sides of {sides.shape[1]} cells, but there are {len(centres)}: pictures have 74×74 pixels"
        )
    return torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], -1)


def assign(targets: Targets, centres: Tensor, classes: int = 10, radius: float = 1.5) -> tuple[Tensor, Tensor]:
    """The class of each centre (N, P), `classes` for background, and the box that it lies in (N, P, 4).

    A centre belongs to a box if it lies in it and within `radius` cells of its middle along both axes; of several
    boxes it takes the smallest. The centre nearest to the middle of a box always belongs to it, unless a smaller box
    claims it. Bad targets are refused as by `check_targets`.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> targets = pad_targets([torch.tensor([[0.0, 0.0, 0.5, 1.0]])], [torch.tensor([3])])
    >>> assign(targets, torch.tensor([[0.25, 0.5], [0.75, 0.5]]))[0]
    tensor([[ 3, 10]])
    """
    check_number("radius", radius, 0, SIDE)
    boxes, labels = check_targets(targets, classes)
    if labels.shape[1] == 0:
        return labels.new_full((len(labels), len(centres)), classes), boxes.new_zeros(len(labels), len(centres), 4)
    low, high = boxes[:, None].split(2, -1)  # (N, 1, M, 2) against (P, 1, 2)
    middle = (low + high) / 2
    inside = ((centres[:, None] > low) & (centres[:, None] < high)).all(-1)
    distance = (centres[:, None] - middle).abs().amax(-1)
    near = inside & (distance < radius / SIDE)
    near |= distance == distance.amin(1, keepdim=True)
    near &= (labels != NOTHING)[:, None]
    area = (high - low).prod(-1).expand_as(near).masked_fill(~near, math.inf)
    smallest, owner = area.min(-1)
    found = torch.where(smallest.isfinite(), labels.gather(1, owner), classes)
    return found, boxes.gather(1, owner[..., None].expand(-1, -1, 4))


def _giou_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """1 − GIoU of boxes (…, 4), (…): torchvision's `generalized_box_iou_loss`, which takes a part by a mask and so
    waits for a GPU."""
    left, top, right, bottom = found.unbind(-1)
    left0, top0, right0, bottom0 = wanted.unbind(-1)
    width = torch.minimum(right, right0) - torch.maximum(left, left0)
    height = torch.minimum(bottom, bottom0) - torch.maximum(top, top0)
    both = torch.where((width > 0) & (height > 0), width * height, 0.0)
    union = (right - left) * (bottom - top) + (right0 - left0) * (bottom0 - top0) - both
    across = torch.maximum(right, right0) - torch.minimum(left, left0)
    along = torch.maximum(bottom, bottom0) - torch.minimum(top, top0)
    hull = across * along
    return 1 - (both / (union + TINY) - (hull - union) / (hull + TINY))


class FCOSLoss(nn.Module):
    r"""Focal loss at temperature τ, divided by it, GIoU and centerness, each a mean over the positives.

    The regression is left as it is: only the class loss has the dial.

    Args:
        centres: (P, 2), as the model has them.
        tau: temperature of the class logits.
        reduction: "mean", or "none" for one value a scene.
    """

    centres: Tensor

    def __init__(self, centres: Tensor, tau: float, reduction: str = "mean") -> None:
        super().__init__()
        check_range(tau=tau)
        if reduction not in ("mean", "none"):
            raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}')
        self.register_buffer("centres", centres.clone(), persistent=False)
        self.tau, self.reduction = tau, reduction

    def forward(self, output: FCOSOutput, targets: Targets) -> Tensor:
        logits, sides, centerness = (single(part) for part in output)
        check_output(logits, len(self.centres), targets)
        classes, boxes = assign(targets, self.centres, logits.shape[2])
        positive = classes != logits.shape[2]
        one_hot = F.one_hot(classes, logits.shape[2] + 1)[..., :-1].to(logits.dtype)
        focal = sigmoid_focal_loss(self.tau * logits, one_hot, reduction="none").sum((1, 2)) / self.tau
        found = _boxes(self.centres, sides)
        # Where there is no object, a box stands in that is right: it adds nothing and its gradient is finite.
        wanted = torch.where(positive[..., None], boxes, found.detach())
        giou = _giou_loss(found, wanted) * positive
        middle = F.binary_cross_entropy_with_logits(centerness, self._centerness(wanted), reduction="none") * positive
        scene = focal + (giou + middle).sum(1)
        count = positive.sum(1)
        if self.reduction == "none":
            return scene / count.clamp(min=1)
        return mean_over_ranks(scene.sum(), count.sum(), logits)

    def _centerness(self, boxes: Tensor) -> Tensor:
        before = self.centres - boxes[..., :2]
        after = boxes[..., 2:] - self.centres
        ratio = torch.minimum(before, after) / torch.maximum(before, after)
        return ratio.clamp(0, 1).prod(-1).sqrt()


def _free_box_head(width: int) -> nn.Sequential:
    head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 5, 3, padding=1))
    nn.init.normal_(head[2].weight, std=0.01)
    nn.init.constant_(head[2].bias, math.log(0.2))  # a fifth of the picture to each side
    return head


class Brightless(Brick):
    """y = x − the mean of each channel over the picture: a projection, so 1-Lipschitz.

    How bright a wall is says nothing about the number on it, and zeros, as padding brings them, become the mean colour.

    >>> Brightless()(torch.tensor([[[[0.2, 0.4]]]]))
    tensor([[[[-0.1000,  0.1000]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainBrightless()


class _PlainBrightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


def fcos(width: int = 24, classes: int = 10, tau: float = 20.0) -> FCOS:
    """1-Lipschitz up to the class logits of a cell, each of which has a filter of norm 1."""
    trunk = nn.Sequential(
        Brightless(),
        orthogonal(nn.Conv2d(3, width, 2, stride=2)),
        SLL(width, width, 3, iterations=2),
        orthogonal(nn.Conv2d(width, 2 * width, 2, stride=2)),
        *(SLL(2 * width, 2 * width, 3, iterations=2) for _ in range(4)),
    )
    head = unit_rows(nn.Conv2d(2 * width, classes, 3, padding=1))
    nn.init.constant_(head.bias, math.log(RARE / (1 - RARE)) / tau)
    return FCOS(trunk, head, _free_box_head(2 * width), tau)


def ordinary_fcos(width: int = 24, classes: int = 10) -> FCOS:
    """The twin with the same maps and kernels, batch norm and ReLU, and free heads."""

    def layer(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    trunk = nn.Sequential(
        Brightless(),
        *layer(3, width, 2, stride=2),
        *layer(width, width), *layer(width, width),  # an SLL block reads as far as two convolutions
        *layer(width, 2 * width, 2, stride=2),
        *(part for _ in range(4) for part in layer(2 * width, 2 * width)),
    )  # fmt: skip
    head = nn.Conv2d(2 * width, classes, 3, padding=1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, math.log(RARE / (1 - RARE)))
    return FCOS(trunk, head, _free_box_head(2 * width))

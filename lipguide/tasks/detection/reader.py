"""A detector that is 1-Lipschitz in every answer: one reader of one window, slid over a pyramid.

Each window of 32×32 pixels sees its digit at one size. The trunk runs over a whole level at once, so that neighbouring
windows share their convolutions; behind it a window is a patch of 4×4 cells, read by one dense layer and two heads. Of
the picture, as a function of which all norms here are taken:

* the picture minus its mean, a level, and the trunk's map of it are 1-Lipschitz (`Level`, orthogonal convolutions and
  GroupSort);
* the features of one window are 1-Lipschitz: a patch of that map, an orthogonal matrix and GroupSort;
* so is each logit, a unit row of the features, and so is the *vector* of a window's four sides over `reach`: its four
  rows are orthonormal. The difference of two logits of a window moves by ‖w_k − w_j‖ at most.

With linear residuals, or an SLL block at the end of each window, the same holds by the bounds of those layers; and the
block can be looked into (`Detector.inside`), for bounds of the logits that are closer near the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.bounds.network import lipschitz_bound
from lipguide.distributed import mean_over_ranks
from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import orthogonal, unit_rows
from lipguide.layers.brick import computes_as
from lipguide.layers.sll import SLLLinear
from lipguide.robustness.certificates.block import Block
from lipguide.tasks.detection.boxes import Targets, single
from lipguide.tasks.detection.certificates.inside import BoxHead, Inside
from lipguide.tasks.detection.certificates.overlap import overlap
from lipguide.tasks.detection.certificates.underneath import Underneath
from lipguide.tasks.detection.decision import radii, reported, rivals, together
from lipguide.tasks.detection.fcos import Brightless
from lipguide.tasks.detection.losses import check_output
from lipguide.tasks.detection.pyramid import Canvas, Level
from lipguide.tasks.detection.reader_layers import check_kind, check_layer, residual_layers, sorted_layers, unpadded
from lipguide.tasks.detection.tinier_ssd import PICTURE
from lipguide.tasks.detection.windows import (
    BOXED,
    CELL,
    HEIGHT,
    PATCH,
    RIGHT,
    RING,
    Moved,
    assign,
    expected,
    places,
)

__all__ = ["CANVASES", "OFFSET", "TAU", "Detector", "ReaderLoss", "ReaderOutput", "detector"]

# Digits of 61, 43 and 30 pixels of 74 are 28 high; the zeros are there for windows whose digit stands at the edge.
# Rivals: how far apart in x and y, in heights, and in octaves. Two windows that speak of one digit are a third of the
# height apart at most, and at most one level; but one that is so far off is seldom the surest, and its box is worse.
RIVALS = (0.21, 0.5, 0.6)
# A digit counts as seen where no other answer is ahead of it by more than 0.2. The logit of "nothing" is lowered first:
# most windows teach that answer, and it is given too readily. Both were chosen on scenes that nothing else asks.
LEAST, HANDICAP = -0.2, 0.2
# Pixels of a level that the box head moves a side by for a feature of 1. The less, the less an attack moves it.
REACH = 4.0
# Of the loss. By a look a score moves about half as far as by constants: a margin need not be as wide as a warmer loss
# makes it, and this one lets go once the right answer leads by the offset.
TAU, OFFSET = 12.0, 0.4
DENSE = 2  # places of a map between two of a window's cells, if there is a window at every fourth pixel
CANVASES = (Canvas(34, 48, 64, 7, 15), Canvas(48, 56, 72, 4, 12), Canvas(68, 80, 96, 6, 14))


class ReaderOutput(NamedTuple):
    """logits: (N, P, classes + 1), background last; sides: (N, P, 4), how far left, top, right and bottom stand from
    those of a digit in the middle of the window, in units of `reach` pixels of the level."""

    logits: Tensor
    sides: Tensor


class Detector(nn.Module):
    """The reader over the pyramid. Windows are listed level by level, row by row.

    Args:
        widths: channels at each size, layer by layer those of `lipguide.tasks.classification.networks.vgg`; the halving
            doubles them.
        features: of a window.
        reach: pixels of a level that one unit of the box head stands for.
        tau: temperature of the loss and of `log_scores`.
        offset: of the loss, by which a wrong answer is raised, so that the right one must win by it.
        canvases: the levels.
        residual: the layers of `lipguide.tasks.classification.networks.residual` instead, which are linear residuals.
        block: an SLL block at the end of a window instead of sorted pairs.
        handicap: by so much the logit of "nothing" is lowered before windows decide; the loss knows nothing of it.
        near: which windows are rivals, as `lipguide.tasks.detection.decision.rivals` takes it.

    >>> output = Detector((8, 8, 8), 16)(torch.rand(2, 3, 74, 74))
    >>> [tuple(part.shape) for part in output]
    [(2, 343, 11), (2, 343, 4)]
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        features: int = 128,
        reach: float = REACH,
        tau: float = TAU,
        classes: int = 10,
        canvases: Sequence[Canvas] = CANVASES,
        residual: bool = False,
        block: bool = False,
        offset: float = OFFSET,
        handicap: float = HANDICAP,
        near: Sequence[float] = RIVALS,
    ) -> None:
        super().__init__()
        self.reach, self.tau, self.offset = reach, tau, offset
        self.canvases, self.least, self.handicap, self.near = tuple(canvases), LEAST, handicap, tuple(near)
        self.brightless = Brightless()
        self.levels = nn.ModuleList(Level(PICTURE, canvas) for canvas in canvases)
        trunk, halve, cells = residual_layers(*widths) if residual else sorted_layers(*widths)
        self.trunk, self.halve, self.cells = nn.Sequential(*trunk), orthogonal(halve), nn.Sequential(*cells)
        self.read = orthogonal(nn.Conv2d(halve.out_channels, features, PATCH, PATCH))
        self.sort = GroupSort2()
        self.end = SLLLinear(features, features) if block else GroupSort2()
        self.class_head = unit_rows(nn.Linear(features, classes + 1))
        self.box_head = orthogonal(nn.Linear(features, 4))

    def forward(self, x: Tensor) -> ReaderOutput:
        with parametrize.cached():  # the weights are those of all levels
            return self.answer(self.windows(x))

    def windows(self, x: Tensor) -> Tensor:
        """What the last layer of every window of a picture is given, (N, P, features)."""
        return self._windows_of(self._last_maps(x))

    def _last_maps(self, x: Tensor) -> list[Tensor]:
        """What is sorted last, (N, C, rows, columns) of each level of a picture."""
        x = self.brightless(x)
        return [self._last_map(x, level, DENSE) for level in range(len(self.levels))]

    def _windows_of(self, maps: list[Tensor]) -> Tensor:
        """`windows` from these."""
        return torch.cat([self._read(each, DENSE) for each in maps], 1)

    def answer(self, below: Tensor) -> ReaderOutput:
        """What the windows say that are given this, (..., features)."""
        features = self.end(below.flatten(0, -2)).unflatten(0, below.shape[:-1])
        return ReaderOutput(self.class_head(features), self.box_head(features))

    def below(self, x: Tensor, level: int, dense: bool = True, moved: Moved = (0, 0)) -> Tensor:
        """`windows` of one level alone, of a picture without its mean.

        Args:
            dense: a window at every fourth pixel, not at every eighth.
            moved: pixels by which the picture is moved down and right on its canvas of zeros.
        """
        # The same layers at every place: between two windows a stride of 8 pixels, or of 4.
        apart = DENSE if dense else 1
        return self._read(self._last_map(x, level, apart, moved), apart)

    def _read(self, x: Tensor, apart: int) -> Tensor:
        return F.conv2d(self._ends[-1](x), self.read.weight, self.read.bias, dilation=apart).flatten(2).mT

    @property
    def _ends(self) -> list[nn.Module]:
        """The layers between the halving and the reading of a window; the last one sorts pairs."""
        return [self.sort, *self.cells]

    def _last_map(self, x: Tensor, level: int, apart: int, moved: Moved = (0, 0)) -> Tensor:
        """What the last layer of these is given."""
        x = self.trunk(_rolled(self.levels[level](x), moved))
        x = F.conv2d(x, self.halve.weight, self.halve.bias, stride=2 // apart)
        for layer in self._ends[:-1]:
            square = isinstance(layer, nn.Conv2d)
            x = F.conv2d(x, layer.weight, layer.bias, padding=apart, dilation=apart) if square else layer(x)
        return x

    def places(self) -> tuple[Tensor, Tensor]:
        """Centres (P, 2) of the windows, x and y in pictures, and (P,) pixels of the level that a picture has."""
        device = self.class_head.weight.device
        parts = [places(canvas, CELL // 2, device=device) for canvas in self.canvases]
        centres, sides = (torch.cat(part) for part in zip(*parts, strict=True))
        return centres, sides

    def log_scores(self, output: ReaderOutput) -> Tensor:
        """(N, P, classes): logarithms of the tempered probabilities, without background."""
        return (self.tau * output.logits).log_softmax(2)[..., :-1]

    def boxes(self, output: ReaderOutput) -> Tensor:
        """(N, P, 4) xyxy, which may stick out of the picture."""
        centres, sides = self.places()
        return centres.repeat(1, 2) + (self.reach * output.sides + expected(output.sides)) / sides[:, None]

    def scores(self, output: ReaderOutput) -> Tensor:
        """(N, P, classes): signed distances to where a class stops being the answer, each 1-Lipschitz in the features;
        see `lipguide.tasks.detection.decision.radii`."""
        return radii(self._lowered(output.logits), self.class_head.weight.detach())

    def _lowered(self, logits: Tensor) -> Tensor:
        """Logits (..., classes + 1) as windows decide by them."""
        return torch.cat([logits[..., :-1], logits[..., -1:] - self.handicap], -1)

    def decide(self, output: ReaderOutput, first: int = 0) -> list[dict[str, Tensor]]:
        """The detections of every scene: who is heard above `least`. This is the decision that the certificates are of.

        Args:
            output: of the detector.
            first: the number of the first scene, for errors.
        """
        return reported(self.scores(output), self.boxes(output), self.rivals(), self.least, first)

    def rivals(self) -> Tensor:
        """(P, P): which windows could look at the same digit."""
        centres, sides = self.places()
        return rivals(centres, HEIGHT / sides, *self.near)

    def constants(self) -> tuple[float, Tensor, Tensor]:
        """How Lipschitz in the picture each score is, (P,) the box of each window as one vector, and (C,) a score and
        the box as one vector, each over its own constant."""
        features = math.prod(self._norms())
        sides = self.box_head.weight.detach().double()
        of_head = float(torch.linalg.matrix_norm(sides, 2))
        reach = features * of_head * self.reach / self.places()[1]
        return features, reach, together(self.class_head.weight.detach().double(), sides / of_head)

    def _norms(self) -> list[float]:
        """Of which the product is how Lipschitz in the picture the features of a window are: of the window, of each
        layer below it, the last one first, and of the levels.

        A layer is asked for the patch alone of its outputs on which the window depends, which grows from the window's
        cells downwards. To a patch a layer does less than to a picture, where a wave may be long. What surrounds the
        patch may be anything, and is, but for what lies off the canvas.
        """
        self._check_parts()
        window = nn.Sequential(self.read, nn.Flatten(), self.end).train(self.training)
        norms, side = [lipschitz_bound(window, (self.read.in_channels, PATCH, PATCH)).value], PATCH
        for layer in reversed([*self.trunk, self.halve, *self.cells]):
            if not isinstance(layer, nn.Conv2d):
                continue  # sorted pairs are 1-Lipschitz and keep places apart
            bare = unpadded(layer)
            side = (side - 1) * bare.stride[0] + bare.kernel_size[0]
            norms.append(lipschitz_bound(bare, (bare.in_channels, side, side)).value)
        return [*norms, max(float(level.lipschitz(1.0, None)) for level in self.levels)]

    def _check_parts(self) -> None:
        """Raise ValueError for a part that is not of the kind that the constants speak of: another one may do anything,
        and the forward takes some convolutions by their weights alone."""
        kinds = {"brightless": Brightless, "levels": nn.ModuleList, "trunk": nn.Sequential, "cells": nn.Sequential}
        kinds |= {"sort": GroupSort2, "class_head": nn.Linear, "box_head": nn.Linear}
        for name, kind in kinds.items():
            check_kind(name, getattr(self, name), kind)
        for number, level in enumerate(self.levels):
            check_kind(f"levels.{number}", level, Level)
        for number, layer in enumerate(self.trunk):
            check_layer(f"trunk.{number}", layer)
        for number, layer in enumerate(self.cells):
            check_layer(f"cells.{number}", layer, stride=(1, 1))
        if self.cells:
            check_kind(f"cells.{len(self.cells) - 1}", self.cells[-1], GroupSort2)
            check_kind(f"cells.{len(self.cells) - 2}", self.cells[-2], nn.Conv2d)
        for name, settings in (("halve", {"stride": (2, 2)}), ("read", {"kernel_size": (PATCH, PATCH)})):
            check_kind(name, getattr(self, name), nn.Conv2d)
            check_layer(name, getattr(self, name), **settings)

    def inside(
        self, images: Tensor, batch_size: int, below: float, deep: bool = False
    ) -> tuple[list[ReaderOutput], Inside]:
        """The answers to some pictures, batch by batch, and what a look into the last block of every window rests on;
        ValueError if there is no such block.

        Args:
            below: how Lipschitz in the picture is what the block is given.
            deep: with the pairs below the block, if there are some with linear residuals below them.
        """
        if not computes_as(self.end, SLLLinear):
            raise ValueError(
                f"the windows end in {type(self.end).__name__}, into which no look is known: build the detector with "
                "block=True, or certify it by its constants"
            )
        with parametrize.cached():
            maps, given = [], []
            for part in images.split(batch_size):
                last = self._last_maps(part)
                given.append(self._windows_of(last))
                maps += [last] if deep else []  # they are as large as the windows
            outputs = [self.answer(part) for part in given]
        parts = (self.end.weight, self.end.bias, self.class_head.weight, self.class_head.bias)
        filters, bias, rows, shift = (each.detach().double().cpu() for each in parts)
        shift = self._lowered(shift)  # of the head, for it is added to logits
        block = Block(filters, bias)
        underneath = self._underneath(maps) if deep else None
        scale = (self.reach / self.places()[1]).double().cpu()
        boxes = BoxHead(self.box_head.weight.detach().double().cpu(), scale)
        return outputs, Inside(torch.cat(given).detach().cpu(), block, rows, shift, below, underneath, boxes)

    def _underneath(self, maps: list[list[Tensor]]) -> Underneath | None:
        """What the last block's look goes on to, from `_last_maps` of each batch; None where the pairs sorted last are
        those of the halving, whose layer shrinks nothing."""
        if not self.cells:
            return None
        levels = [torch.cat(level).detach() for level in zip(*maps, strict=True)]
        below = math.prod(self._norms()[2:])  # without the window and the layer that makes the pairs
        return Underneath.of(levels, self._ends[-2].weight, self.read.weight, self.read.bias, DENSE, below)

    def training_loss(self, reduction: str = "mean") -> ReaderLoss:
        """The loss of all windows at temperature tau."""
        return ReaderLoss(self, reduction)


def _rolled(x: Tensor, moved: Moved) -> Tensor:
    """(N, C, H, W), moved down and right; what leaves at one edge comes in at the other. It waits for no number."""
    for axis, by in zip((2, 3), moved, strict=True):
        size = x.shape[axis]
        x = x.index_select(axis, (torch.arange(size, device=x.device) - by) % size)
    return x


class ReaderLoss(nn.Module):
    r"""Cross-entropy at temperature τ of the windows on a digit and of the hardest others, and smooth L1 of sides.

    A window within the ring around a digit may say the digit, if its box is right, or nothing, so that what is nearly
    there is no mistake. It learns the digit's box all the same, and so do windows farther off: whoever outscores the
    right window should be right as well.

    Args:
        model: whose windows they are.
        negatives: hardest windows elsewhere for each one that speaks, among all that are given.
        reduction: "mean" over the windows that speak, or "none" for one value a scene.
        boxed: how far off a window still learns the digit's box.
    """

    def __init__(self, model: Detector, reduction: str = "mean", negatives: int = 3, boxed: float = BOXED) -> None:
        super().__init__()
        self.boxed = boxed
        self.tau, self.reach, self.negatives, self.reduction = model.tau, model.reach, negatives, reduction
        self.offset = model.offset
        self.levels = tuple(canvas.side for canvas in model.canvases)
        centres, sides = model.places()
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("sides", sides, persistent=False)

    def forward(self, output: ReaderOutput, targets: Targets) -> Tensor:
        logits, found = (single(part) for part in output)
        check_output(logits, len(self.sides), targets)
        wanted = assign(targets, self.centres, self.sides, self.reach)
        values, speaks = self.of_windows(logits.flatten(0, 1), found.flatten(0, 1), *(p.flatten(0, 1) for p in wanted))
        scene, speaks = values.unflatten(0, logits.shape[:2]).sum(1), speaks.unflatten(0, logits.shape[:2]).sum(1)
        if self.reduction == "none":
            return scene / speaks.clamp(min=1)
        return mean_over_ranks(scene.sum(), speaks.sum(), logits)

    def of_windows(
        self, logits: Tensor, found: Tensor, labels: Tensor, distance: Tensor, sides: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of each of K windows, (K,), and which of them speak."""
        background = logits.shape[1] - 1
        label = labels.clamp(min=0)[:, None]
        right = overlap(self._corners(found.detach()), self._corners(sides)) > RIGHT
        speaks, ring = distance <= 1, (distance > 1) & (distance <= RING) & right
        wrong = torch.ones_like(logits).scatter(1, label, (~(speaks | ring))[:, None].to(logits))
        wrong[:, background] = speaks.to(logits)
        log_p = (self.tau * (logits + self.offset * wrong)).log_softmax(1)
        of_label, nothing = log_p.gather(1, label).squeeze(1), log_p[:, background]
        values = torch.where(speaks, -of_label, torch.where(ring, -torch.logaddexp(of_label, nothing), -nothing))
        hard = self._hard(values.detach().masked_fill(speaks | ring, -1.0), speaks)
        of_box = F.smooth_l1_loss(found, sides.clamp(-4, 4), reduction="none", beta=0.3).sum(1)
        return values * (speaks | ring | hard) + of_box * (distance <= self.boxed), speaks

    def _corners(self, sides: Tensor) -> Tensor:
        return self.reach * sides + expected(sides)

    def _hard(self, values: Tensor, speaks: Tensor) -> Tensor:
        """The hardest windows elsewhere. How many they are is not asked of the device."""
        count = (self.negatives * speaks.sum().clamp(min=8)).clamp(max=len(values))
        falling = values.sort(descending=True).values
        least = falling.index_select(0, count[None] - 1)
        return values >= least.clamp(min=0)


def detector(
    width: int = 24,
    tau: float = TAU,
    residual: bool = True,
    offset: float = OFFSET,
    handicap: float = HANDICAP,
    reach: float = REACH,
) -> Detector:
    """The one that the chapter trains; `width` is 24 for two cores, 48 for a GPU.

    Args:
        tau, offset, handicap, reach: as `Detector` takes them.
        residual: False for orthogonal convolutions throughout.
    """
    widths = width, 2 * width, 4 * width
    return Detector(widths, tau=tau, residual=residual, block=True, offset=offset, handicap=handicap, reach=reach)

"""The training step of the reader: each scene on the levels that suit it, each batch elsewhere on the canvases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.distributed import mean_over_ranks
from lipguide.tasks.detection.boxes import NOTHING, Checked, Targets, check_targets, single, unit_range
from lipguide.tasks.detection.reader import ReaderLoss
from lipguide.tasks.detection.windows import CELL, HEIGHT, RATIO, RING, assign, places

__all__ = ["ReaderStep"]

ASKED = {"cpu"}  # devices that say a number at once


class ReaderStep(nn.Module):
    """The step of `lipguide.training.fit`.

    Each scene is read on the levels on which one of its digits has about the size that the reader expects, and some on
    the others: what stands there is nothing, and half of the work. Each batch lies elsewhere on the canvases, so that
    every place is learnt.

    Args:
        loss: of the windows.
        elsewhere: the share of the scenes that are read on a level without such a digit.
        known: as `DetectionStep` takes it. Then on a GPU a level reads the same number of scenes in each step, as many
            as are rarely too few, and a step never waits; else it waits once, for these numbers.
    """

    def __init__(self, loss: ReaderLoss, elsewhere: float = 0.1, known: Checked | None = None) -> None:
        super().__init__()
        self.loss, self.elsewhere = loss, elsewhere
        self.steady = known is not None
        self.classes = None if known is None else known.classes
        self.shares = (
            None if known is None else [_suited(*known[:2], side).double().mean().item() for side in loss.levels]
        )

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, boxes, labels = batch
        targets = check_targets(Targets(boxes, labels)) if self.classes is None else Checked(*batch[1:], self.classes)
        images = model.brightless(unit_range(images))
        moved = torch.randint(-CELL // 4, CELL // 4, (2,), device=images.device)
        windows: list[list[Tensor]] = []
        with parametrize.cached():
            for number, chosen in enumerate(self._chosen(targets)):
                if not len(chosen):
                    continue
                below = model.below(images[chosen], number, True, moved).flatten(0, 1)
                centres, sides = places(model.canvases[number], CELL // 2, moved, images.device)
                wanted = assign(targets.part(chosen), centres, sides, model.reach)
                windows.append([below, *(part.flatten(0, 1) for part in wanted)])
            below, *wanted = (torch.cat(parts) for parts in zip(*windows, strict=True))
            output = model.answer(below)
        values, speaks = self.loss.of_windows(*map(single, output), *wanted)
        return mean_over_ranks(values.sum(), speaks.sum(), values)

    def _chosen(self, targets: Targets) -> list[Tensor]:
        """For each level the scenes that are read on it, those with a digit for it first."""
        suited = torch.stack([_suited(*targets[:2], side) for side in self.loss.levels])  # (levels, N)
        if self.shares is None or suited.device.type in ASKED:
            suited |= torch.rand(suited.shape, device=suited.device) < self.elsewhere
            counts = suited.sum(1).tolist()
        else:
            counts = [self._count(suited.shape[1], share) for share in self.shares]
        in_front = (~suited).to(torch.uint8).argsort(dim=1, stable=True)
        return [order[:count] for order, count in zip(in_front, counts, strict=True)]

    def _count(self, scenes: int, share: float) -> int:
        """How many of so many scenes a level reads if it has a digit for such a share of all: two deviations more than
        have one on average, and those elsewhere."""
        spread = math.sqrt(scenes * share * (1 - share))
        return min(scenes, math.ceil(scenes * (share + self.elsewhere * (1 - share)) + 2 * spread))


def _suited(boxes: Tensor, labels: Tensor, side: int) -> Tensor:
    """(N,): which scenes have a digit that a level of so many pixels shows at about the size a reader expects."""
    height = (boxes[..., 3] - boxes[..., 1]).clamp(min=1e-6) * side
    near = (height / HEIGHT).log2().abs() < RING * RATIO
    return (near & (labels != NOTHING)).any(1)

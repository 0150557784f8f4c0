"""The ends of the windows, learnt once more: the last block and the heads, on all levels, with margins by a look.

`ReaderStep` reads a scene on the levels that suit it. What it seldom shows the reader is what a window makes of digits
far too large or too small for it, of which most false alarms come. Here every window of every level is read; only the
block at its end and the heads learn, so that what lies below needs no gradient and costs little.

And the margin that a right answer is asked for is not the same for all: to a constant comes what a look into the block
knows of how far the answer can fall (`lipguide.robustness.certificates.dual`). Who lies flat needs less of a lead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.distributed import mean_over_ranks
from lipguide.robustness.certificates.dual import fall_within
from lipguide.tasks.detection.boxes import Targets, check_targets, single, unit_range
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.reader_loss import ReaderLoss, ReaderOutput, Roles
from lipguide.tasks.detection.windows import CELL, Assigned, assign, places

__all__ = ["EndLoss", "EndStep"]


class EndLoss(ReaderLoss):
    """The loss of a reader whose windows end in an SLL block, where a wrong answer is raised by the offset and by as
    much as the right one can lose to it while the window's features move by `within`.

    Args:
        model: whose windows they are.
        within: an L2 norm.
        negatives: as `ReaderLoss` takes it.
    """

    def __init__(self, model: Detector, within: float, negatives: int = 3) -> None:
        super().__init__(model, negatives=negatives)
        self.within = within

    def of_features(
        self, model: Detector, below: Tensor, output: ReaderOutput, wanted: Assigned
    ) -> tuple[Tensor, Tensor]:
        """The loss of each of K windows that are given `below` (K, features), (K,), and which of them speak."""
        logits, found = output
        roles, of_box = self.roles(logits, found, *wanted), self.of_boxes(found, *wanted[1:])
        with torch.no_grad():
            hard = self.hard(self.entropy(logits + self.offset * roles.wrong, roles), roles)
        asked = roles.asked(hard).nonzero()[:, 0]
        some = Roles(*(column[asked] for column in roles))
        falls = self._falls(model, below[asked], logits[asked], some)
        values = self.entropy(logits[asked] + (self.offset + falls) * some.wrong, some)
        return of_box.index_add(0, asked, values), roles.speaks

    def _falls(self, model: Detector, below: Tensor, logits: Tensor, roles: Roles) -> Tensor:
        """(K, C): by how much the lead over each other answer can fall.

        Only the nearest one is looked at; the others get its share of their length, and no gradient.
        """
        rows, background = model.class_head.weight, logits.shape[1] - 1
        sure = roles.speaks | (roles.ring & (logits.gather(1, roles.label)[:, 0] > logits[:, background]))
        answer = torch.where(sure, roles.label[:, 0], background)[:, None]
        w = rows[answer] - rows  # (K, C, features)
        length = w.norm(dim=2)
        lead = (logits.gather(1, answer) - logits).scatter(1, answer, torch.inf)
        nearest = lead.argmin(1, keepdim=True)
        one = w.gather(1, nearest[..., None].expand(-1, -1, w.shape[2]))[:, 0]
        filters, bias = model.end.weight, model.end.bias
        of_one = fall_within(one / one.norm(dim=1, keepdim=True), below, filters, bias, self.within)[:, None]
        return (of_one.detach() * length.detach()).scatter(1, nearest, of_one * length.gather(1, nearest))


class EndStep(nn.Module):
    """The step of `lipguide.training.fit`: each batch lies elsewhere on the canvases, and all windows are read."""

    steady = False  # how many windows are asked is known on the way

    def __init__(self, loss: EndLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: Detector, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        below, wanted = _seen(model, batch)
        with parametrize.cached():
            output = ReaderOutput(*map(single, model.answer(below)))
            values, speaks = self.loss.of_features(model, below, output, wanted)
        return mean_over_ranks(values.sum(), speaks.sum(), values)


@torch.no_grad()
def _seen(model: Detector, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Assigned]:
    """What the end of every window is given, (K, features), and what it is to say."""
    images, boxes, labels = batch
    targets = check_targets(Targets(boxes, labels))
    images = model.brightless(unit_range(images))
    moved = torch.randint(-CELL // 4, CELL // 4, (2,), device=images.device)
    with parametrize.cached():
        given = [model.below(images, number, True, moved) for number in range(len(model.canvases))]
    parts = [places(canvas, CELL // 2, moved, images.device) for canvas in model.canvases]
    centres, sides = (torch.cat(part) for part in zip(*parts, strict=True))
    wanted = assign(targets, centres, sides, model.reach)
    return torch.cat(given, 1).flatten(0, 1), Assigned(*(part.flatten(0, 1) for part in wanted))

"""What the windows of a reader are to say, and the loss of what they do say."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.distributed import mean_over_ranks
from lipguide.tasks.detection.boxes import Targets, single
from lipguide.tasks.detection.certificates.overlap import overlap
from lipguide.tasks.detection.losses import check_output
from lipguide.tasks.detection.windows import BOXED, RIGHT, RING, assign, expected

__all__ = ["ReaderLoss", "ReaderOutput", "Roles"]


class ReaderOutput(NamedTuple):
    """logits: (N, P, classes + 1), background last; sides: (N, P, 4), how far left, top, right and bottom stand from
    those of a digit in the middle of the window, in units of `reach` pixels of the level."""

    logits: Tensor
    sides: Tensor


class Roles(NamedTuple):
    """What K windows are to say. label: (K, 1), of the nearest digit; speaks: (K,), who is to say it; ring: (K,), who
    may say it or nothing, and the others are to say nothing; wrong: (K, C), 1 where an answer is wrong."""

    label: Tensor
    speaks: Tensor
    ring: Tensor
    wrong: Tensor

    def asked(self, hard: Tensor) -> Tensor:
        """(K,): whose answer counts, with these of the others."""
        return self.speaks | self.ring | hard


class ReaderLoss(nn.Module):
    r"""Cross-entropy at temperature τ of the windows on a digit and of the hardest others, and smooth L1 of sides.

    A window within the ring around a digit may say the digit, if its box is right, or nothing, so that what is nearly
    there is no mistake. It learns the digit's box all the same, and so do windows farther off: whoever outscores the
    right window should be right as well.

    Args:
        model: the `lipguide.tasks.detection.reader.Detector` whose windows they are.
        negatives: hardest windows elsewhere for each one that speaks, among all that are given.
        reduction: "mean" over the windows that speak, or "none" for one value a scene.
    """

    def __init__(self, model: nn.Module, reduction: str = "mean", negatives: int = 3) -> None:
        super().__init__()
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
        roles = self.roles(logits, found, labels, distance, sides)
        values = self.entropy(logits + self.offset * roles.wrong, roles)
        asked = roles.asked(self.hard(values.detach(), roles))
        return values * asked + self.of_boxes(found, distance, sides), roles.speaks

    def roles(self, logits: Tensor, found: Tensor, labels: Tensor, distance: Tensor, sides: Tensor) -> Roles:
        """What each window is to say."""
        background, label = logits.shape[1] - 1, labels.clamp(min=0)[:, None]
        right = overlap(self._corners(found.detach()), self._corners(sides)) > RIGHT
        speaks, ring = distance <= 1, (distance > 1) & (distance <= RING) & right
        wrong = torch.ones_like(logits).scatter(1, label, (~(speaks | ring))[:, None].to(logits))
        wrong[:, background] = speaks.to(logits)
        return Roles(label, speaks, ring, wrong)

    def entropy(self, raised: Tensor, roles: Roles) -> Tensor:
        """The cross-entropy of each window, (K,), of logits of which the wrong ones are raised."""
        log_p = (self.tau * raised).log_softmax(1)
        of_label, nothing = log_p.gather(1, roles.label).squeeze(1), log_p[:, -1]
        free = -torch.logaddexp(of_label, nothing)
        return torch.where(roles.speaks, -of_label, torch.where(roles.ring, free, -nothing))

    def hard(self, values: Tensor, roles: Roles) -> Tensor:
        """The hardest windows elsewhere, by what the entropy of each is. How many they are is not asked of the
        device."""
        values = values.masked_fill(roles.speaks | roles.ring, -1.0)
        count = (self.negatives * roles.speaks.sum().clamp(min=8)).clamp(max=len(values))
        falling = values.sort(descending=True).values
        least = falling.index_select(0, count[None] - 1)
        return values >= least.clamp(min=0)

    def of_boxes(self, found: Tensor, distance: Tensor, sides: Tensor) -> Tensor:
        """Smooth L1 of the sides of each window that learns a box, (K,)."""
        of_box = F.smooth_l1_loss(found, sides.clamp(-4, 4), reduction="none", beta=0.3).sum(1)
        return of_box * (distance <= BOXED)

    def _corners(self, sides: Tensor) -> Tensor:
        return self.reach * sides + expected(sides)

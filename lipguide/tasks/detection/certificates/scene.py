"""The objects of one scene: which of them are surely found, and on which scores that depends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.tasks.detection.certificates.answers import Answers, Bounds
from lipguide.tasks.detection.certificates.objects import heights, rooms

__all__ = ["Scene", "moved"]

TRIED = 3  # windows that are right for an object, for which a closer look is taken
HIGH = 0.0  # scores above this say a class, those below it would rather say nothing


class Scene(NamedTuple):
    """scores: (P, C); graph: (P, P), the rivals; least: the threshold; labels: (n,) of the objects; rise: (n, P), as
    `lipguide.tasks.detection.certificates.objects.heights` takes it."""

    scores: Tensor
    graph: Tensor
    least: float
    labels: Tensor
    rise: Tensor

    @classmethod
    def of(cls, given: Answers, number: int, eps: float, least: float, boxes: Tensor, labels: Tensor) -> Scene:
        """One of the scenes that `given` answers, with its objects' boxes (n, 4) and labels (n,)."""
        rise = given.rises(eps, rooms(given.boxes[number], boxes, labels), labels)
        return cls(given.scores[number], given.graph, least, labels, rise)

    def heights(self, low: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Of the objects, before and after suppression, (n,) each."""
        return heights(self.scores, low, up, self.rise, self.labels, self.graph)

    def falls(self, low: Tensor, up: Tensor) -> Tensor:
        """(P, C): the scores of which it has to be known how far they fall, those of the best windows that are right
        for each lost object."""
        asked = torch.zeros_like(low, dtype=torch.bool)
        for _, label, best in self._best(low, up):
            asked[best, label] = True
        return asked

    def rises(self, low: Tensor, up: Tensor) -> Tensor:
        """(P, C): the scores of which it has to be known how far they rise, those of the rivals that may come before
        one of these windows and be wrong, if the window speaks in any case."""
        asked = torch.zeros_like(low, dtype=torch.bool)
        for thing, label, best in self._best(low, up):
            if low[best, label] > self.least:
                wrong = self.graph[best] & (self.rise[thing] > -torch.inf)
                asked[:, label] |= wrong & (up[:, label] >= low[best, label])
        return asked

    def _best(self, low: Tensor, up: Tensor) -> Iterator[tuple[int, int, int]]:
        """Each lost object with its label and a window that is right for it in any case, one of the best."""
        _, after = self.heights(low, up)
        for thing in (after == -torch.inf).nonzero().squeeze(1).tolist():
            label = int(self.labels[thing])
            good = (self.rise[thing] == -torch.inf) & (up[:, label] > self.least)
            best = low[:, label].masked_fill(~good, -torch.inf).topk(min(TRIED, int(good.sum()))).indices
            yield from ((thing, label, window) for window in best.tolist())


def moved(given: Answers, scenes: Sequence[Scene], eps: float, least: float) -> Bounds:
    """Between what the scores of some scenes move, (N, P, C) each.

    Where a look is taken, closer ones ask those scores on which an object depends, and of those that bound the alarms
    the highest: first how far they fall, then, of what is left, how far others rise.
    """
    low, up = given.bounds(eps, least)
    if given.inside is not None and scenes:
        for look in given.inside.looks:
            asked = [scene.falls(*bounds) for scene, *bounds in zip(scenes, low, up, strict=True)]
            low = given.lifted(eps, low, torch.stack(asked) | (low > HIGH), look)
            asked = [scene.rises(*bounds) for scene, *bounds in zip(scenes, low, up, strict=True)]
            up = given.lowered(eps, up, torch.stack(asked) | (up > HIGH), look)
    return low, up

"""The objects of one scene: which of them are surely found, and on which scores and boxes that depends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.tasks.detection.certificates.alarms import Cover, cover, falsely
from lipguide.tasks.detection.certificates.answers import ROUNDING, Answers, Bounds
from lipguide.tasks.detection.certificates.inside import Look
from lipguide.tasks.detection.certificates.objects import MARGIN, heights, needed, rooms
from lipguide.tasks.detection.certificates.shifts import Asked, stay

__all__ = ["Scene", "moved"]

TRIED = 3  # windows that are right for an object, for which a closer look is taken
HIGH = 0.0  # alarms above this are looked at: those below cost little precision, and are many
ROUNDS = 3  # of looks at those scores that bound the alarms: if one sinks, another one may bound them


class Scene(NamedTuple):
    """scores: (P, C); graph: (P, P), the rivals; least: the threshold; truth, labels: (n, 4) and (n,) of the objects;
    rise: (n, P), as `lipguide.tasks.detection.certificates.objects.heights` takes it."""

    scores: Tensor
    graph: Tensor
    least: float
    truth: Tensor
    labels: Tensor
    rise: Tensor

    @classmethod
    def of(cls, given: Answers, number: int, eps: float, least: float, boxes: Tensor, labels: Tensor) -> Scene:
        """One of the scenes that `given` answers, with its objects' boxes (n, 4) and labels (n,)."""
        rise = given.rises(eps, rooms(given.boxes[number], boxes, labels), labels)
        return cls(given.scores[number], given.graph, least, boxes, labels, rise)

    def heights(self, low: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Of the objects, before and after suppression, (n,) each."""
        return heights(self.scores, low, up, self.rise, self.labels, self.graph)

    def falls(self, low: Tensor, up: Tensor) -> Tensor:
        """(P, C): the scores of which it has to be known how far they fall, those of the best windows that are right
        for each lost object, and of the very best for each other one, which say how high it is found."""
        asked, right = torch.zeros_like(low, dtype=torch.bool), self.rise == -torch.inf
        for _, label, best in self._best(low, up, right):
            asked[best, label] = True
        surest = low[:, self.labels].mT.masked_fill(~right, -torch.inf).max(1)
        speaks = surest.values > self.least
        asked[surest.indices[speaks], self.labels[speaks]] = True
        return asked

    def rises(self, low: Tensor, up: Tensor) -> Tensor:
        """(P, C): the scores of which it has to be known how far they rise, those of the rivals that may come before
        one of these windows and be wrong, if the window speaks in any case."""
        asked = torch.zeros_like(low, dtype=torch.bool)
        for thing, label, best in self._best(low, up, self.rise == -torch.inf):
            if low[best, label] > self.least:
                wrong = self.graph[best] & (self.rise[thing] > -torch.inf)
                asked[:, label] |= wrong & (up[:, label] >= low[best, label])
        return asked

    def tried(self, low: Tensor, up: Tensor) -> Tensor:
        """(n, P): −∞ where a window's box has to stay right for a lost object in any case, that of one of the best
        windows that are right now; ∞ where nobody asks."""
        asked = torch.full_like(self.rise, torch.inf)
        for thing, _, best in self._best(low, up, self.rise < torch.inf):
            asked[thing, best] = -torch.inf
        return asked.masked_fill(self.rise <= asked, torch.inf)

    def ahead(self, low: Tensor, up: Tensor) -> Tensor:
        """(n, P): by how much the window's score has to have risen where its box has to stay right for a lost object,
        that of a rival that may come before the best window for which all of these are right now; ∞ where nobody
        asks."""
        asked, done = torch.full_like(self.rise, torch.inf), set()
        for thing, label, best in self._best(low, up, self.rise == -torch.inf):
            own, rise, height = self.scores[:, label], self.rise[thing], low[best, label] - 2 * ROUNDING
            before = self.graph[best] & (torch.minimum(own + rise, up[:, label]) >= low[best, label])
            if thing not in done and height > self.least and (rise[before] < torch.inf).all():
                done.add(thing)
                asked[thing, before] = height - own[before]
        return asked.masked_fill(self.rise <= asked, torch.inf)

    def alarms(self, low: Tensor, up: Tensor) -> Tensor:
        """(P, C): the scores that bound the false alarms, those above `HIGH`."""
        asked = torch.zeros_like(low, dtype=torch.bool)
        possible, false = self.possible(low, up, HIGH)
        highest, window = possible.highest(false)
        above = highest > HIGH
        asked[window[above], possible.label[above]] = True
        return asked

    def possible(self, low: Tensor, up: Tensor, least: float) -> tuple[Cover, Tensor]:
        """What may be reported above `least`, and (P, C) how high each window may be and be false."""
        false = falsely(self.scores, up, self.rise, self.labels, self.graph)
        return cover(low, up, self.graph, least), false

    def _best(self, low: Tensor, up: Tensor, good: Tensor) -> Iterator[tuple[int, int, int]]:
        """Each lost object with its label and each of the best windows among some (n, P) of its own."""
        _, after = self.heights(low, up)
        for thing in (after == -torch.inf).nonzero().squeeze(1).tolist():
            label = int(self.labels[thing])
            some = good[thing] & (up[:, label] > self.least)
            best = low[:, label].masked_fill(~some, -torch.inf).topk(min(TRIED, int(some.sum()))).indices
            yield from ((thing, label, window) for window in best.tolist())


def moved(given: Answers, scenes: Sequence[Scene], eps: float, least: float) -> tuple[Bounds, list[Scene]]:
    """Between what the scores of some scenes move, (N, P, C) each, and the scenes with what is known of their boxes.

    Where a look is taken, closer ones ask those scores and boxes on which an object depends, and of the scores that
    bound the alarms the highest: first which boxes stay right and how far scores fall, also those of objects that are
    found in any case, then, of what is left, how far others rise.
    """
    (low, up), scenes = given.bounds(eps, least), list(scenes)
    if given.inside is not None and scenes:
        for look in given.inside.looks:
            asked = _of_each(scenes, Scene.tried, low, up)
            scenes = _stayed(given, scenes, asked, eps, look)
            asked = _of_each(scenes, Scene.falls, low, up)
            low = given.lifted(eps, low, torch.stack(asked), look)
            asked = _of_each(scenes, Scene.rises, low, up)
            up = _lowered(given, scenes, low, up, torch.stack(asked), eps, look)
            asked = _of_each(scenes, Scene.ahead, low, up)
            scenes = _stayed(given, scenes, asked, eps, look)
    return (low, up), scenes


def _of_each(
    scenes: Sequence[Scene], ask: Callable[[Scene, Tensor, Tensor], Tensor], low: Tensor, up: Tensor
) -> list[Tensor]:
    """What each scene asks, of its bounds."""
    return [ask(scene, *bounds) for scene, *bounds in zip(scenes, low, up, strict=True)]


def _lowered(
    given: Answers, scenes: Sequence[Scene], low: Tensor, up: Tensor, asked: Tensor, eps: float, look: Look
) -> Tensor:
    """The upper bounds (N, P, C) with those that are asked, and those that bound the alarms, as closely as the look
    does."""
    known = torch.zeros_like(asked)
    for _ in range(ROUNDS):
        alarms = _of_each(scenes, Scene.alarms, low, up)
        asked = (asked | torch.stack(alarms)) & ~known
        if not asked.any():
            break
        up = given.lowered(eps, up, asked, look)
        known |= asked
    return up


def _stayed(given: Answers, scenes: Sequence[Scene], asked: Sequence[Tensor], eps: float, look: Look) -> list[Scene]:
    """The scenes, with what the look proves of boxes.

    Args:
        asked: (n, P) of each scene, by how much a window's score has to have risen where its box has to stay right; ∞
            where nobody asks.
    """
    if given.inside.boxes is None:
        return list(scenes)
    places = [(each < torch.inf).nonzero(as_tuple=True) for each in asked]  # objects and windows of each scene
    parts = []
    for number, (scene, each, (thing, window)) in enumerate(zip(scenes, asked, places, strict=True)):
        least = needed(scene.truth.double(), scene.labels) + MARGIN
        where = torch.full_like(thing, number), window, scene.labels[thing]
        parts.append(Asked(*where, scene.truth[thing], least[thing], each[thing, window]))
    together = Asked(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    sure = stay(given, together, eps, look)
    proved = together.rise.masked_fill(~sure, torch.inf).split([len(part.window) for part in parts])
    result = []
    for scene, place, mine in zip(scenes, places, proved, strict=True):
        rise = scene.rise.clone()
        rise[place] = torch.minimum(rise[place], mine)
        result.append(scene._replace(rise=rise))
    return result

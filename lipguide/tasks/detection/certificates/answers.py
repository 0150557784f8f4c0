"""What a detector answers to pictures, each answer with the constant that bounds how it moves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipguide.bounds.walk import check_untouched
from lipguide.layers.brick import overtaken, own_rule
from lipguide.precision import full_precision
from lipguide.robustness.certificates.conditions import check_full_precision, in_float64
from lipguide.robustness.certificates.radii import check_precision
from lipguide.tasks.detection.boxes import check_finite, check_number
from lipguide.tasks.detection.certificates.inside import Entries, Inside, Look
from lipguide.tasks.detection.decision import reported
from lipguide.tasks.detection.scores import check_call

__all__ = ["ROUNDING", "Answers", "Bounds", "answers", "said_of"]

Bounds = tuple[Tensor, Tensor]  # low, up: (N, P, C) each
ROUNDING = 1e-4  # of scores, in float32: so much is added to how far an attack moves them
PROBED = 2  # pictures that are answered in float64 as well
SHARE = 0.2  # of the room that rounding may take there


class Answers(NamedTuple):
    """Scores and boxes of P windows in N pictures, of a detector whose decision is `reported`.

    Args:
        scores: (N, P, C).
        boxes: (N, P, 4) xyxy, not cut at the picture's edge.
        graph: (P, P), the rivals.
        steepness: each score is so Lipschitz in the picture.
        reach: (P,), the four sides of a window's box are, as one vector.
        together: (C,), a window's score for a class over `steepness` and its box over its reach are, as one vector of
            five; √2 holds always, 1 where the score and the box look at features that have nothing in common.
        inside: what a look into the last block of each window rests on; None where none is taken.
    """

    scores: Tensor
    boxes: Tensor
    graph: Tensor
    steepness: float
    reach: Tensor
    together: Tensor
    inside: Inside | None = None

    def part(self, where: slice) -> Answers:
        """The answers to some of the pictures."""
        inside = None if self.inside is None else self.inside.part(where)
        return self._replace(scores=self.scores[where], boxes=self.boxes[where], inside=inside)

    def detections(self, least: float = 0.0) -> list[dict[str, Tensor]]:
        """What the detector reports above `least`."""
        return reported(self.scores, self.boxes, self.graph, least)

    def check(self) -> None:
        """Raise ValueError for what no certificate can rest on: answers that are no numbers or of half precision, and
        constants that are not finite or negative; and for rivals of which only one is the other's, for only one of them
        gives way."""
        _check_said(self.scores, self.boxes)
        check_number("steepness", self.steepness, 0)
        for what, bounds in (("the reach of a window's box", self.reach), ("what bounds both together", self.together)):
            if not ((bounds >= 0) & bounds.isfinite()).all():
                raise ValueError(f"{what} is NaN, infinite or negative: it bounds nothing")
        if not torch.equal(self.graph, self.graph.mT):
            raise ValueError("the graph of rivals is not symmetric: two windows are rivals of each other or not at all")

    def moves(self, eps: float) -> tuple[float, Tensor]:
        """How far a score, and each window's box (P,), may move while the picture moves by `eps`."""
        return self.steepness * eps + ROUNDING, self.reach * eps + ROUNDING / 10

    def bounds(self, eps: float, least: float) -> Bounds:
        """Between what the scores move, (N, P, C) each, while the pictures move by `eps`. A look is taken at those that
        may come above `least`."""
        drift, _ = self.moves(eps)
        low, up = self.scores - drift, self.scores + drift
        if self.inside is None:
            return low, up
        return self.lifted(eps, low, self.scores > least, "box"), self.lowered(eps, up, up > least, "box")

    def lifted(self, eps: float, low: Tensor, asked: Tensor, look: Look) -> Tensor:
        """These lower bounds (N, P, C), with those that are asked for, (N, P, C), by a look. `inside` has to be there.

        Args:
            look: as `lipguide.tasks.detection.certificates.inside.Inside` takes it.
        """
        drift, _ = self.moves(eps)
        entries = asked.nonzero(as_tuple=True)
        return _lifted(low, entries, self.inside.falls(entries, eps, drift, look))

    def lowered(self, eps: float, up: Tensor, asked: Tensor, look: Look) -> Tensor:
        """As `lifted`, for upper bounds."""
        entries = asked.nonzero(as_tuple=True)
        return -_lifted(-up, entries, -self.inside.rises(entries, eps, look))

    def rises(self, eps: float, room: Tensor, labels: Tensor) -> Tensor:
        """(n, P): by how much each window's score for labels (n,) must have risen for its box to be within `room`
        (n, P) of where it was, while the picture moves by `eps`. −∞: it is there in any case; ∞: nothing says so.

        See the second lemma of `lipguide.tasks.detection.certificates.objects`.
        """
        _, radius = self.moves(eps)
        share = (room - ROUNDING / 10) / self.reach.clamp(min=1e-12)  # of the picture's move, for the box
        rest = (self.together[labels, None] * eps) ** 2 - share**2
        rise = self.steepness * rest.clamp(min=0).sqrt() + ROUNDING
        rise = rise.masked_fill(share < 0, torch.inf)
        return rise.masked_fill(room >= radius, -torch.inf).to(self.scores)


def _lifted(low: Tensor, entries: Entries, values: Tensor) -> Tensor:
    """Lower bounds, where these are closer a rounding of scores below them."""
    low = low.clone()
    low[entries] = torch.maximum(low[entries], (values - ROUNDING).to(low))
    return low


@torch.no_grad()
def answers(model: nn.Module, images: Tensor, batch_size: int = 64, look: bool = False, deep: bool = False) -> Answers:
    """What `model`, such as `lipguide.tasks.detection.reader.detector`, answers to pictures (N, 3, 74, 74) in [0, 1].

    It answers in float32 whatever the precision around, and what it says is handed over on the CPU, for a certificate
    of a scene is many small steps with a question after each. ValueError for a model in half precision, and for one
    whose answers to the first two pictures are so far from those in float64 that the room for rounding may not do.

    Args:
        look: take a look into the last block of each window, which has to be an SLL block. Certificates are closer then
            and cost more: see `lipguide.tasks.detection.certificates.inside`.
        deep: let the look go on to the pairs below the block, for what is in doubt without; far dearer.

    >>> from lipguide.tasks.detection.reader import Detector
    >>> given = answers(Detector((8, 8, 8), 16).eval(), torch.rand(2, 3, 74, 74))
    >>> tuple(given.scores.shape), round(given.steepness, 3)
    ((2, 343, 10), 1.0)
    """
    check_call(model, images, batch_size)
    check_full_precision(model, images)
    if look or deep:
        opened = _ruled(model, "inside")
        constants = _constants(model)
        with full_precision():
            # What the block is given is no steeper than the scores.
            outputs, inside = opened(images, batch_size, constants[0], deep)
            said = _said(model, outputs)
    else:
        said, constants, inside = said_of(model, images, batch_size), _constants(model), None
    _check_rounding(model, images[:PROBED], *said[:2])
    return Answers(*said, *constants, inside)


@torch.no_grad()
def said_of(model: nn.Module, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, boxes and rivals of `answers`, without the constants, which take longer than to read some pictures."""
    check_full_precision(model, images)
    with full_precision():
        return _said(model, [model(part) for part in images.split(batch_size)])


def _said(model: nn.Module, outputs: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.cat([model.scores(output) for output in outputs])
    boxes = torch.cat([model.boxes(output) for output in outputs])
    _check_said(scores, boxes)
    return scores.cpu(), boxes.cpu(), model.rivals().cpu()


def _check_said(scores: Tensor, boxes: Tensor) -> None:
    check_precision(scores, "scores")
    check_precision(boxes, "boxes")
    check_finite(scores, boxes)


def _check_rounding(model: nn.Module, images: Tensor, *said: Tensor) -> None:
    """Raise ValueError where the scores or the boxes that are said of these pictures, and of others behind them, are
    not as near those in float64 as `ROUNDING` takes for granted."""
    if not len(images):
        return
    with torch.inference_mode(False), full_precision():
        twin = in_float64(deepcopy(model).cpu())  # where there are doubles, and what they cost is small
        output = twin(images.cpu().double())
        exact = twin.scores(output), twin.boxes(output)
    for what, room, given, there in zip(("scores", "boxes"), (ROUNDING, ROUNDING / 10), said, exact, strict=True):
        error = float((given[: len(images)] - there).abs().max())
        if not error <= SHARE * room:
            raise ValueError(
                f"the detector's {what} are up to {error:.2g} from those in float64, and a certificate leaves "
                f"{SHARE * room:.2g} for that: rows of the class head that nearly agree, or large weights and biases, "
                "are too much for float32. Certify model.double() on images.double()"
            )


def _constants(model: nn.Module) -> tuple[float, Tensor, Tensor]:
    """What the model's class says of it, where neither a class below that one nor a hook has a say in its answers."""
    check_untouched(model)
    steepness, reach, together = _ruled(model, "constants")()
    return steepness, reach.cpu(), together.cpu()


def _ruled(model: nn.Module, name: str) -> Callable[..., Any]:
    """The method of that name, if nothing below the class that has it changes what the model computes."""
    rule = own_rule(model, name)
    if rule is None:
        reason = overtaken(model, name) or f"it has no method {name}"
        raise ValueError(f"the answers of {type(model).__name__} cannot be certified: {reason}")
    return rule

"""The record of a certified detector: certificates of every scene, attacks on some, and the hunt for a wrong one.

Each part is made once and kept, with the commit that made it, so what is interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipguide.provenance import commit
from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attack_l2, mixture
from lipguide.tasks.detection.boxes import NOTHING, unit_range
from lipguide.tasks.detection.certificates import Answers, Certificate, answers, certified_recall, certify, curve, hunt
from lipguide.tasks.detection.certificates.curve import row
from lipguide.tasks.detection.certificates.summary import joined, part_of
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.smoothing import smoothed, surely_found
from lipguide.tasks.runs import once

__all__ = ["Plan", "certified"]

logger = logging.getLogger(__name__)
PIECE = 50  # scenes that are hunted at a time
LOST = ("before", "heights", "alarms")  # columns of a certificate in which −∞ stands for what never is
DEEP = 500  # scenes that are certified at a time by the look that goes deepest
Grid = tuple[tuple[float, int | None], ...]  # eps and how many scenes, None: all


@dataclass(frozen=True)
class Plan:
    """How much is certified, attacked and hunted.

    Args:
        grid: eps and how many scenes, None: all, of what is certified by a look into the last block of every window.
        deep: as `grid`, of what is certified by a look into what lies below as well.
        budgets: of eps, at which the first `attacked` scenes are attacked in every way.
        hunts: eps, one of those of `deep`, how many scenes, None: all, and steps of each attack, with which each object
            that is certified there is hunted.
        steps: of every other attack.
        smoothings: eps, one of those of `deep`, σ and draws, at which the first `smoothed` scenes are certified by
            median smoothing as well: each bound with probability 1 − α by itself, not all of them together.
    """

    grid: Grid = ((0.1, None), (0.25, None), (0.5, 1000))
    deep: Grid = ((0.1, None), (0.25, 4000), (0.5, 200))
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5)
    hunts: tuple[tuple[float, int | None, int], ...] = ((0.1, 300, 5), (0.25, 300, 5))
    attacked: int = 200
    steps: int = 20
    smoothings: tuple[tuple[float, float, int], ...] = ((0.1, 0.1, 300), (0.25, 0.15, 1000))
    smoothed: int = 20


def certified(
    model: Detector,
    twin: nn.Module,
    scenes: Split,
    plan: Plan,
    folder: str | Path,
    made: Mapping[str, str],
    real: Split | None = None,
) -> dict[str, Any]:
    """Everything that goes on record of `model`, such as the weights "detection-reader" give it, on some scenes. It has
    to be a reader whose windows can be looked into.

    Args:
        twin: an ordinary detector, which median smoothing asks.
        scenes: all are certified, and the first of them attacked.
        plan: how much.
        folder: where each part is kept; parts of other scenes or of other weights there are an error.
        made: what tells the weights of both from others: "weights" those of the model, "twin" those of the twin.
        real: real scenes, if there are any, that are certified as well.

    >>> import tempfile, torch
    >>> from lipguide.tasks.detection.data import load_split
    >>> model = Detector((8, 8, 8), 16, residual=True, block=True).eval()
    >>> scenes = load_split("test", 2, 0, torch.device("cpu"))
    >>> plan = Plan(((0.1, None),), ((0.1, 1),), (0.1,), (), attacked=1, steps=1, smoothings=())
    >>> record = certified(model, model, scenes, plan, tempfile.mkdtemp(), {"weights": "a", "twin": "a"})
    >>> record["scenes"], [row["eps"] for row in record["certificates"]]
    (2, [0.1])
    """
    _check(plan)

    def kept(name: str, wanted: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        of = {"data": scenes.hash, "weights": made["weights"], **wanted}
        return once(Path(folder, f"{name}.json"), of, lambda: {"commit": commit(), **make()})

    def attacked(eps: float) -> dict[str, Any]:
        few, steps = scenes.part(slice(plan.attacked)), {"eps": eps, "steps": plan.steps}
        of = steps | {"scenes": len(few.images)}
        return kept(f"attacked-{eps:g}", of, partial(_attacked, model, few, **steps))

    def compared(eps: float, sigma: float, draws: int) -> dict[str, Any]:
        few, asked = scenes.part(slice(plan.smoothed)), {"eps": eps, "sigma": sigma, "draws": draws}
        own = part_of(sure[eps], slice(0, len(few.images)))
        of = asked | {"twin": made["twin"], "scenes": len(few.images)}
        smooth = kept(f"smoothed-{eps:g}", of, partial(_smoothed, twin, few, **asked))
        return smooth | {"reader": certified_recall(own)}

    def deeply(scenes: Split, eps: float, many: int | None) -> list[dict[str, Any]]:
        name, which = ("real-deep", {"real": scenes.hash}) if scenes is real else ("deep", {})
        pieces = []
        for some in _slices(many, len(scenes.images), DEEP):
            of = {"eps": eps, **which, "scenes": some.stop - some.start}
            pieces.append(kept(f"{name}-{eps:g}-{some.start}", of, partial(_deep, model, scenes.part(some), eps)))
        return pieces

    def hunted(eps: float, many: int | None, steps: int) -> dict[str, Any]:
        pieces = []
        for some in _slices(many, len(scenes.images), PIECE):
            make = partial(_hunted, model, scenes.part(some), part_of(sure[eps], some), steps)
            of = {"eps": eps, "steps": steps, "scenes": some.stop - some.start}
            pieces.append(kept(f"hunted-{eps:g}-{steps}-{some.start}", of, make))
        return _together(pieces)

    grid = {"grid": [list(at) for at in plan.grid]}
    whole = kept("certificates", grid, partial(_whole, model, scenes, plan.grid))
    if real is not None:
        wanted = grid | {"real": real.hash}
        deep_enough = [eps for eps, many in plan.deep if many is None or many >= len(real.images)]
        its = {eps: deeply(real, eps, None) for eps in deep_enough}
        rows = [_row_of(pieces, _whole_of(pieces, eps, model.least)) for eps, pieces in its.items()]
        whole |= {"real": kept("real", wanted, partial(_whole, model, real, plan.grid)) | {"deep": rows}}
    deep = {eps: deeply(scenes, eps, many) for eps, many in plan.deep}
    sure = {eps: _whole_of(pieces, eps, model.least) for eps, pieces in deep.items()}
    return whole | {
        "deep": [_row_of(pieces, sure[eps]) for eps, pieces in deep.items()],
        "attacked": [attacked(eps) for eps in plan.budgets],
        "smoothed": [compared(*setting) for setting in plan.smoothings],
        "hunted": [hunted(*setting) for setting in plan.hunts],
    }


def _check(plan: Plan) -> None:
    """Raise ValueError where a plan goes by certificates that it does not have."""
    many = dict(plan.deep)
    hunts = [("hunts", eps, asked) for eps, asked, _ in plan.hunts]
    for what, eps, asked in [*hunts, *(("comparisons", eps, plan.smoothed) for eps, _, _ in plan.smoothings)]:
        if eps not in many or (many[eps] is not None and (asked is None or asked > many[eps])):
            scenes = "all scenes" if asked is None else f"{asked} scenes"
            raise ValueError(
                f"{what} at {eps:g} are of certificates that the plan has not: put {eps:g} into deep, for {scenes}"
            )


def _slices(many: int | None, there: int, size: int) -> list[slice]:
    """The first `many` of so many scenes, None: all, piece by piece."""
    last = there if many is None else min(many, there)
    return [slice(first, min(first + size, last)) for first in range(0, last, size)]


def _whole(model: Detector, scenes: Split, grid: Grid) -> dict[str, Any]:
    """What is certified of scenes, with a look and by constants alone, and what is found on all of them clean. With the
    seconds a scene of each step."""
    images, targets = unit_range(scenes.images), scenes.targets
    given, forward = _timed(lambda: answers(model, images, look=True))
    clean = score(given.detections(model.least), targets)
    logger.info("clean %.1f mAP", clean.map50)

    def timed(given: Answers, eps: float, many: int | None) -> dict[str, float]:
        some = slice(many)
        few = scenes.part(some).targets
        (certified,), seconds = _timed(lambda: curve(given.part(some), few, [eps], model.least))
        logger.info("certified %s", certified)
        return {"scenes": len(few.labels), **certified, "seconds": seconds / len(few.labels)}

    return {
        "scenes": len(images),
        "objects": int((targets.labels >= 0).sum()),
        "threshold": model.least,
        "steepness": given.steepness,
        "clean": clean._asdict(),
        "certificates": [timed(given, *at) for at in grid],
        "constants": [timed(given._replace(inside=None), *at) for at in grid],
        "seconds": {"forward": forward / len(images)},
    }


def _deep(model: Detector, scenes: Split, eps: float) -> dict[str, Any]:
    """The certificate of some scenes by the look that goes deepest, as JSON has it."""
    given = answers(model, unit_range(scenes.images), deep=True)
    certificate, seconds = _timed(lambda: certify(given, scenes.targets, eps, model.least))
    logger.info("certified %s", row(certificate, len(scenes.images)))
    columns = {name: values.tolist() for name, values in certificate._asdict().items() if name not in ("eps", "least")}
    for name in LOST:
        columns[name] = [value if math.isfinite(value) else None for value in columns[name]]
    return {"scenes": len(scenes.images), "seconds": seconds, "certificate": columns}


def _whole_of(pieces: Sequence[Mapping[str, Any]], eps: float, least: float) -> Certificate:
    """The one certificate of several pieces."""
    parts = []
    for piece in pieces:
        columns = dict(piece["certificate"])
        for name in LOST:
            columns[name] = [-math.inf if value is None else value for value in columns[name]]
        numbers = {name: _column(name, values) for name, values in columns.items()}
        parts.append(Certificate(eps=eps, least=least, **numbers))
    return joined(parts, [piece["scenes"] for piece in pieces])


def _row_of(pieces: Sequence[Mapping[str, Any]], whole: Certificate) -> dict[str, Any]:
    """What the one certificate of several pieces says, and what these took."""
    many = sum(piece["scenes"] for piece in pieces)
    seconds = sum(piece["seconds"] for piece in pieces) / max(many, 1)
    commits = sorted({piece["commit"] for piece in pieces})
    return {"scenes": many, "commits": commits, **row(whole, many), "seconds": seconds}


def _column(name: str, values: Sequence[float]) -> torch.Tensor:
    real = name in ("births", *LOST)
    return torch.tensor(values, dtype=torch.float64 if real else torch.long, device="cpu")


def _timed(function: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def _attacked(model: Detector, scenes: Split, eps: float, steps: int) -> dict[str, Any]:
    """The scores that every attack leaves, and the lowest of them."""
    images, targets = unit_range(scenes.images), scenes.targets
    found = {}
    for name in (TRAINING_LOSS, *ATTACKS):
        found[name] = detections(model, attack_l2(model, images, targets, eps, name, steps))
    found["mixture"] = mixture(found, targets)
    left = {name: score(some, targets)._asdict() for name, some in found.items()}
    by = min(left, key=lambda name: left[name]["map50"])
    logger.info("attacked at %g: %.1f mAP by %s", eps, left[by]["map50"], by)
    clean = score(detections(model, images), targets)._asdict()
    return {"scenes": len(images), "clean": clean, "attacks": left, "strongest": left[by], "by": by}


def _hunted(model: Detector, scenes: Split, certificate: Certificate, steps: int) -> dict[str, Any]:
    """How many certified objects each aimed attack brings down: none, or the certificates are wrong."""
    images = unit_range(scenes.images)
    found, seconds = _timed(lambda: hunt(model, images, scenes.targets, certificate, steps))
    logger.info("hunted at %g: %s", certificate.eps, found)
    return {"scenes": len(images), "seconds": seconds} | found._asdict()


def _together(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One hunt from those of several pieces."""
    sums = {key: sum(piece[key] for piece in pieces) for key in ("scenes", "seconds", "hunted", "overrun")}
    fallen = {aim: sum(piece["fallen"][aim] for piece in pieces) for aim in pieces[0]["fallen"]}
    commits = sorted({piece["commit"] for piece in pieces})
    return {"eps": pieces[0]["eps"], "steps": pieces[0]["steps"], "commits": commits, **sums, "fallen": fallen}


def _smoothed(twin: nn.Module, scenes: Split, eps: float, sigma: float, draws: int) -> dict[str, Any]:
    """How many objects the smoothed twin is sure of, and at what price.

    Each bound of a coordinate holds with probability 1 − α by itself. That all that "found" rests on hold together is
    less probable, so this share is in favour of smoothing.
    """
    images, (boxes, labels) = unit_range(scenes.images), scenes.targets
    began, sure = time.perf_counter(), []
    for image, truth, classes in zip(images, boxes, labels, strict=True):
        bounds = smoothed(lambda noisy: detections(twin, noisy), image, eps, sigma, draws)
        there = classes != NOTHING
        sure += surely_found(bounds, truth[there], classes[there]).tolist()
    seconds = (time.perf_counter() - began) / len(images)
    logger.info("smoothed at %g: %d of %d found", eps, sum(sure), len(sure))
    found = 100 * sum(sure) / max(len(sure), 1)
    return {"scenes": len(images), "objects": len(sure), "found": found, "seconds": seconds}

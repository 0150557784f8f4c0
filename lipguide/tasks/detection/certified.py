"""The record of a certified detector: certificates of every scene, attacks on some, and the hunt for a wrong one."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attack_l2, strongest
from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.certificates import Answers, answers, certify, curve, hunt
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.scores import detections, score

__all__ = ["Plan", "certified"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How much is certified, attacked and hunted.

    Args:
        grid: of eps, at which everything is certified.
        budgets: of eps, at which the first `attacked` scenes are attacked in every way.
        hunts: of eps, at which each certified object of the first `hunted` scenes is hunted.
        steps: of every attack.
    """

    grid: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5)
    hunts: tuple[float, ...] = (0.1, 0.25)
    attacked: int = 200
    hunted: int = 200
    steps: int = 20


def certified(model: Detector, scenes: Split, plan: Plan) -> dict[str, Any]:
    """Everything that goes on record of `model`, such as the weights "detection-reader" give it, on some scenes.

    >>> from lipguide.tasks.detection.data import load_split
    >>> model, scenes = Detector((8, 8, 8), 16).eval(), load_split("test", 2, 0, torch.device("cpu"))
    >>> sorted(certified(model, scenes, Plan((0.1,), (0.1,), (), 1, 0, 1)))
    ['attacked', 'certificates', 'clean', 'hunted', 'objects', 'scenes', 'seconds', 'steepness', 'threshold']
    """
    images, targets = unit_range(scenes.images), scenes.targets
    given, forward = _timed(lambda: answers(model, images))
    rows, bounds = _timed(lambda: curve(given, targets, plan.grid, model.least))
    clean = score(given.detections(model.least), targets)
    logger.info("clean %.1f mAP; certified found %s", clean.map50, [round(row["found"], 1) for row in rows])
    each = len(images)
    return {
        "scenes": each,
        "objects": int((targets.labels >= 0).sum()),
        "threshold": model.least,
        "steepness": given.steepness,
        "clean": clean._asdict(),
        "certificates": rows,
        "attacked": [_attacked(model, scenes.part(slice(plan.attacked)), eps, plan.steps) for eps in plan.budgets],
        "hunted": [_hunted(model, given, scenes, eps, plan) for eps in plan.hunts],
        "seconds": {"forward": forward / each, "certificate": bounds / each / max(len(plan.grid), 1)},
    }


def _timed(function: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def _attacked(model: Detector, scenes: Split, eps: float, steps: int) -> dict[str, Any]:
    """The scores that every attack leaves, and the lowest of them."""
    images, targets = unit_range(scenes.images), scenes.targets
    moved = {name: attack_l2(model, images, targets, eps, name, steps) for name in (TRAINING_LOSS, *ATTACKS)}
    moved["mixture"] = strongest(model, images, targets, moved)
    left = {name: score(detections(model, pictures), targets)._asdict() for name, pictures in moved.items()}
    by = min(left, key=lambda name: left[name]["map50"])
    logger.info("attacked at %g: %.1f mAP by %s", eps, left[by]["map50"], by)
    clean = score(detections(model, images), targets)._asdict()
    return {"eps": eps, "scenes": len(images), "clean": clean, "attacks": left, "strongest": left[by], "by": by}


def _hunted(model: Detector, given: Answers, scenes: Split, eps: float, plan: Plan) -> dict[str, Any]:
    """How many certified objects each aimed attack brings down: none, or the certificates are wrong."""
    few = scenes.part(slice(plan.hunted))
    number = len(few.images)
    part = given._replace(scores=given.scores[:number], boxes=given.boxes[:number])
    certificate = certify(part, few.targets, eps, model.least)
    found = hunt(model, unit_range(few.images), few.targets, certificate, plan.steps)
    logger.info("hunted at %g: %s", eps, found)
    return {"eps": eps, "scenes": number} | found._asdict()

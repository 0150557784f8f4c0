"""The record of a certified detector: certificates of every scene, attacks on some, and the hunt for a wrong one."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attack_l2, mixture
from lipguide.tasks.detection.boxes import NOTHING, unit_range
from lipguide.tasks.detection.certificates import Answers, answers, certified_recall, certify, curve, hunt
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.smoothing import smoothed, surely_found

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
        smoothings: eps, σ and draws, at which the first `smoothed` scenes are certified by median smoothing as well.
    """

    grid: tuple[float, ...] = (0.1, 0.25, 0.5)
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5)
    hunts: tuple[float, ...] = (0.1, 0.25)
    attacked: int = 100
    hunted: int = 100
    steps: int = 20
    smoothings: tuple[tuple[float, float, int], ...] = ((0.1, 0.1, 300), (0.25, 0.15, 1000))
    smoothed: int = 20


def certified(model: Detector, twin: nn.Module, scenes: Split, plan: Plan) -> dict[str, Any]:
    """Everything that goes on record of `model`, such as the weights "detection-reader" give it, on some scenes.

    Args:
        twin: an ordinary detector, which median smoothing asks.
        scenes: all are certified, and the first of them attacked.
        plan: how much.

    >>> import torch
    >>> from lipguide.tasks.detection.data import load_split
    >>> model, scenes = Detector((8, 8, 8), 16).eval(), load_split("test", 2, 0, torch.device("cpu"))
    >>> record = certified(model, model, scenes, Plan((0.1,), (0.1,), (), attacked=1, steps=1, smoothings=()))
    >>> record["scenes"], [row["eps"] for row in record["certificates"]]
    (2, [0.1])
    """
    images, targets = unit_range(scenes.images), scenes.targets
    given, forward = _timed(lambda: answers(model, images))
    rows, bounds = _timed(lambda: curve(given, targets, plan.grid, model.least))
    clean = score(given.detections(model.least), targets)
    logger.info("clean %.1f mAP; certified found %s", clean.map50, [round(row["found"], 1) for row in rows])
    each = len(images)

    def first(number: int) -> tuple[Answers, Split]:
        return given.part(slice(number)), scenes.part(slice(number))

    return {
        "scenes": each,
        "objects": int((targets.labels >= 0).sum()),
        "threshold": model.least,
        "steepness": given.steepness,
        "clean": clean._asdict(),
        "certificates": rows,
        "attacked": [_attacked(model, *first(plan.attacked), eps, plan.steps) for eps in plan.budgets],
        "hunted": [_hunted(model, *first(plan.hunted), eps, plan.steps) for eps in plan.hunts],
        "smoothed": [_smoothed(twin, *first(plan.smoothed), model.least, *one) for one in plan.smoothings],
        "seconds": {"forward": forward / each, "certificate": bounds / each / max(len(plan.grid), 1)},
    }


def _timed(function: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def _attacked(model: Detector, given: Answers, scenes: Split, eps: float, steps: int) -> dict[str, Any]:
    """The scores that every attack leaves, and the lowest of them."""
    images, targets = unit_range(scenes.images), scenes.targets
    found = {}
    for name in (TRAINING_LOSS, *ATTACKS):
        found[name] = detections(model, attack_l2(model, images, targets, eps, name, steps))
    found["mixture"] = mixture(found, targets)
    left = {name: score(some, targets)._asdict() for name, some in found.items()}
    by = min(left, key=lambda name: left[name]["map50"])
    logger.info("attacked at %g: %.1f mAP by %s", eps, left[by]["map50"], by)
    clean = score(given.detections(model.least), targets)._asdict()
    return {"eps": eps, "scenes": len(images), "clean": clean, "attacks": left, "strongest": left[by], "by": by}


def _hunted(model: Detector, given: Answers, scenes: Split, eps: float, steps: int) -> dict[str, Any]:
    """How many certified objects each aimed attack brings down: none, or the certificates are wrong."""
    certificate = certify(given, scenes.targets, eps, model.least)
    found = hunt(model, unit_range(scenes.images), scenes.targets, certificate, steps)
    logger.info("hunted at %g: %s", eps, found)
    return {"eps": eps, "scenes": len(scenes.images)} | found._asdict()


def _smoothed(
    twin: nn.Module, given: Answers, scenes: Split, least: float, eps: float, sigma: float, draws: int
) -> dict[str, Any]:
    """How many objects the smoothed twin is sure of, at what price, and the reader on the same scenes."""
    images, (boxes, labels) = unit_range(scenes.images), scenes.targets
    began, sure = time.perf_counter(), []
    for image, truth, classes in zip(images, boxes, labels, strict=True):
        bounds = smoothed(lambda noisy: detections(twin, noisy), image, eps, sigma, draws)
        there = classes != NOTHING
        sure += surely_found(bounds, truth[there], classes[there]).tolist()
    seconds = (time.perf_counter() - began) / len(images)
    reader = certified_recall(certify(given, scenes.targets, eps, least))
    logger.info("smoothed at %g: %d of %d found", eps, sum(sure), len(sure))
    found = 100 * sum(sure) / max(len(sure), 1)
    what = {"eps": eps, "sigma": sigma, "draws": draws, "scenes": len(images), "objects": len(sure)}
    return what | {"found": found, "reader": reader, "seconds": seconds}

"""What each step to the certified detector that ships has gained: the same scenes, scored and certified alike.

`python -m lipguide readers` puts it on record. Every trial leaves a file in the folder, and the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.certificates import answers, curve
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.reader import HANDICAP, RIVALS, Detector
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.harness import trained
from lipguide.tasks.runs import once

__all__ = ["FIRST", "PLAN", "TRIALS", "Plan", "Trial", "trials"]

logger = logging.getLogger(__name__)
FIRST = "detection-first-reader"  # before its ends were learnt once more


class Trial(NamedTuple):
    """weights: of a reader; handicap, near: as `Detector` takes them."""

    weights: str
    handicap: float
    near: tuple[float, ...]


ALL = (0.36, *RIVALS[1:])  # no two windows that speak of one digit on one level stand farther apart
TRIALS = {
    "trained once": Trial(FIRST, 0.0, ALL),
    "trained twice": Trial("detection-reader", 0.0, ALL),
    "with a handicap": Trial("detection-reader", HANDICAP, ALL),
    "with fewer rivals": Trial("detection-reader", HANDICAP, RIVALS),
}


@dataclass(frozen=True)
class Plan:
    """How much is scored and certified.

    Args:
        scored: so many of the first scenes are, clean.
        certified: so many of them are, by the look that goes deepest.
        grid: of eps.
        far: an eps at which they are certified by the look into the last block alone, which is far cheaper.
    """

    scored: int = 3000
    certified: int = 100
    grid: tuple[float, ...] = (0.1, 0.25)
    far: float = 0.5


PLAN = Plan()


def trials(
    folder: str | Path,
    scenes: Split,
    plan: Plan = PLAN,
    tried: Mapping[str, Trial] = TRIALS,
) -> list[dict[str, Any]]:
    """One entry for each trial: its score on clean scenes, and its certificates.

    Args:
        folder: holds one file for each trial; files of other weights or scenes there are an error.
        scenes: that judge, where the readers are to run.
        tried: by their names.
    """
    return [_entry(name, trial, Path(folder), scenes.part(slice(plan.scored)), plan) for name, trial in tried.items()]


def _entry(name: str, trial: Trial, folder: Path, scenes: Split, plan: Plan) -> dict[str, Any]:
    model, run = trained(trial.weights, scenes.images.device)
    model.handicap, model.near = trial.handicap, trial.near
    wanted = {
        "name": name,
        "weights": trial.weights,
        "commit": run["commit"],
        "handicap": trial.handicap,
        "near": list(trial.near),
        "threshold": model.least,
        "data": scenes.hash,
        "scenes": len(scenes.images),
        "certified": min(plan.certified, len(scenes.images)),
        "grid": list(plan.grid),
        "far": plan.far,
    }
    entry = once(folder / f"{name.replace(' ', '-')}.json", wanted, partial(_measured, model, scenes, plan))
    logger.info("%s: %.1f mAP, certified %s", name, entry["clean"]["map50"], entry["certificates"])
    return entry


@torch.no_grad()
def _measured(model: Detector, scenes: Split, plan: Plan) -> dict[str, Any]:
    """How a reader scores on all of these scenes, and what is certified of the first."""
    clean = score(detections(model, unit_range(scenes.images)), scenes.targets)
    few = scenes.part(slice(plan.certified))
    given = answers(model, unit_range(few.images), deep=True)
    block = given._replace(inside=replace(given.inside, underneath=None))
    (far,) = curve(block, few.targets, [plan.far], model.least)
    deep = curve(given, few.targets, plan.grid, model.least)
    return {"clean": clean._asdict(), "certificates": deep, "by the block alone": far}

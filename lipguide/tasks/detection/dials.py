"""What the reader's ends gain by being learnt once more, and what the dials of their loss buy, certified alike.

`python -m lipguide readers` puts them on record. Weights that do not ship are trained first, if the folder has none.
Every reader leaves a file there, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.certificates import answers, curve
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.recipes import RECIPES
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.harness import ensure, trained
from lipguide.tasks.runs import once

__all__ = ["ENDS", "FIRST", "PLAN", "READERS", "Plan", "dials"]

logger = logging.getLogger(__name__)
FIRST = "detection-first-reader"  # before its ends are learnt once more
# Its ends, from the loss that asks most of the margins to the one that asks least.
ENDS = ("detection-cautious-reader", "detection-reader", "detection-clean-reader")
READERS = (FIRST, *ENDS)


@dataclass(frozen=True)
class Plan:
    """How much is certified.

    Args:
        grid: of eps.
        certified: so many of the first scenes are, by the look that goes deepest; all are scored clean.
    """

    grid: tuple[float, ...] = (0.1, 0.25)
    certified: int = 500


PLAN = Plan()


def dials(
    folder: str | Path,
    scenes: Split,
    plan: Plan = PLAN,
    names: Sequence[str] = READERS,
) -> list[dict[str, Any]]:
    """One entry for each reader: its recipe, its score on clean scenes, and its certificates.

    Args:
        folder: holds what is trained and one file for each reader; files of other weights or scenes there are an error.
        scenes: that judge, where the readers are to run.
        names: of the weights.
    """
    return [_entry(name, Path(folder), scenes, plan) for name in names]


def _entry(name: str, folder: Path, scenes: Split, plan: Plan) -> dict[str, Any]:
    device = scenes.images.device
    weights = ensure(name, device.type, folder=None if name in RECIPES else folder)
    model, run = trained(name, device, weights.parent)
    wanted = {
        "name": name,
        "recipe": run["recipe"],
        "weights": run["commit"],
        "data": scenes.hash,
        "grid": list(plan.grid),
        "certified": min(plan.certified, len(scenes.images)),
    }
    entry = once(folder / f"{name}.json", wanted, partial(_measured, model, scenes, plan))
    logger.info("%s: %.1f mAP, certified %s", name, entry["clean"]["map50"], entry["certificates"])
    return entry | {"seconds": run["seconds"]}


@torch.no_grad()
def _measured(model: Detector, scenes: Split, plan: Plan) -> dict[str, Any]:
    """How a reader scores on all scenes, and what is certified of the first."""
    clean = score(detections(model, unit_range(scenes.images)), scenes.targets)
    few = scenes.part(slice(plan.certified))
    given = answers(model, unit_range(few.images), deep=True)
    return {
        "scenes": len(scenes.images),
        "clean": clean._asdict(),
        "steepness": given.steepness,
        "certificates": curve(given, few.targets, plan.grid, model.least),
    }

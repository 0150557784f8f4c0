"""Why the fully 1-Lipschitz Tinier SSD does not learn: one change at a time, and all at once.

`python -m lipguide why` has the seven networks of `unlearnt` learn the same few scenes by heart, evaluates each on the
scenes as the study does its configurations, counts the objects that it surely finds, and puts one entry for each
on record. Who does not learn ten scenes by heart learns no thousands; who does need not. What is interrupted goes on
where it stopped, as the study does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguide.distributed import choose_device
from lipguide.tasks.detection.boxes import NOTHING, Targets, unit_range
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.evaluation import EPSILON, Plan
from lipguide.tasks.detection.recipes import Unlearnt
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.study import one
from lipguide.tasks.detection.sure import rates, surely_found
from lipguide.tasks.detection.unlearnt import CHANGES
from lipguide.tasks.harness import recipe_of, trained
from lipguide.tasks.weights import TRAIN_SEED

__all__ = ["CERTIFIED", "PLAN", "left", "why", "why_weights"]

logger = logging.getLogger(__name__)
PLAN = Plan("", None, None, 10, "float32")  # all of the few scenes
CERTIFIED = (0.1, 0.25, EPSILON)
FAINT = 0.01  # a score above which a detection counts that is only ranked


def why_weights(change: str) -> str:
    """The name of the recipe of a network, and of the weights that it makes.

    >>> why_weights("orthogonal")
    'tinier-ssd-why-orthogonal'
    """
    if change not in CHANGES:
        raise ValueError(f"no change {change!r}; there are: {', '.join(CHANGES)}")
    return f"tinier-ssd-why-{change}"


def why(
    folder: str | Path, device: str = "auto", seed: int = 0, only: Sequence[str] = tuple(CHANGES)
) -> list[dict[str, Any]]:
    """Train and evaluate the networks `only`, in this order, and return one entry for each, in that of `CHANGES`.

    An entry is one of the study, with its recipe and a few more figures: `certified`, the shares of objects surely
    found at each ε before suppression and after it, and `certified_objects`, of how many; `ranked_map50`, the mAP of
    the same scenes where detections of all scores but the faintest count; and `left` of the trunk.

    Args:
        folder: holds weights, results and what is needed to go on; results of other recipes or scenes there are an
            error.
        device: "auto", "cpu" or "cuda".
        seed: of the weights at first and of the batches.
    """
    weights = {change: why_weights(change) for change in only}
    where = choose_device(device)
    began = time.perf_counter()
    scenes = load_split("train", Unlearnt.items, TRAIN_SEED, where)
    seconds = time.perf_counter() - began
    entries = {}
    for change, name in weights.items():
        entry = one(change, name, PLAN, scenes, Path(folder), where, seed, seconds)
        entry["recipe"] = asdict(recipe_of(name)[1])
        entry["test"]["seed"] = TRAIN_SEED  # they are judged on what they have learnt
        entries[change] = entry | _looked_into(name, folder, scenes, where)
        logger.info("%s: certified %s", change, entries[change]["certified"])
    return [entries[change] for change in CHANGES if change in entries]


@torch.no_grad()
def _looked_into(name: str, folder: str | Path, scenes: Split, device: torch.device) -> dict[str, Any]:
    """What share of the objects is surely found, and what the attacks do not ask."""
    model, _ = trained(name, device, folder)
    images, targets = unit_range(scenes.images), Targets(*scenes.targets)
    speeds = rates(model)
    shares = {str(eps): surely_found(model, speeds, images, targets, eps) for eps in CERTIFIED}
    return {
        "certified": {eps: {"before": before, "after": after} for eps, (before, after) in shares.items()},
        "certified_objects": int((targets.labels != NOTHING).sum()),
        "ranked_map50": score(detections(model, images, min_score=FAINT), targets).map50,
        "left": left(model.stages[0], images),
    }


def left(trunk: nn.Module, images: Tensor) -> float:
    """The share of the difference between two pictures that is left behind a trunk: the median over pairs.

    >>> left(nn.AvgPool2d(2), torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4))
    0.5
    """
    pairs = len(images) // 2 * 2
    apart = (images[:pairs:2] - images[1:pairs:2]).flatten(1).norm(dim=1)
    features = trunk(images[:pairs])
    return float(((features[::2] - features[1::2]).flatten(1).norm(dim=1) / apart).median())

"""What is left of a detector under attack: searched on a device, rated beside it.

While the device searches the next scenes, a thread rates what has been found in the last ones. What was found is kept,
so that a call that was interrupted goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipguide import deadline, distributed
from lipguide.bounds.network import lipschitz_bound
from lipguide.files import replacing
from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attacked, mixture
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.scores import Score, detections, on_cpu, score
from lipguide.tasks.detection.suppression import detect
from lipguide.tasks.detection.tinier_ssd import PICTURE
from lipguide.tasks.weights import fingerprint

__all__ = ["BESIDE", "EPSILON", "Plan", "evaluate", "pace", "stage"]

logger = logging.getLogger(__name__)
EPSILON = 0.5  # the case study's
CLEAN, BESIDE = "clean", "rated beside"  # stages
PART = {"cpu": 128, "cuda": 1024}  # scenes that a process takes at a time; on a GPU less where they do not fit


@dataclass(frozen=True)
class Plan:
    """How much is evaluated, and in which precision an attack searches; how much is trained, the recipes say.

    Args:
        recipes: what the names of its recipes end in.
        test_scenes: how many pictures the scenes of the test are cut from. None: all.
        attacked_scenes: how many of the scenes are attacked, each in every way. None: all.
        pgd_everywhere: whether the case study's own attack searches the other scenes of the test too, as it did there.
    """

    recipes: str
    test_scenes: int | None
    attacked_scenes: int | None
    attack_steps: int
    precision: str = "bfloat16"
    pgd_everywhere: bool = False


def stage(scenes: int, seconds: float) -> dict[str, float]:
    """What a stage took, as it goes on record.

    >>> stage(scenes=10, seconds=2.0)
    {'scenes': 10, 'seconds': 2.0, 'scenes_per_second': 5.0}
    """
    return {"scenes": scenes, "seconds": seconds, "scenes_per_second": scenes / max(seconds, 1e-9)}


def pace(took: dict[str, float]) -> str:
    """The same for people.

    >>> pace(stage(scenes=10, seconds=2.0))
    '2.0 s, 5 scenes a second'
    """
    return f"{took['seconds']:.1f} s, {took['scenes_per_second']:.0f} scenes a second"


class Found(NamedTuple):
    """What a detector finds in scenes, attacked or not; on how many the attack was blind, and how long it took."""

    scenes: list[dict[str, Tensor]]
    blind: int
    seconds: float


class Rated(NamedTuple):
    """A score, and how long it took to rate so many scenes."""

    score: Score
    scenes: int
    seconds: float


def evaluate(model: nn.Module, plan: Plan, test: Split, folder: Path, name: str = "detector") -> dict[str, Any]:
    """Scores of a detector: clean on all scenes; on the first of them under each attack, and under the strongest.

    What is called the strongest is the lowest mAP that any of this leaves: that of the mixture, where each scene is
    under the attack that leaves it the fewest objects, or that of one attack for all. The mixture alone would flatter.
    It has the lowest recall of all by construction, but mAP is a ranking over all scenes: the picture on which fewest
    objects are found need not be the one whose false alarms push the right detections furthest down. Both stand in the
    result, "mixture" and "attacks_map50"; no figure of the same scenes lies below "strongest".

    Args:
        folder: keeps what is found under each attack, so that a later call goes on from there.
        name: of the detector, for the log.
    """
    few = test.part(slice(plan.attacked_scenes))
    every = test if plan.pgd_everywhere else few
    truth = Targets(*(part.cpu() for part in test.targets))  # what is rated beside a search must not wait for it
    searched = Targets(*(part[: len(few.images)] for part in truth))
    with ThreadPoolExecutor(1) as beside:

        def rate(scenes: list[dict[str, Tensor]], targets: Targets) -> Future[Rated]:
            number = len(targets.labels)
            return beside.submit(_rated, lambda: scenes[:number], targets)

        clean = _kept(folder / CLEAN, model, plan, test, None)
        whole, of_attacked = rate(clean.scenes, truth), rate(clean.scenes, searched)
        found = {TRAINING_LOSS: _kept(folder / TRAINING_LOSS, model, plan, every, TRAINING_LOSS)}
        everywhere = rate(found[TRAINING_LOSS].scenes, Targets(*(part[: len(every.images)] for part in truth)))
        rated = {TRAINING_LOSS: rate(found[TRAINING_LOSS].scenes, searched)}
        for attack in ATTACKS:
            found[attack] = _kept(folder / attack, model, plan, few, attack)
            rated[attack] = rate(found[attack].scenes, searched)
        rated["mixture"] = beside.submit(_rated, lambda: _mixture(found, searched), searched)
    ratings = [future.result() for future in (whole, of_attacked, everywhere, *rated.values())]
    stages = {CLEAN: stage(len(test.images), clean.seconds)}
    stages |= {attack: stage(len(one.scenes), one.seconds) for attack, one in found.items()}
    stages |= {BESIDE: stage(sum(one.scenes for one in ratings), sum(one.seconds for one in ratings))}
    for what, took in stages.items():
        logger.info("%s: %s %s", name, what, pace(took))
    scores = {attack: future.result().score for attack, future in rated.items()}
    return {
        "lipschitz_bound": lipschitz_bound(model, (3, PICTURE, PICTURE)).value,
        **_figures(whole.result().score, of_attacked.result().score, everywhere.result().score, scores),
        "detect_scenes_per_second": stages[CLEAN]["scenes_per_second"],
        "attack_scenes_per_second": stages[TRAINING_LOSS]["scenes_per_second"],
        "suppress_scenes_per_second": _suppression(model, few),
        "blind_scenes": {attack: one.blind for attack, one in found.items()},
        "attacked_scenes": len(few.images),
        "pgd_scenes": len(every.images),
        "stages": stages,
        "evaluate_seconds": clean.seconds + sum(one.seconds for one in found.values()),
    }


def _figures(clean: Score, of_attacked: Score, everywhere: Score, scores: dict[str, Score]) -> dict[str, Any]:
    """What the detector scores. All but `clean` and `everywhere` are of the scenes that every attack searched."""
    strongest = min(scores, key=lambda name: scores[name].map50)
    pgd = scores[TRAINING_LOSS]
    return {
        "clean_map50": clean.map50,
        "clean": clean._asdict(),
        "clean_map50_of_attacked_scenes": of_attacked.map50,
        "pgd_map50": pgd.map50,
        "pgd": pgd._asdict(),
        "pgd_everywhere": everywhere._asdict(),
        "attacks_map50": {name: one.map50 for name, one in scores.items() if name != "mixture"},
        "mixture": scores["mixture"]._asdict(),
        "strongest_by": strongest,
        "strongest_map50": scores[strongest].map50,
        "strongest": scores[strongest]._asdict(),
    }


def _rated(found: Callable[[], list[dict[str, Tensor]]], targets: Targets) -> Rated:
    began = time.perf_counter()
    scenes = found()
    return Rated(score(scenes, targets), len(scenes), time.perf_counter() - began)


def _mixture(found: dict[str, Found], targets: Targets) -> list[dict[str, Tensor]]:
    """Of the scenes that every attack searched."""
    return mixture({attack: one.scenes[: len(targets.labels)] for attack, one in found.items()}, targets)


@torch.no_grad()
def _suppression(model: nn.Module, scenes: Split) -> float:
    """How many scenes a second what the model says is turned into detections: measured on the first ones."""
    some = unit_range(scenes.images[: PART["cpu"]])
    output = model(some)
    scores, boxes = model.log_scores(output).exp(), model.boxes(output).clamp(0, 1)
    detect(scores, boxes)
    began = time.perf_counter()
    detect(scores, boxes)  # ends with numbers on the CPU, so a GPU is waited for
    return len(some) / max(time.perf_counter() - began, 1e-9)


def _kept(path: Path, model: nn.Module, plan: Plan, scenes: Split, attack: str | None) -> Found:
    """What an earlier call found, or else what is found now."""
    weights = fingerprint(*model.state_dict().values())
    setting = {"scenes": scenes.hash, "number": len(scenes.images), "plan": asdict(plan), "weights": weights}
    if path.exists():
        known = torch.load(path, map_location="cpu", weights_only=True)
        if known["setting"] != setting:
            raise ValueError(f"{path} belongs to other weights or another study: remove {path.parent}")
        return Found(*known["found"])
    deadline.check(f"{path.name} has not been evaluated")
    found = _found(model, plan, scenes, attack)
    if distributed.rank_and_ranks()[0] == 0:
        with replacing(path) as temporary:
            torch.save({"setting": setting, "found": tuple(found)}, temporary)
    return found


def _found(model: nn.Module, plan: Plan, scenes: Split, attack: str | None) -> Found:
    """What the model finds in scenes, on the CPU; processes share the scenes, and all return what is found in all."""
    began = time.perf_counter()
    rank, ranks = distributed.rank_and_ranks()
    size = PART[scenes.images.device.type]
    own: dict[int, list[dict[str, Tensor]]] = {}  # by the first scene of a part
    blind = 0
    for start in range(rank * size, len(scenes.images), ranks * size):
        if ranks == 1:  # several agree on it before each attack only
            deadline.check(f"stopped in {attack or CLEAN}, at scene {start} of {len(scenes.images)}")
        own[start], unseen = _found_in(model, plan, scenes.part(slice(start, start + size)), attack)
        blind += unseen
    if ranks > 1:  # to pickle one scene's part of a column is to pickle the column
        own = {start: [{k: v.clone() for k, v in scene.items()} for scene in part] for start, part in own.items()}
    every: dict[int, list[dict[str, Tensor]]] = {}
    for share in distributed.gathered(own):
        every |= share
    in_order = [scene for start in sorted(every) for scene in every[start]]
    return Found(in_order, sum(distributed.gathered(blind)), time.perf_counter() - began)


def _found_in(model: nn.Module, plan: Plan, part: Split, attack: str | None) -> tuple[list[dict[str, Tensor]], int]:
    """What the model finds in scenes taken at once, or in halves of them where the memory of a GPU does not hold all;
    and on how many the attack was blind."""
    half = len(part.images) // 2
    try:
        images, blind = unit_range(part.images), 0
        if attack is not None:
            images, blind = _searched(model, plan, images, part.targets, attack)
        return on_cpu(detections(model, images, batch_size=len(images))), blind
    except torch.OutOfMemoryError:
        if half == 0:
            raise
    torch.cuda.empty_cache()
    halves = [_found_in(model, plan, part.part(where), attack) for where in (slice(half), slice(half, None))]
    return [scene for found, _ in halves for scene in found], sum(blind for _, blind in halves)


def _searched(model: nn.Module, plan: Plan, images: Tensor, targets: Targets, attack: str) -> tuple[Tensor, int]:
    """Attacked pictures. The search may be rough; what it finds lies in the ball to float32, and is scored in it."""
    precision = getattr(torch, plan.precision)
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return attacked(model, images, targets, EPSILON, attack, plan.attack_steps)

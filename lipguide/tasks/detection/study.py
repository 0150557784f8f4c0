"""The case study, whole: train each configuration, evaluate it clean and attacked, and put all on record.

`python -m lipguide study` runs it, under `torchrun` on several devices. A configuration leaves a checkpoint while it
trains, its weights when it is trained, what it detects under each attack, and in the end a file of results. So a study
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipguide import deadline, distributed
from lipguide.bounds.network import lipschitz_bound
from lipguide.data import folder_of
from lipguide.files import replacing, write_json
from lipguide.provenance import provenance
from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attacked, most_harmful
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.recipes import DATA, build
from lipguide.tasks.detection.scores import Score, detections, score
from lipguide.tasks.detection.tinier_ssd import PICTURE
from lipguide.tasks.harness import ensure, recipe_of, trained
from lipguide.tasks.weights import TEST_SEED, fingerprint

__all__ = ["CONFIGURATIONS", "EPSILON", "PLANS", "Plan", "entry_of", "evaluate", "study", "weights_of"]

logger = logging.getLogger(__name__)
EPSILON = 0.5  # the case study's
CLEAN = "clean"
PART = 128  # scenes that a process takes at a time
# The configurations, in the order of the study, and the networks of their recipes.
CONFIGURATIONS = {
    "naive": "naive",
    "spectral-norm": "spectral-norm",
    "standard conv": "standard-conv",
    "L2-normalised": "l2-normalised",
}


@dataclass(frozen=True)
class Plan:
    """How much is evaluated, and in which precision an attack searches; how much is trained, the recipes say.

    Args:
        recipes: what the names of its recipes end in.
        test_scenes: how many pictures the scenes of the test are cut from. None: all.
        attacked_scenes: how many of the scenes are attacked. None: all.
    """

    recipes: str
    test_scenes: int | None
    attacked_scenes: int | None
    attack_steps: int
    precision: str = "bfloat16"


PLANS = {
    "quick": Plan("-quick", 64, 16, 3, "float32"),
    "cpu": Plan("", None, 500, 20),
    "full": Plan("-full", None, None, 20),
}


def weights_of(configuration: str, plan: str = "cpu", data: str = "house-numbers") -> str:
    """The name of the recipe of a configuration, and of the weights that it makes.

    >>> weights_of("standard conv"), weights_of("naive", "full", "svhn")
    ('tinier-ssd-standard-conv', 'tinier-ssd-naive-full-svhn')
    """
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"no configuration {configuration!r}; there are: {', '.join(CONFIGURATIONS)}")
    if plan not in PLANS:
        raise ValueError(f"no plan {plan!r}; there are: {', '.join(PLANS)}")
    if data not in DATA:
        raise ValueError(f"no data {data!r}; there are: {', '.join(DATA)}")
    origin = "" if data == "house-numbers" else f"-{data}"
    return f"tinier-ssd-{CONFIGURATIONS[configuration]}{PLANS[plan].recipes}{origin}"


def entry_of(entries: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The entry of a configuration, wherever it stands.

    >>> entry_of([{"name": "naive", "loss": 3.0}, {"name": "spectral-norm", "loss": 5.0}], "spectral-norm")["loss"]
    5.0
    """
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise ValueError(f"no entry of {name!r}; there are: {', '.join(entry['name'] for entry in entries) or 'none'}")


def study(
    plan: str,
    folder: str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    only: Sequence[str] = tuple(CONFIGURATIONS),
    data: str = "house-numbers",
) -> list[dict[str, Any]]:
    """Train and evaluate the configurations `only`, and return one entry for each, in the order of the study.

    Under `torchrun` every process calls this with the same arguments; all return the same. An entry's `run` says on
    what, until when and for how long it ran; it stays with the entry when a later call reads it again. Progress goes to
    the logger "lipguide".

    On several CUDA devices batch norm goes over the whole batch. torch has no such batch norm for processes on the CPU:
    there each normalises its own share, so that *naive* comes out differently on one and on two of them. The other
    configurations have no batch norm and do not.

    Args:
        plan: "quick" (a minute), "cpu" (hours) or "full" (a GPU).
        folder: holds weights, results and what is needed to go on; results of other recipes or scenes there are an
            error. None for study/PLAN.
        device: "auto", "cpu" or "cuda".
        seed: of the weights at first and of the batches. The scenes that judge have one of their own.
        data: "house-numbers", or "svhn" for the real ones in data/svhn.
    """
    weights = {name: weights_of(name, plan, data) for name in only}
    folder = Path("study", plan) if folder is None else Path(folder)
    where = distributed.start(device)
    with distributed.first_rank_first():
        svhn = folder_of("svhn") if data == "svhn" else None
        test = load_split("test", PLANS[plan].test_scenes, TEST_SEED, where, svhn)
    names = [name for name in CONFIGURATIONS if name in weights]
    return [_one(name, weights[name], PLANS[plan], test, folder, where, seed) for name in names]


def _one(
    name: str, weights: str, plan: Plan, test: Split, folder: Path, device: torch.device, seed: int
) -> dict[str, Any]:
    """The entry of one configuration: read, or trained, attacked and scored now."""
    _, recipe = recipe_of(weights)
    setting = {"recipe": asdict(recipe), "seed": seed, "plan": asdict(plan), "epsilon": EPSILON, "test": test.hash}
    record = folder / f"{weights}.json"
    if record.exists():
        return _read(record, setting)
    path = ensure(weights, device.type, seed, folder)
    model, made = trained(weights, device, path.parent)
    entry = {"name": name, "parameters": sum(p.numel() for p in build(recipe).parameters())}
    unfinished = folder / f".{weights}.attacked"
    entry |= evaluate(model.to(memory_format=torch.channels_last), plan, test, unfinished)
    entry |= _training(made, recipe.batch_size)
    entry["test"] = {"name": test.name, "hash": test.hash, "seed": TEST_SEED}
    entry["run"] = _run(made, entry, device, seed)
    logger.info("%s: clean %.2f, PGD %.2f mAP", name, entry["clean_map50"], entry["pgd_map50"])
    if distributed.rank_and_ranks()[0] == 0:
        write_json(record, {"setting": setting, "entry": entry})
        shutil.rmtree(unfinished)
    return entry


def _read(record: Path, setting: dict[str, Any]) -> dict[str, Any]:
    known = json.loads(record.read_text(encoding="utf-8"))
    if known["setting"] != setting:
        raise ValueError(f"{record} belongs to another study ({known['setting']}): remove it or name another folder")
    return known["entry"]


def _training(made: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """What the file of weights says about the training."""
    steps, seconds = made["steps"], made["seconds"]
    return {
        "steps": steps,
        "loss": made["loss"][-1][1],
        "train_seconds": seconds,
        "train_scenes_per_second": steps * batch_size / max(seconds, 1e-9),
    }


def _run(made: dict[str, Any], entry: dict[str, Any], device: torch.device, seed: int) -> dict[str, Any]:
    """By what, on what, until when and for how long a configuration was trained and evaluated."""
    evaluated = provenance(device, seed, ("book/results", "lipguide/weights"))
    return {
        **{key: made[key] for key in ("commit", "lock", "device", "data")},
        "evaluated": {key: evaluated[key] for key in ("commit", "lock", "device")},
        "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": entry["train_seconds"] + entry["evaluate_seconds"],
    }


class Found(NamedTuple):
    """What a detector finds in scenes, attacked or not; on how many the attack was blind, and how long it took."""

    scenes: list[dict[str, Tensor]]
    blind: int
    seconds: float


def evaluate(model: nn.Module, plan: Plan, test: Split, folder: Path) -> dict[str, Any]:
    """Scores of a detector: clean on all scenes; on the first of them under each attack, and under the strongest.

    The strongest is the one that does most harm for each scene, or one attack for all where that leaves a lower mAP:
    the picture on which fewest objects are found need not be the one that costs most precision.

    Args:
        folder: keeps what is found under each attack, so that a later call goes on from there.
    """
    few = test.part(slice(plan.attacked_scenes))
    clean = _kept(folder / CLEAN, model, plan, test, None)
    found = {name: _kept(folder / name, model, plan, few, name) for name in (TRAINING_LOSS, *ATTACKS)}
    scores = {name: score(one.scenes, few.targets) for name, one in found.items()}
    whole = score(clean.scenes, test.targets)
    of_attacked = score(clean.scenes[: len(few.images)], few.targets)
    worst = min(_mixture(found, few.targets), *scores.values(), key=lambda one: one.map50)
    pgd, seconds = scores[TRAINING_LOSS], found[TRAINING_LOSS].seconds
    return {
        "lipschitz_bound": lipschitz_bound(model, (3, PICTURE, PICTURE)).value,
        "clean_map50": whole.map50,
        "clean": whole._asdict(),
        "detect_scenes_per_second": len(test.images) / clean.seconds,
        "clean_map50_of_attacked_scenes": of_attacked.map50,
        "pgd_map50": pgd.map50,
        "pgd": pgd._asdict(),
        "attack_scenes_per_second": len(few.images) / seconds,
        "attacks_map50": {name: one.map50 for name, one in scores.items()},
        "blind_scenes": {name: one.blind for name, one in found.items()},
        "strongest_map50": worst.map50,
        "strongest": worst._asdict(),
        "attacked_scenes": len(few.images),
        "evaluate_seconds": clean.seconds + sum(one.seconds for one in found.values()),
    }


def _mixture(found: dict[str, Found], targets: Targets) -> Score:
    """The score where each scene is under the attack that does it most harm."""
    attacks = [one.scenes for one in found.values()]
    worst = most_harmful({name: one.scenes for name, one in found.items()}, targets)
    return score([attacks[attack][scene] for scene, attack in enumerate(worst)], targets)


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
    own: dict[int, list[dict[str, Tensor]]] = {}  # by the first scene of a part
    blind = 0
    for start in range(rank * PART, len(scenes.images), ranks * PART):
        if ranks == 1:  # several agree on it before each attack only
            deadline.check(f"stopped in {attack or CLEAN}, at scene {start} of {len(scenes.images)}")
        part = scenes.part(slice(start, start + PART))
        images = unit_range(part.images)
        if attack is not None:
            images, unseen = _searched(model, plan, images, part.targets, attack)
            blind += unseen
        found = detections(model, images)
        own[start] = [{key: value.cpu() for key, value in scene.items()} for scene in found]
    every: dict[int, list[dict[str, Tensor]]] = {}
    for share in distributed.gathered(own):
        every |= share
    in_order = [scene for start in sorted(every) for scene in every[start]]
    return Found(in_order, sum(distributed.gathered(blind)), time.perf_counter() - began)


def _searched(model: nn.Module, plan: Plan, images: Tensor, targets: Targets, attack: str) -> tuple[Tensor, int]:
    """Attacked pictures. The search may be rough; what it finds lies in the ball to float32, and is scored in it."""
    precision = getattr(torch, plan.precision)
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return attacked(model, images, targets, EPSILON, attack, plan.attack_steps)

"""The case study, whole: train each configuration, evaluate it clean and attacked, and put all on record.

`python -m lipguide study` runs it, under `torchrun` on several devices. A configuration leaves a checkpoint while it
trains, its weights when it is trained, what it detects under each attack, and in the end a file of results. So a study
that was interrupted goes on where it stopped.

Each stage says what it took, and in the end a table says where the time went: `budget`.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lipguide import distributed
from lipguide.data import folder_of
from lipguide.files import write_json
from lipguide.provenance import provenance
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.evaluation import BESIDE, EPSILON, Plan, evaluate, pace, stage
from lipguide.tasks.detection.recipes import DATA, build, load
from lipguide.tasks.harness import ensure, recipe_of, trained
from lipguide.tasks.weights import TEST_SEED, TRAIN_SEED

__all__ = ["CONFIGURATIONS", "EPSILON", "PLANS", "Plan", "budget", "entry_of", "evaluate", "one", "study", "weights_of"]

logger = logging.getLogger(__name__)
# The configurations, in the order of the study, and the networks of their recipes.
CONFIGURATIONS = {
    "naive": "naive",
    "spectral-norm": "spectral-norm",
    "standard conv": "standard-conv",
    "L2-normalised": "l2-normalised",
}


PLANS = {
    "quick": Plan("-quick", 64, 16, 3, "float32"),
    "cpu": Plan("", None, 500, 20),
    "full": Plan("-full", None, 2000, 20, pgd_everywhere=True),
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
    names = [name for name in CONFIGURATIONS if name in weights]
    began = time.perf_counter()
    with distributed.first_rank_first():
        svhn = folder_of("svhn") if data == "svhn" else None
        test = load_split("test", PLANS[plan].test_scenes, TEST_SEED, where, svhn)
        for name in names:  # all but the first find them where `load` keeps them
            if not (folder / f"{weights[name]}.safetensors").exists():
                load(recipe_of(weights[name])[1], "train", TRAIN_SEED)
    seconds = time.perf_counter() - began
    logger.info("data: %.1f s, %s", seconds, test.name)
    entries = [one(name, weights[name], PLANS[plan], test, folder, where, seed, seconds) for name in names]
    logger.info("%s", budget(entries, seconds))
    return entries


def budget(entries: Sequence[dict[str, Any]], data_seconds: float) -> str:
    """A table of the seconds that each stage took, for each configuration and in all, for people. What was rated beside
    a search costs no time of its own, and is not counted in all.

    >>> one = {"name": "naive", "stages": {"training": {"seconds": 61.0}, "clean": {"seconds": 2.5}}}
    >>> print(budget([one], 10.0))
    stage            seconds  naive
    data                10.0
    training            61.0   61.0
    clean                2.5    2.5
    all                 73.5
    """
    names = [entry["name"] for entry in entries]
    lines = [f"{'stage':<16}{'seconds':>8}  " + "  ".join(names), f"{'data':<16}{data_seconds:>8.1f}"]
    total = data_seconds
    for what in dict.fromkeys(what for entry in entries for what in entry["stages"]):
        own = [entry["stages"].get(what, {"seconds": 0.0})["seconds"] for entry in entries]
        cells = (f"{seconds:>{max(len(name), 5)}.1f}" for name, seconds in zip(names, own, strict=True))
        lines.append(f"{what:<16}{sum(own):>8.1f}  " + "  ".join(cells))
        total += sum(own) if what != BESIDE else 0.0
    return "\n".join([*lines, f"{'all':<16}{total:>8.1f}"])


def one(
    name: str,
    weights: str,
    plan: Plan,
    test: Split,
    folder: Path,
    device: torch.device,
    seed: int,
    data_seconds: float,
) -> dict[str, Any]:
    """The entry of one detector: read, or trained, attacked and scored now.

    Args:
        name: of the entry.
        weights: the name of its recipe.
        folder: holds weights, results and what is needed to go on.
        data_seconds: that the scenes took.
    """
    _, recipe = recipe_of(weights)
    setting = {"recipe": asdict(recipe), "seed": seed, "plan": asdict(plan), "epsilon": EPSILON, "test": test.hash}
    record = folder / f"{weights}.json"
    if record.exists():
        return _read(record, setting)
    path = ensure(weights, device.type, seed, folder)
    model, made = trained(weights, device, path.parent)
    entry = {"name": name, "parameters": sum(p.numel() for p in build(recipe).parameters())}
    unfinished = folder / f".{weights}.attacked"
    training = _training(made, recipe.batch_size)
    logger.info("%s: training %s", name, pace(training["stages"]["training"]))
    found = evaluate(model.to(memory_format=torch.channels_last), plan, test, unfinished, name)
    entry |= training | found | {"stages": training["stages"] | found["stages"]}
    entry["peak_memory_mib"] = _peak(device)
    entry["data_seconds"] = data_seconds
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
        "learning_curve": made["loss"],
        "train_seconds": seconds,
        "train_scenes_per_second": steps * batch_size / max(seconds, 1e-9),
        "stages": {"training": stage(steps * batch_size, seconds) | {"steps_per_second": steps / max(seconds, 1e-9)}},
    }


def _peak(device: torch.device) -> int | None:
    """The most memory of a GPU that the process has held, in MiB; that of a process on a CPU the ledger knows."""
    return round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None


def _run(made: dict[str, Any], entry: dict[str, Any], device: torch.device, seed: int) -> dict[str, Any]:
    """By what, on what, until when and for how long a configuration was trained and evaluated."""
    evaluated = provenance(device, seed, ("book/results", "lipguide/weights"))
    return {
        **{key: made[key] for key in ("commit", "lock", "device", "data")},
        "evaluated": {key: evaluated[key] for key in ("commit", "lock", "device")},
        "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": entry["train_seconds"] + entry["evaluate_seconds"],
    }

"""`python -m lipguide train NAME …`: makes the weights that ship with the package, each by one command.

Every task has a dictionary `TRAININGS`: the name of a file of weights, and the function that trains them,

    train(steps: int | None, device: torch.device, seed: int) -> (model, run)

with `steps=None` for as many as the recipe asks. `run` says what was trained on what ("steps", "data", accuracies); the
commit, the device, the seed and the seconds are added here. Progress goes to the logger "lipguide".
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipguide import distributed
from lipguide.data.svhn.download import DownloadError
from lipguide.provenance import provenance
from lipguide.tasks.weights import WEIGHTS, run_of, save

__all__ = ["FULL", "TASKS", "Training", "add_arguments", "ensure", "train", "trainings"]

Training = Callable[[int | None, torch.device, int], tuple[nn.Module, dict[str, Any]]]
FULL = Path("study", "full")  # where networks in the size for a GPU go, seen from the checkout
# The module that holds each task's dictionary.
TASKS = {
    "classification": "lipguide.tasks.classification.recipes",
    "segmentation": "lipguide.tasks.segmentation.recipes",
    "detection": "lipguide.tasks.detection.recipes",
}


def trainings(task: str) -> Mapping[str, Training]:
    """The recipes of a task, by the name of the weights that they make.

    >>> "classification-vgg" in trainings("classification")
    True
    """
    return import_module(TASKS[task]).TRAININGS


def train(name: str, steps: int | None, device: str, seed: int, folder: str | Path | None = None) -> Path:
    """Train `name` by its recipe, write its weights with the run that made them, and return the file's path.

    Args:
        name: such as "classification-vgg"; what stands before the hyphen is the task.
        steps: updates, or None for as many as the recipe asks.
        device: "auto", "cpu" or "cuda".
        seed: of the weights at first and of the batches.
        folder: that the file goes into; None for that of the weights that ship, or `FULL` for those that do not.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: training takes one step or more")
    task = name.split("-")[0]
    recipes = trainings(task) if task in TASKS else {}
    if name not in recipes:
        known = recipes or {recipe for other in TASKS for recipe in trainings(other)}
        raise ValueError(f"no training {name!r}; there are: {', '.join(sorted(known))}")
    if folder is None:
        folder = FULL if name.endswith("-full") else WEIGHTS
    where = distributed.start(device)
    made_by = provenance(where.type, seed, ignoring=["book/results", "lipguide/weights"])
    began = time.perf_counter()
    model, run = recipes[name](steps, where, seed)
    return save(name, model, run | made_by | {"seconds": round(time.perf_counter() - began, 1)}, folder)


def ensure(name: str, device: str, seed: int, folder: str | Path) -> Path:
    """The file of weights `name` in a folder: what an earlier run of this recipe left there, or else trained now.

    This is how the profile "full" trains: interrupted, it goes on with the first network that is missing.

    Args:
        name, device, seed, folder: as `train` takes them.
    """
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        return train(name, None, device, seed, folder)
    recipe = import_module(TASKS[name.split("-")[0]]).RECIPES[name]
    if (made := run_of(path)["recipe"]) != json.loads(json.dumps(asdict(recipe))):
        raise ValueError(f"{path} was made by another recipe, {made}: move it away to train by this one, {recipe}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register what `python -m lipguide train` takes; sets `run`, a function that returns the exit status.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["classification-vgg", "classification-sll", "--steps", "3"]).names
    ['classification-vgg', 'classification-sll']
    """
    parser.add_argument("names", nargs="+", metavar="NAME", help="the weights to make, such as classification-vgg")
    parser.add_argument("--steps", type=int, help="updates (default: as many as the recipe asks)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help=f"where the file goes (default: into the package, or {FULL} for NAME-full)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    progress = logging.StreamHandler(sys.stdout)
    logger = logging.getLogger("lipguide")
    logger.addHandler(progress)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for name in options.names:
            path = train(name, options.steps, options.device, options.seed, options.folder)
            sys.stdout.write(f"{path}\n")
    except KeyboardInterrupt:
        sys.stderr.write("python -m lipguide train: interrupted; unfinished weights were not written\n")
        return 130
    except (DownloadError, FloatingPointError, RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"python -m lipguide train: {error}\n")
        return 1
    finally:
        logger.removeHandler(progress)
        logger.setLevel(level)
    return 0

"""One harness for the recipes of all tasks: trains them, resumes, measures and writes the weights with their run.

A training leaves a folder `.NAME.unfinished` beside the file that it makes, with the checkpoint of `fit`; the same
call goes on from there to the very weights of a training that was never interrupted, and the folder goes when the
weights are there. Under `torchrun` all processes call `train`, and the first one writes.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipguide import deadline, distributed
from lipguide.files import write_json
from lipguide.layers.export import to_be_loaded, without_parametrizations
from lipguide.provenance import provenance
from lipguide.tasks.task import Recipe, Task, as_json
from lipguide.tasks.weights import TEST_SEED, TRAIN_SEED, WEIGHTS, halved, load, made_as, save
from lipguide.training import adam, fit

__all__ = ["FULL", "TASKS", "ensure", "network_of", "recipe_of", "train", "train_by", "trained"]

logger = logging.getLogger(__name__)
FULL = Path("study", "full")  # where weights that do not ship go, seen from the checkout
# Let a GPU record the steps of trainings (`lipguide.training.fit`); asked for, until it has been seen on one.
RECORDED = "LIPGUIDE_RECORDED" in os.environ
PRODUCTS = ("book/results", "lipguide/weights")  # what runs write says nothing about the code that ran


class _Tasks(Mapping[str, Task]):
    """The tasks by their names, each imported when it is asked for."""

    def __init__(self, rooms: dict[str, str]) -> None:
        self._rooms = rooms

    def __getitem__(self, name: str) -> Task:
        return import_module(self._rooms[name]).TASK

    def __iter__(self) -> Iterator[str]:
        return iter(self._rooms)

    def __len__(self) -> int:
        return len(self._rooms)


TASKS: Mapping[str, Task] = _Tasks(
    {
        "classification": "lipguide.tasks.classification.recipes",
        "segmentation": "lipguide.tasks.segmentation.recipes",
        "detection": "lipguide.tasks.detection.recipes",
    }
)


def recipe_of(name: str) -> tuple[Task, Recipe]:
    """The recipe that makes the weights `name`, and its task.

    >>> recipe_of("classification-vgg")[1].network
    'vgg'
    """
    known: list[str] = []
    for task in TASKS.values():
        recipe = task.recipe(name)
        if recipe is not None:
            return task, recipe
        known += [*task.recipes, *task.more]
    near = difflib.get_close_matches(name, known, 5, cutoff=0.0)
    raise ValueError(f"no weights {name!r} among the {len(known)} that there are; the nearest names: {', '.join(near)}")


def network_of(name: str) -> nn.Module:
    """The untrained network that the weights `name` belong to, in eval mode and with plain weights.

    >>> len(network_of("classification-vgg"))
    17
    """
    task, recipe = recipe_of(name)
    return to_be_loaded(task.network(recipe).eval())


def trained(
    name: str, device: str | torch.device = "cpu", folder: str | Path = WEIGHTS
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with its weights, fixed and in eval mode, and the run that made them.

    Args:
        name: of the weights, such as "segmentation-unet".
        folder: that the file lies in; by default that of the weights that ship.

    >>> model, run = trained("classification-vgg")
    >>> model.training, run["steps"]
    (False, 10000)
    """
    model = network_of(name)
    run = load(name, model, folder)
    return without_parametrizations(model).requires_grad_(False).to(device), run


def ensure(name: str, device: str = "auto", seed: int = 0, folder: str | Path | None = None) -> Path:
    """The file of weights `name`: what an earlier run of this recipe left in the folder, or else trained now.

    This is how the profile "full" trains: interrupted, it goes on where it stopped.

    Args:
        name, device, seed, folder: as `train` takes them.
    """
    task, recipe = recipe_of(name)
    path = _path(task, name, folder)
    wanted = {"recipe": as_json(recipe), "steps": recipe.steps, "seed": seed}
    return path if made_as(path, wanted) else train(name, None, device, seed, folder)


def train(
    name: str, steps: int | None = None, device: str = "auto", seed: int = 0, folder: str | Path | None = None
) -> Path:
    """Train by a recipe, write the weights with the run that made them, and return the file's path.

    A training that was interrupted goes on where it stopped, also one that `lipguide.deadline` has stopped. Progress
    goes to the logger "lipguide".

    Args:
        name: of the weights, such as "classification-vgg".
        steps: updates, or None for as many as the recipe asks.
        device: "auto", "cpu" or "cuda".
        seed: of the weights at first and of the batches.
        folder: that the file goes into; None for that of the weights that ship, or `FULL` for those that do not.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: training takes one step or more")
    task, recipe = recipe_of(name)
    path = _path(task, name, folder)
    unfinished = path.with_name(f".{name}.unfinished")
    where = distributed.start(device)
    deadline.check(f"{name} has not been begun")
    if distributed.rank_and_ranks()[0] == 0:
        with _alone(unfinished, name):
            made_by = _made_by(unfinished, provenance(where, seed, PRODUCTS))
            model, run = train_by(task, recipe, where, seed, steps, unfinished / "checkpoint")
            save(name, model, run | made_by, path.parent)
    else:
        train_by(task, recipe, where, seed, steps, unfinished / "checkpoint")
    distributed.gathered(name)  # nobody goes on before the file is there
    return path


def train_by(
    task: Task,
    recipe: Recipe,
    device: torch.device,
    seed: int = 0,
    steps: int | None = None,
    checkpoint: Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a network by a recipe, with Adam and one cycle of the rate, and measure it; return it and the run so far.

    The network is in eval mode and every constrained weight is replaced by its value: what is certified is the very
    tensor that runs.

    Args:
        steps: updates, or None for as many as the recipe asks.
        checkpoint: as `lipguide.training.fit` takes it.
    """
    steps = recipe.steps if steps is None else steps
    with distributed.first_rank_first():
        data = task.data(recipe, "train", TRAIN_SEED)
    torch.manual_seed(seed)
    model = task.network(recipe).to(device)
    if task.begin is not None:
        task.begin(model, recipe)
    step = task.step(model, recipe, data)
    _, ranks = distributed.rank_and_ranks()
    if ranks > 1 and device.type == "cuda":  # torch has no batch norm over several processes on the CPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    history = fit(
        model,
        data.columns,
        step,
        adam(model, recipe.rate),
        steps,
        recipe.batch_size,
        "one-cycle",
        task.precision_of(recipe),
        seed=seed,
        checkpoint=checkpoint,
        recorded=RECORDED and getattr(step, "steady", False),
    )
    plain = to_be_loaded(task.network(recipe))
    plain.load_state_dict(without_parametrizations(model).state_dict())
    plain = halved(plain) if recipe.ordinary else plain
    plain.to(device)
    run = {
        "steps": steps,
        "recipe": as_json(recipe),
        "loss": [[record["step"], round(record["loss"], 5)] for record in history],
        "data": data.facts,
        "seconds": round(_seconds(history, recipe.batch_size), 3),
        "processes": ranks,
    }
    return plain, run | _measured(task, recipe, plain)


def _path(task: Task, name: str, folder: str | Path | None) -> Path:
    if folder is None:
        folder = WEIGHTS if name in task.recipes else FULL
    return Path(folder) / f"{name}.safetensors"


def _seconds(history: list[dict[str, float]], batch_size: int) -> float:
    """What the steps took, also where the training was interrupted in between."""
    seconds, before = 0.0, 0
    for record in history:
        seconds += (record["step"] - before) * batch_size / record["samples_per_second"]
        before = record["step"]
    return seconds


def _measured(task: Task, recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """The scores of a network. Every task is judged on data of a seed on which nothing was chosen."""
    with distributed.first_rank_first():
        data = task.data(recipe, "test", TEST_SEED)
    return {"test": data.facts} | task.measure(model, recipe, data)


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Keep the folder of an unfinished training for this process; it goes if the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    held = False
    with open(folder / "lock", "w") as lock:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock.fileno()).st_nlink > 0  # the other process may have removed it with the folder
        if not held:
            raise ValueError(
                f"another process is training {name} in {folder.parent}: wait for it, or name another folder"
            )
        try:
            yield
        except BaseException as error:
            if not (folder / "checkpoint").exists():  # nothing to go on from
                shutil.rmtree(folder)
            if isinstance(error, deadline.OutOfTime):
                raise deadline.OutOfTime(f"{name} {error}") from None
            raise
        shutil.rmtree(folder)


def _made_by(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What the training was begun by and, where it was interrupted, what it was continued by."""
    path = folder / "made-by.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if (folder / "checkpoint").exists() else []
    write_json(path, [*earlier, now])
    begun, *continued = [*earlier, now]
    return begun | ({"continued": continued} if continued else {})

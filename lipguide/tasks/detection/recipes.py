"""The trainings behind the FCOS weights that ship (`python -m lipguide train detection-fcos …`).

All networks see the same scenes in the same order. The first 1-Lipschitz one learns from scratch; those at other
temperatures go on from it, so that what differs between them is the temperature.

The recipes that end in "-full" are for a GPU: what the chapter trains in the profile "full", on all scenes. There each
network learns from scratch, so those at other temperatures do not depend on the first. Their weights do not ship.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.sll import SLL
from lipguide.tasks import task
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.fcos import FCOS, fcos, ordinary_fcos
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.tinier_ssd import PICTURE
from lipguide.tasks.harness import trained

__all__ = ["LARGE", "RECIPES", "TASK", "Recipe", "build", "load", "measure"]


@dataclass(frozen=True)
class Recipe(task.Recipe):
    """What is trained on what, and for how long."""

    batch_size: int = 32
    rate: float = 8e-3
    width: int = 24
    tau: float = 20.0  # of the 1-Lipschitz networks
    start: str | None = None  # the weights to go on from
    items: int | None = 7000  # None: all
    test_items: int | None = 400


def build(recipe: Recipe) -> FCOS:
    """The untrained network of a recipe.

    >>> build(Recipe("fcos", steps=1, width=4, tau=5.0)).tau
    5.0
    """
    if recipe.network == "fcos":
        return fcos(recipe.width, tau=recipe.tau)
    if recipe.network == "ordinary-fcos":
        return ordinary_fcos(recipe.width)
    raise ValueError(f"no network {recipe.network!r}; there are fcos and ordinary-fcos")


def load(recipe: Recipe, split: str, seed: int) -> task.Data:
    """The scenes that a recipe trains or tests on."""
    items = recipe.items if split == "train" else recipe.test_items
    scenes = load_split(split, items, seed, torch.device("cpu"))
    return task.Data(scenes.name, (scenes.images, *scenes.targets), scenes.hash)


def step(model: FCOS, recipe: Recipe, data: task.Data) -> DetectionStep:
    """The training step of a recipe."""
    return DetectionStep(model.training_loss())


def begin(model: FCOS, recipe: Recipe) -> None:
    """Give a network the weights that its recipe goes on from, and the memory format that trains fastest."""
    model.to(memory_format=torch.channels_last)
    if recipe.start is not None:
        _take_over(model, trained(recipe.start, next(model.parameters()).device)[0])


@torch.no_grad()
def _take_over(model: nn.Module, plain: nn.Module) -> None:
    """Give a model with constraints the values of one without; what satisfies a constraint stays nearly as it is."""
    modules = dict(model.named_modules())
    for name, value in plain.state_dict().items():
        parent, _, last = name.rpartition(".")
        if isinstance(modules[parent], SLL) and last == "weight":
            modules[parent].parametrizations.weight.original.copy_(value)
        elif parametrize.is_parametrized(modules[parent], last):
            setattr(modules[parent], last, value)  # torch asks the constraint what to keep
        else:
            getattr(modules[parent], last).copy_(value)


@torch.no_grad()
def measure(model: FCOS, recipe: Recipe, data: task.Data) -> dict[str, Any]:
    """The score on scenes and, for a 1-Lipschitz network, the bound of its trunk."""
    device = next(model.parameters()).device
    images, boxes, labels = (column.to(device) for column in data.columns)
    found = detections(model, unit_range(images))
    scores = score(found, Targets(boxes, labels))
    facts: dict[str, Any] = {"score": {name: round(value, 3) for name, value in scores._asdict().items()}}
    if recipe.lipschitz:
        facts["trunk"] = lipschitz_bound(model.trunk, (3, PICTURE, PICTURE)).value
    return facts


RECIPES = {
    "detection-fcos": Recipe("fcos", steps=3000),
    **{
        f"detection-fcos-tau-{tau}": Recipe("fcos", steps=1000, rate=5e-3, tau=float(tau), start="detection-fcos")
        for tau in (5, 20, 80)
    },
    "detection-ordinary-fcos": Recipe("ordinary-fcos", steps=800, rate=1e-2),
}
# About 50 epochs. Not run for this book, for want of a GPU: the rates are those of the runs above, nothing is tuned.
_FULL = Recipe("fcos", steps=12_000, batch_size=128, width=96, items=None, test_items=None)
LARGE = {
    "detection-fcos-full": _FULL,
    **{f"detection-fcos-tau-{tau}-full": replace(_FULL, tau=float(tau)) for tau in (5, 80)},  # the first one has 20
    "detection-ordinary-fcos-full": replace(_FULL, network="ordinary-fcos", steps=6000, rate=1e-2),
}
TASK = task.Task(RECIPES, build, load, step, measure, LARGE, begin, torch.bfloat16)

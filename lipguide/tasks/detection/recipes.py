"""The trainings behind the FCOS weights that ship (`python -m lipguide train detection-fcos …`).

All networks see the same scenes in the same order. The first 1-Lipschitz one learns from scratch; those at other
temperatures go on from it, so that what differs between them is the temperature.

The recipes that end in "-full" are for a GPU: what the chapter trains in the profile "full", on all scenes. There each
network learns from scratch, so those at other temperatures do not depend on the first. Their weights do not ship.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lipguide.bounds.network import lipschitz_bound
from lipguide.export import without_parametrizations
from lipguide.layers.sll import SLL
from lipguide.tasks import weights as pretrained
from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.fcos import FCOS, fcos, ordinary_fcos
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.study import load_split
from lipguide.tasks.detection.tinier_ssd import PICTURE

__all__ = ["RECIPES", "TRAININGS", "Recipe", "build", "measured", "network_of", "train", "trained"]


@dataclass(frozen=True)
class Recipe(pretrained.Schedule):
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


def train(recipe: Recipe, steps: int | None, device: torch.device, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train by a recipe and return the network, in eval mode with plain weights, and the facts of the run.

    >>> short = Recipe("fcos", steps=2, batch_size=4, width=4, items=12, test_items=4)
    >>> model, run = train(short, None, torch.device("cpu"), seed=0)
    >>> run["steps"], run["recipe"]["network"]
    (2, 'fcos')
    """
    split = load_split("train", recipe.items, 0, device)
    torch.manual_seed(seed)
    model = build(recipe).to(device, memory_format=torch.channels_last)
    if recipe.start is not None:
        _take_over(model, trained(recipe.start, device)[0])
    step, columns = DetectionStep(model.training_loss()), (split.images, *split.targets)
    model, run = pretrained.train(recipe, model, columns, step, steps, seed, torch.bfloat16)
    run["data"] = {"name": split.name, "hash": split.hash}
    return model, run | measured(model, recipe)


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
def measured(model: FCOS, recipe: Recipe) -> dict[str, Any]:
    """The score on the test scenes and, for a 1-Lipschitz network, the bound of its trunk."""
    split = load_split("test", recipe.test_items, 0, next(model.parameters()).device)
    facts: dict[str, Any] = {"test": {"name": split.name, "hash": split.hash}}
    found = detections(model, unit_range(split.images))
    facts["score"] = {name: round(value, 3) for name, value in score(found, split.targets)._asdict().items()}
    if recipe.lipschitz:
        facts["trunk"] = lipschitz_bound(model.trunk.eval(), (3, PICTURE, PICTURE)).value
    return facts


def network_of(name: str) -> FCOS:
    """The untrained network, with plain weights, that the weights `name` belong to.

    >>> network_of("detection-fcos").tau
    20.0
    """
    if name not in RECIPES:
        raise ValueError(f"no weights {name!r}; there are: {', '.join(RECIPES)}")
    return without_parametrizations(build(RECIPES[name]))


def trained(
    name: str, device: str | torch.device = "cpu", folder: str | Path = pretrained.WEIGHTS
) -> tuple[FCOS, dict[str, Any]]:
    """A network with the weights that ship, in eval mode, and the run that made them; see `lipguide.tasks.weights`."""
    return pretrained.trained(name, network_of(name), device, folder)


RECIPES = {
    "detection-fcos": Recipe("fcos", steps=3000),
    **{
        f"detection-fcos-tau-{tau}": Recipe("fcos", steps=1000, rate=5e-3, tau=float(tau), start="detection-fcos")
        for tau in (5, 20, 80)
    },
    "detection-ordinary-fcos": Recipe("ordinary-fcos", steps=800, rate=1e-2),
}
# About 50 epochs. Not run for this book, for want of a GPU: the rates are those of the runs above, nothing is tuned.
FULL = Recipe("fcos", steps=12_000, batch_size=128, width=96, items=None, test_items=None)
RECIPES |= {
    "detection-fcos-full": FULL,
    **{f"detection-fcos-tau-{tau}-full": replace(FULL, tau=float(tau)) for tau in (5, 80)},  # the first one has 20
    "detection-ordinary-fcos-full": replace(FULL, network="ordinary-fcos", steps=6000, rate=1e-2),
}
TRAININGS = {name: partial(train, recipe) for name, recipe in RECIPES.items()}

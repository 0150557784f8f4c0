"""The recipes of the weights that ship: which data, which loss, how long (`python -m lipguide train NAME`).

All networks see the same pictures in the same order, moved by the same shifts; what differs is the layers and the loss,
and that the network for randomized smoothing is trained under its noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lipguide import losses
from lipguide.bounds.network import lipschitz_bound
from lipguide.checks import decisions
from lipguide.data.shn import name_of
from lipguide.data.shn.looks import DEFAULT
from lipguide.precision import full_precision
from lipguide.robustness.certificates import certified_miou, certified_pixel_accuracy, checked_logits
from lipguide.robustness.scores import check_masks, miou, pixel_accuracy, pooled_miou
from lipguide.seeded import normal
from lipguide.tasks import task
from lipguide.tasks.segmentation.data import CLASSES, pictures
from lipguide.tasks.segmentation.networks import build
from lipguide.training import Shifted, Supervised

__all__ = ["LARGE", "LOSSES", "RECIPES", "TASK", "Recipe", "load", "measure", "noisy"]

LOSSES = {"cross-entropy": losses.TauCrossEntropy, "focal": losses.TauFocal, "hkr": losses.MulticlassHKR}


@dataclass(frozen=True)
class Recipe(task.Recipe):
    """What is trained on what, with which loss, and for how long."""

    batch_size: int = 16
    rate: float = 5e-3
    loss: str = "cross-entropy"
    dial: tuple[float, ...] = (50.0,)  # the loss' arguments: (tau,), (tau, gamma) or (alpha, margin)
    noise: float = 0.0
    widths: tuple[int, ...] = (16, 32, 64, 96)
    labels: str = "ink"
    pixels: int = 32
    items: int | None = None  # all scenes
    test_items: int = 200


def network(recipe: Recipe) -> nn.Sequential:
    """The untrained network of a recipe."""
    return build(recipe.network, widths=recipe.widths, classes=CLASSES[recipe.labels])


def load(recipe: Recipe, split: str, seed: int) -> task.Data:
    """The pictures and masks that a recipe trains or tests on."""
    items = recipe.items if split == "train" else recipe.test_items
    images, masks = pictures(split, items, recipe.pixels, recipe.labels, seed)
    return task.Data.named(name_of(DEFAULT), images, masks)


def step(model: nn.Module, recipe: Recipe, data: task.Data) -> nn.Module:
    """The training step of a recipe; ValueError for masks that the network has no class for."""
    check_masks(model, data.columns[1])
    loss = LOSSES[recipe.loss](*recipe.dial)
    return Shifted(Supervised(loss), noise=recipe.noise)


def noisy(images: Tensor, noise: float) -> Tensor:
    """Pictures with the Gaussian noise that a network is tested under, the same in every call.

    >>> noisy(torch.zeros(1, 3, 4, 4), noise=0.0).abs().max()
    tensor(0.)
    """
    return images + noise * normal(images.shape)


def measure(model: nn.Sequential, recipe: Recipe, data: task.Data) -> dict[str, Any]:
    """Scores on pictures and, for a 1-Lipschitz network, its trunk's bound and certified scores."""
    images, masks = data.columns
    device, classes = next(model.parameters()).device, CLASSES[recipe.labels]
    facts: dict[str, Any] = {}
    if recipe.lipschitz:
        rows, trunk = model[-1].weight, lipschitz_bound(model[:-1].eval(), tuple(images.shape[1:])).value
        with full_precision():
            logits = checked_logits(model, images.to(device), trunk, rows, batch_size=50).cpu()
        facts = {"trunk": trunk} | _certified(logits, masks, trunk, rows.cpu())
    else:
        with torch.no_grad():
            parts = noisy(images, recipe.noise).split(50)
            logits = torch.cat([model(part.to(device)) for part in parts]).cpu()
    predicted = decisions(logits)
    facts["pixel_accuracy"] = pixel_accuracy(predicted, masks).mean().item()
    facts["miou"] = miou(predicted, masks, classes).mean().item()
    facts["pooled_miou"] = pooled_miou(predicted, masks, classes).item()
    return facts


def _certified(logits: Tensor, masks: Tensor, trunk: float, rows: Tensor) -> dict[str, Any]:
    """The certified scores by their radii, each a mean over the pictures."""
    radii = [0.25, 0.5, 1.0, 2.0]
    facts = {}
    for name, certify in (("pixel_accuracy", certified_pixel_accuracy), ("miou", certified_miou)):
        scores = certify(logits, masks, radii, trunk, rows).mean(1)
        facts[f"certified_{name}"] = [[r, round(s, 5)] for r, s in zip(radii, scores.tolist(), strict=True)]
    return facts


RECIPES = {
    "segmentation-unet": Recipe("unet", steps=3000, dial=(50.0,), rate=1.5e-2),
    "segmentation-fcn": Recipe("fcn", steps=3000, dial=(50.0,), rate=1e-2),
    "segmentation-ordinary": Recipe("ordinary-unet", steps=1500, dial=(1.0,)),
    "segmentation-noisy": Recipe("ordinary-unet", steps=1500, dial=(1.0,), noise=0.15),
    "segmentation-ordinary-fcn": Recipe("ordinary-fcn", steps=1500, dial=(1.0,)),
    "segmentation-digits": Recipe("unet", 8000, batch_size=32, rate=1.5e-2, dial=(100.0,), labels="digits"),
    "segmentation-digits-ordinary": Recipe("ordinary-unet", 3000, batch_size=32, dial=(1.0,), labels="digits"),
}
# The profile "full": for one GPU. Not run for this book.
LARGE = {
    f"{name}-full": replace(
        recipe, widths=tuple(4 * w for w in recipe.widths), steps=2 * recipe.steps, batch_size=128, test_items=2000
    )
    for name, recipe in RECIPES.items()
}
TASK = task.Task(RECIPES, network, load, step, measure, LARGE, precision=torch.bfloat16)

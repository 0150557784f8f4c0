"""The trainings behind the weights that ship: which data, which loss, how long (`python -m lipguide train NAME`).

All networks see the same pictures in the same order, moved by the same shifts; what differs is the layers and the loss,
and that the network for randomized smoothing is trained under its noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguide import losses
from lipguide.bounds.network import lipschitz_bound
from lipguide.checks import IGNORE
from lipguide.data import BACKGROUND, SyntheticHouseNumbers, scenes
from lipguide.export import without_parametrizations
from lipguide.robustness.certificates import certified_miou, certified_pixel_accuracy, checked_logits
from lipguide.robustness.scores import check_masks, miou, pixel_accuracy, pooled_miou
from lipguide.tasks import weights as pretrained
from lipguide.tasks.segmentation.networks import build
from lipguide.tasks.weights import TEST_SEED, fingerprint
from lipguide.training import shifted

__all__ = [
    "LOSSES",
    "RECIPES",
    "TRAININGS",
    "Recipe",
    "Shifted",
    "measured",
    "network_of",
    "pictures",
    "train",
    "trained",
]


def pictures(
    split: str = "train", items: int | None = None, pixels: int = 40, labels: str = "digits", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Windows around house numbers: images (N, 3, pixels, pixels) in [0, 1] and masks (N, pixels, pixels).

    Scenes in which no window fits around the number are left out.

    Args:
        labels: "digits", the digit of every pixel or 10 where there is none; or "ink", 1 on a digit and 0 elsewhere.

    >>> images, masks = pictures("test", items=3, pixels=16, labels="ink")
    >>> images.shape[1:], masks.shape[1:], masks.unique().tolist()
    (torch.Size([3, 16, 16]), torch.Size([16, 16]), [0, 1])
    """
    if labels not in CLASSES:
        raise ValueError(f"no labels {labels!r}; there are: {', '.join(CLASSES)}")
    images, _, _, masks = scenes(SyntheticHouseNumbers(split, items, seed), pixels)
    if masks is None:
        raise ValueError(f"none of {items} scenes of {split!r} has a window around its number: take more")
    return images, (masks != BACKGROUND).long() if labels == "ink" else masks


class Shifted(nn.Module):
    """A training step on pictures moved by up to two pixels each way, with Gaussian noise if asked for.

    What comes in at the edges repeats the last row or column of the picture; in the mask it is ignored.

    Args:
        loss: of logits (N, C, H, W) and masks (N, H, W); it must ignore the label `IGNORE`.
        noise: standard deviation a pixel.

    >>> step = Shifted(losses.TauCrossEntropy(10))
    >>> step(build("unet", widths=(4, 8)), (torch.rand(2, 3, 8, 8), torch.randint(11, (2, 8, 8)))).shape
    torch.Size([])
    """

    def __init__(self, loss: nn.Module, noise: float = 0.0) -> None:
        super().__init__()
        self.loss, self.noise = loss, noise

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, masks = shifted(*batch, outside=IGNORE)
        if self.noise:
            images = images + self.noise * torch.randn_like(images)
        return self.loss(model(images), masks)


CLASSES = {"digits": BACKGROUND + 1, "ink": 2}
LOSSES = {"cross-entropy": losses.TauCrossEntropy, "focal": losses.TauFocal, "hkr": losses.MulticlassHKR}


@dataclass(frozen=True)
class Recipe(pretrained.Schedule):
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


def train(recipe: Recipe, steps: int | None, device: torch.device, seed: int) -> tuple[nn.Sequential, dict[str, Any]]:
    """Train by a recipe and return the network, in eval mode with plain weights, and the facts of the run.

    >>> short = Recipe("unet", steps=2, widths=(4, 8), pixels=16, items=10, test_items=4, batch_size=4)
    >>> model, run = train(short, None, torch.device("cpu"), seed=0)
    >>> run["steps"], run["recipe"]["network"]
    (2, 'unet')
    """
    images, masks = pictures("train", recipe.items, recipe.pixels, recipe.labels)
    torch.manual_seed(seed)
    model = build(recipe.network, widths=recipe.widths, classes=CLASSES[recipe.labels]).to(device)
    check_masks(model, masks)
    step = Shifted(LOSSES[recipe.loss](*recipe.dial), recipe.noise)
    model, run = pretrained.train(recipe, model, (images, masks), step, steps, seed)
    run["data"] = {"name": "Synthetic House Numbers", "pictures": len(images), "hash": fingerprint(images, masks)}
    return model, run | measured(model, recipe)


def measured(model: nn.Sequential, recipe: Recipe) -> dict[str, Any]:
    """Scores on the test pictures and, for a 1-Lipschitz network, its trunk's bound and certified scores."""
    images, masks = pictures("test", recipe.test_items, recipe.pixels, recipe.labels, TEST_SEED)
    device, classes = next(model.parameters()).device, CLASSES[recipe.labels]
    facts: dict[str, Any] = {"test": {"pictures": len(images), "hash": fingerprint(images, masks)}}
    if recipe.lipschitz:
        rows, facts["trunk"] = model[-1].weight, lipschitz_bound(model[:-1].eval(), tuple(images.shape[1:])).value
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            logits = checked_logits(model, images.to(device), facts["trunk"], rows, batch_size=50).cpu()
        radii = [0.25, 0.5, 1.0, 2.0]
        for name, certify in (("pixel_accuracy", certified_pixel_accuracy), ("miou", certified_miou)):
            scores = certify(logits, masks, radii, facts["trunk"], rows.cpu()).mean(1)
            facts[f"certified_{name}"] = [[r, round(s, 5)] for r, s in zip(radii, scores.tolist(), strict=True)]
    else:
        noise = recipe.noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = torch.cat([model(part.to(device)) for part in (images + noise).split(50)]).cpu()
    predicted = logits.argmax(1)
    facts["pixel_accuracy"] = pixel_accuracy(predicted, masks).mean().item()
    facts["miou"] = miou(predicted, masks, classes).mean().item()
    facts["pooled_miou"] = pooled_miou(predicted, masks, classes).item()
    return facts


def network_of(name: str) -> nn.Sequential:
    """The untrained network, with plain weights, that the weights `name` belong to.

    >>> len(network_of("segmentation-unet"))
    7
    """
    if name not in RECIPES:
        raise ValueError(f"no weights {name!r}; there are: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    return without_parametrizations(build(recipe.network, widths=recipe.widths, classes=CLASSES[recipe.labels]))


def trained(
    name: str, device: str | torch.device = "cpu", folder: str | Path = pretrained.WEIGHTS
) -> tuple[nn.Sequential, dict[str, Any]]:
    """A network with the weights that ship, in eval mode, and the run that made them; see `lipguide.tasks.weights`."""
    return pretrained.trained(name, network_of(name), device, folder)


RECIPES = {
    "segmentation-unet": Recipe("unet", steps=2000, dial=(50.0,), rate=1.5e-2),
    "segmentation-fcn": Recipe("fcn", steps=2500, dial=(50.0,), rate=1e-2),
    "segmentation-ordinary": Recipe("ordinary-unet", steps=1500, dial=(1.0,)),
    "segmentation-noisy": Recipe("ordinary-unet", steps=1500, dial=(1.0,), noise=0.15),
    "segmentation-ordinary-fcn": Recipe("ordinary-fcn", steps=1500, dial=(1.0,)),
    "segmentation-digits": Recipe("unet", 4000, batch_size=32, rate=1.5e-2, dial=(100.0,), labels="digits"),
    "segmentation-digits-ordinary": Recipe("ordinary-unet", 3000, batch_size=32, dial=(1.0,), labels="digits"),
}
# The profile "full": for one GPU. Not run for this book.
RECIPES |= {
    f"{name}-full": replace(
        recipe, widths=tuple(4 * w for w in recipe.widths), steps=4 * recipe.steps, batch_size=128, test_items=2000
    )
    for name, recipe in list(RECIPES.items())
}
TRAININGS = {name: partial(train, recipe) for name, recipe in RECIPES.items()}

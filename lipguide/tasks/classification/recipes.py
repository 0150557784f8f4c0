"""The trainings behind the weights that ship: which data, which loss, how long (`python -m lipguide train NAME`).

Networks of one size see the same digits in the same order, moved by the same shifts; what differs is the layers and the
loss, and that the adversarially trained one meets an attack at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10

from lipguide.bounds.network import lipschitz_bound
from lipguide.data import SVHN, Digits, SyntheticHouseNumbers, digits
from lipguide.export import without_parametrizations
from lipguide.losses import OffsetCrossEntropy
from lipguide.robustness import attacks
from lipguide.robustness.certificates import certified_accuracy, checked_logits
from lipguide.tasks import weights as pretrained
from lipguide.tasks.classification.networks import build, check_labels
from lipguide.tasks.weights import TEST_SEED, fingerprint
from lipguide.training import Supervised, shifted

__all__ = [
    "DATA",
    "TRAININGS",
    "Adversarial",
    "Moved",
    "Recipe",
    "folder_of",
    "network_of",
    "pictures",
    "train",
    "trained",
]

DATA = ("house-numbers", "svhn", "cifar10")


def pictures(
    data: str = "house-numbers",
    split: str = "train",
    items: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> Digits:
    """Pictures of 32×32 with their labels: images (N, 3, 32, 32) in [0, 1] and labels (N,).

    Args:
        data: "house-numbers", made on the spot; "svhn", the digits of SVHN's scenes; or "cifar10".
        split: "train" or "test".
        items: the first so many scenes of house numbers, or pictures of CIFAR-10; all of them when None.
        seed: of the house numbers.
        root: the folder that holds SVHN or CIFAR-10, as `python -m lipguide data svhn` and torchvision leave it; None
            for `folder_of(data)`.

    >>> pictures("house-numbers", "test", items=2).images.shape[1:]
    torch.Size([3, 32, 32])
    """
    if data not in DATA or split not in ("train", "test"):
        raise ValueError(f"no data {data!r}, {split!r}; there are {', '.join(DATA)}, each with train and test")
    if data == "house-numbers":
        return digits(SyntheticHouseNumbers(split, items, seed))
    root = folder_of(data) if root is None else root
    dataset = SVHN(root, split) if data == "svhn" else _cifar10(root, split)
    return digits(dataset if items is None else _first(dataset, items))


def folder_of(data: str) -> Path:
    """Where a data set is looked for: data/NAME, seen from the checkout or from one of its folders.

    >>> folder_of("svhn").parts[-2:]
    ('data', 'svhn')
    """
    return next((path for path in (Path("data", data), Path("../data", data)) if path.is_dir()), Path("data", data))


def _cifar10(root: str | Path, split: str) -> Dataset:
    try:
        return CIFAR10(root, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"CIFAR-10 is missing or damaged in {root}: get it with torchvision.datasets.CIFAR10({str(root)!r}, "
            "download=True)"
        ) from error


def _first(dataset: Dataset, items: int) -> Dataset:
    if not isinstance(dataset, Sized) or not 0 < items <= len(dataset):
        raise ValueError(f"items is {items}, and the data set has {len(dataset)}")
    return Subset(dataset, range(items))


class Moved(nn.Module):
    """A training step on pictures moved by up to two pixels each way, and mirrored half of the time if they may be.

    Args:
        step: the training step behind it, such as `Supervised`.
        mirror: for objects, which CIFAR-10 shows, but not for digits.

    >>> step = Moved(Supervised(nn.CrossEntropyLoss()))
    >>> step(nn.Flatten(), (torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))).shape
    torch.Size([])
    """

    def __init__(self, step: nn.Module, mirror: bool = False) -> None:
        super().__init__()
        self.step, self.mirror = step, mirror

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        (moved,) = shifted(images)
        if self.mirror:
            half = torch.rand(len(moved), 1, 1, 1, device=moved.device) < 0.5
            moved = torch.where(half, moved.flip(3), moved)
        return self.step(model, (moved, labels))


class Adversarial(nn.Module):
    """A training step on the worst pictures that an L2 attack finds (Madry et al., 2018).

    Each picture is attacked within a distance of its own, drawn between 0 and `eps`: with all of them at `eps`, a small
    network does not begin to learn.

    Args:
        loss: of the attacked pictures, `loss(logits, labels)`.
        eps: largest L2 distance; steps: of the attack, each a forward and a backward pass more.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> Adversarial(nn.CrossEntropyLoss(), eps=0.5)(model, (torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))).shape
    torch.Size([])
    """

    def __init__(self, loss: nn.Module, eps: float, steps: int = 3) -> None:
        super().__init__()
        self.loss, self.eps, self.steps = loss, eps, steps

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        model.eval()  # batch norm should learn from the pictures that are kept, not from all on the way to them
        distance = self.eps * torch.rand(len(images), device=images.device)
        attacked = attacks.pgd_l2(model, images, labels, distance, steps=self.steps)
        model.train()
        return self.loss(model(attacked), labels)


@dataclass(frozen=True)
class Recipe(pretrained.Schedule):
    """What is trained on what, and for how long."""

    batch_size: int = 128
    rate: float = 3e-3
    size: str = "cpu"
    data: str = "house-numbers"
    items: int | None = None  # all 30,311 scenes, 73,216 digits
    test_items: int | None = 1000
    offset: float = 2 * math.sqrt(2) * 36 / 255  # of the 1-Lipschitz networks' loss
    adversary: float = 0.0  # the ε of adversarial training


def train(recipe: Recipe, steps: int | None, device: torch.device, seed: int) -> tuple[nn.Sequential, dict[str, Any]]:
    """Train by a recipe and return the network, in eval mode with plain weights, and the facts of the run.

    >>> short = Recipe("vgg", steps=2, items=20, test_items=5, batch_size=16)
    >>> model, run = train(short, None, torch.device("cpu"), seed=0)
    >>> run["steps"], run["recipe"]["network"]
    (2, 'vgg')
    """
    images, labels = pictures(recipe.data, "train", recipe.items, seed=0)
    torch.manual_seed(seed)
    model = build(recipe.network, recipe.size).to(device)
    check_labels(model, labels)
    loss = OffsetCrossEntropy(recipe.offset) if recipe.lipschitz else nn.CrossEntropyLoss()
    step = Adversarial(loss, recipe.adversary) if recipe.adversary else Supervised(loss)
    moved = Moved(step, mirror=recipe.data == "cifar10")
    model, run = pretrained.train(recipe, model, (images, labels), moved, steps, seed)
    run["data"] = {"name": recipe.data, "pictures": len(labels), "hash": fingerprint(images, labels)}
    return model, run | measured(model, recipe)


def measured(model: nn.Sequential, recipe: Recipe) -> dict[str, Any]:
    """Accuracy on the test pictures and, for a 1-Lipschitz network, its trunk's bound and the certified accuracy."""
    images, labels = pictures(recipe.data, "test", recipe.test_items, TEST_SEED)
    device = next(model.parameters()).device
    facts: dict[str, Any] = {"test": {"pictures": len(labels), "hash": fingerprint(images, labels)}}
    if not recipe.lipschitz:
        with torch.no_grad():
            logits = torch.cat([model(part.to(device)) for part in images.split(250)]).cpu()
        return facts | {"accuracy": (logits.argmax(1) == labels).double().mean().item()}
    rows = model[-1].weight
    facts["trunk"] = lipschitz_bound(model[:-1].eval(), tuple(images.shape[1:])).value
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = checked_logits(model, images.to(device), facts["trunk"], rows).cpu()
    facts["accuracy"] = (logits.argmax(1) == labels).double().mean().item()
    radii = [36 / 255, 72 / 255, 108 / 255, 0.5]
    certified = certified_accuracy(logits, labels, radii, facts["trunk"], rows.cpu())
    facts["certified"] = [[round(r, 6), round(c, 5)] for r, c in zip(radii, certified.tolist(), strict=True)]
    return facts


def network_of(name: str) -> nn.Sequential:
    """The untrained network, with plain weights, that the weights `name` belong to.

    >>> len(network_of("classification-vgg"))
    17
    """
    if name not in RECIPES:
        raise ValueError(f"no weights {name!r}; there are: {', '.join(RECIPES)}")
    return without_parametrizations(build(RECIPES[name].network, RECIPES[name].size))


def trained(
    name: str, device: str | torch.device = "cpu", folder: str | Path = pretrained.WEIGHTS
) -> tuple[nn.Sequential, dict[str, Any]]:
    """A network with the weights that ship, in eval mode, and the run that made them; see `lipguide.tasks.weights`."""
    return pretrained.trained(name, network_of(name), device, folder)


RECIPES = {
    "classification-vgg": Recipe("vgg", steps=5000),
    "classification-pooled": Recipe("pooled-vgg", steps=5000),
    "classification-resnet": Recipe("resnet", steps=5000),
    "classification-sll": Recipe("sll", steps=4000),
    "classification-ordinary": Recipe("ordinary-vgg", steps=5000, rate=2e-3),
    "classification-adversarial": Recipe("ordinary-vgg", steps=2500, rate=2e-3, adversary=0.5),
}
# The profile "full": for one GPU, on all of the data. Not run for this book.
RECIPES |= {
    f"{name}-{data}-full": replace(
        recipe, size="gpu", data=data, test_items=None, steps=4 * recipe.steps, batch_size=256, rate=recipe.rate / 3
    )
    for name, recipe in list(RECIPES.items())
    for data in DATA
}
TRAININGS = {name: partial(train, recipe) for name, recipe in RECIPES.items()}

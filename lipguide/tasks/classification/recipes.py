"""The recipes of the weights that ship: which data, which loss, how long (`python -m lipguide train NAME`).

Networks of one size see the same digits in the same order, moved by the same shifts; what differs is the layers and the
loss, and that the adversarially trained one meets an attack at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipguide.bounds.network import lipschitz_bound
from lipguide.checks import decisions
from lipguide.data.shn import TWINS, name_of
from lipguide.layers.export import remembered
from lipguide.losses import OffsetCrossEntropy, local_logits
from lipguide.precision import full_precision
from lipguide.robustness import attacks
from lipguide.robustness.certificates import certified_accuracy, checked_logits
from lipguide.tasks import task
from lipguide.tasks.classification.data import DATA, pictures
from lipguide.tasks.classification.networks import build, check_labels
from lipguide.tasks.harness import trained
from lipguide.tasks.weights import go_on_from
from lipguide.training import Shifted, Supervised

__all__ = ["LARGE", "RECIPES", "TASK", "Adversarial", "Local", "LocalRecipe", "Recipe", "load", "measure"]


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


class Local(nn.Module):
    """A training step whose margins count what the last SLL block does near the picture: see `local_logits`.

    The network is an `nn.Sequential` that ends in an SLL block and a head, as `local_radius` asks for.

    Args:
        loss: of these logits, `loss(logits, labels)`.
        reach: how far the features are to be moved.

    >>> from lipguide.layers.sll import SLLLinear
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), SLLLinear(4, 4), nn.Linear(4, 2))
    >>> Local(nn.CrossEntropyLoss(), reach=0.1)(model, (torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))).shape
    torch.Size([])
    """

    steady = True

    def __init__(self, loss: nn.Module, reach: float) -> None:
        super().__init__()
        self.loss, self.reach = loss, reach

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        block, head = getattr(model, "module", model)[-2:]  # under torchrun the network lies in a wrapper
        seen: list[Tensor] = []
        hook = block.register_forward_pre_hook(lambda _, features: seen.extend(features))
        try:
            with remembered(model):  # the weights of the two are asked for twice
                model(images)
                return self.loss(local_logits(*seen, labels, block, head, self.reach), labels)
        finally:
            hook.remove()


@dataclass(frozen=True)
class Recipe(task.Recipe):
    """What is trained on what, and for how long."""

    batch_size: int = 128
    rate: float = 3e-3
    size: str = "cpu"
    data: str = "house-numbers"
    items: int | None = None  # all 30,311 scenes, 73,216 digits
    test_items: int | None = 1000
    offset: float = 2 * math.sqrt(2) * 36 / 255  # of the 1-Lipschitz networks' loss
    adversary: float = 0.0  # the ε of adversarial training
    start: ClassVar[str | None] = None  # the weights that it goes on from

    def training_step(self) -> nn.Module:
        """The step on the pictures as they come."""
        loss = OffsetCrossEntropy(self.offset) if self.lipschitz else nn.CrossEntropyLoss()
        return Adversarial(loss, self.adversary) if self.adversary else Supervised(loss)


@dataclass(frozen=True)
class LocalRecipe(Recipe):
    """A network that ends in an SLL block, trained for what `local_radius` will say of it.

    Where it goes on from the weights `start`, only its dense end learns, from the pictures as they are.
    """

    rate: float = 1e-3
    reach: float = 36 / 255
    start: str | None = "classification-residual"

    def training_step(self) -> nn.Module:
        """The step on the pictures as they come."""
        return Local(OffsetCrossEntropy(self.offset), self.reach)


def network(recipe: Recipe) -> nn.Sequential:
    """The untrained network of a recipe."""
    return build(recipe.network, recipe.size)


def begin(model: nn.Module, recipe: Recipe) -> None:
    """Give a network the weights that its recipe goes on from; then its convolutions stay as they are."""
    if recipe.start is not None:
        go_on_from(model, trained(recipe.start, next(model.parameters()).device)[0])
        model[:-3].requires_grad_(False)  # all but a dense layer, the block and the head


def load(recipe: Recipe, split: str, seed: int) -> task.Data:
    """The pictures and labels that a recipe trains or tests on."""
    items = recipe.items if split == "train" else recipe.test_items
    name = name_of(TWINS[recipe.data]) if recipe.data in TWINS else recipe.data
    return task.Data.named(name, *pictures(recipe.data, split, items, seed))


def step(model: nn.Module, recipe: Recipe, data: task.Data) -> nn.Module:
    """The training step of a recipe; ValueError for labels that the network has no output for."""
    check_labels(model, data.columns[1])
    kept = recipe.training_step()
    return Shifted(kept, mirror=recipe.data == "cifar10") if recipe.start is None else kept


def measure(model: nn.Sequential, recipe: Recipe, data: task.Data) -> dict[str, Any]:
    """Accuracy on pictures and, for a 1-Lipschitz network, its trunk's bound and the certified accuracy."""
    images, labels = data.columns
    device = next(model.parameters()).device
    if not recipe.lipschitz:
        with torch.no_grad():
            logits = torch.cat([model(part.to(device)) for part in images.split(250)]).cpu()
        return {"accuracy": (decisions(logits) == labels).double().mean().item()}
    rows = model[-1].weight
    trunk = lipschitz_bound(model[:-1].eval(), tuple(images.shape[1:])).value
    with full_precision():
        logits = checked_logits(model, images.to(device), trunk, rows).cpu()
    accuracy = (decisions(logits) == labels).double().mean().item()
    radii = [36 / 255, 72 / 255, 108 / 255, 0.5]
    certified = certified_accuracy(logits, labels, radii, trunk, rows.cpu())
    pairs = [[round(r, 6), round(c, 5)] for r, c in zip(radii, certified.tolist(), strict=True)]
    return {"trunk": trunk, "accuracy": accuracy, "certified": pairs}


RECIPES = {
    "classification-vgg": Recipe("vgg", steps=10_000),
    "classification-pooled": Recipe("pooled-vgg", steps=10_000),
    "classification-resnet": Recipe("resnet", steps=10_000),
    "classification-sll": Recipe("sll", steps=10_000),
    "classification-residual": Recipe("residual", steps=10_000),
    "classification-local": LocalRecipe("residual", steps=1500),
    "classification-ordinary": Recipe("ordinary-vgg", steps=5000, rate=2e-3),
    "classification-adversarial": Recipe("ordinary-vgg", steps=2500, rate=2e-3, adversary=0.5),
}
# The profile "full": for one GPU, on all of the data. Not run for this book.
_ALONE = RECIPES | {"classification-local": LocalRecipe("residual", steps=10_000, rate=3e-3, start=None)}
LARGE = {
    f"{name}-{data}-full": replace(
        recipe, size="gpu", data=data, test_items=None, steps=2 * recipe.steps, batch_size=256, rate=recipe.rate / 3
    )
    for name, recipe in _ALONE.items()
    for data in DATA
}
# Half precision around the constraints, which stay in single precision, as a GPU wants it: the weights that ship have
# been trained so, and no worse for it.
TASK = task.Task(RECIPES, network, load, step, measure, LARGE, begin, torch.bfloat16)

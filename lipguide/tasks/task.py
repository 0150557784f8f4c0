"""What a task is to the harness that trains it: recipes, and four functions.

A recipe says which network is trained, how long and on what. Its fields go into the file of weights, by their names, so
that a file can be held against the recipe that made it. A task makes of a recipe the network, the data, the training
step and the scores; `lipguide.tasks.train` does the rest, alike for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lipguide.tasks.weights import fingerprint
from lipguide.training import StepLoss

__all__ = ["Data", "Recipe", "Task"]


@dataclass(frozen=True)
class Recipe:
    """Which network is trained, and how long; the recipes of the tasks add to it what else they need.

    >>> Recipe("ordinary-vgg", steps=100, batch_size=32, rate=1e-3).lipschitz
    False
    """

    network: str
    steps: int
    batch_size: int
    rate: float  # the largest of one cycle

    @property
    def ordinary(self) -> bool:
        """Whether it is the ordinary twin of another network: no bound rests on its weights, so float16 will do."""
        return self.network.startswith("ordinary")

    @property
    def lipschitz(self) -> bool:
        """Whether the network has a bound by construction."""
        return not self.ordinary


@dataclass(frozen=True)
class Data:
    """What a network learns from or is judged on, with the name and the hash that the run keeps of it.

    Args:
        columns: of equal length, as `lipguide.training.fit` takes them; the first one holds the pictures.
        hash: of the content; see `Data.named`.
    """

    name: str
    columns: Sequence[Any]
    hash: str

    @classmethod
    def named(cls, name: str, *columns: Tensor) -> Data:
        """Columns that are tensors, with the hash of them all.

        >>> Data.named("two points", torch.zeros(2, 3), torch.tensor([0, 1])).facts["pictures"]
        2
        """
        return cls(name, columns, fingerprint(*columns))

    @property
    def facts(self) -> dict[str, Any]:
        """What the run says about the data."""
        return {"name": self.name, "pictures": len(self.columns[0]), "hash": self.hash}


R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Task(Generic[R]):
    """Recipes, and what they mean.

    Args:
        recipes: by the names of the files of weights, those that ship with the package.
        more: recipes whose weights do not ship, such as those for a GPU.
        network: the untrained network of a recipe, on the CPU.
        data: `data(recipe, split, seed)`, the split "train" or "test"; the seed is that of data made on the spot.
        step: `step(model, recipe, data)`, the training step that `lipguide.training.fit` takes; an error here if the
            data do not suit the network.
        measure: `measure(model, recipe, data)`, scores of the trained network on the test data, as JSON has them. The
            network is in eval mode, on its device, and has plain weights.
        begin: `begin(model, recipe)`, gives a network the weights that it starts from, if not random ones.
        precision: that the networks are trained in, or what it is by the recipe.
    """

    recipes: Mapping[str, R]
    network: Callable[[R], nn.Module]
    data: Callable[[R, str, int], Data]
    step: Callable[[nn.Module, R, Data], StepLoss]
    measure: Callable[[nn.Module, R, Data], dict[str, Any]]
    more: Mapping[str, R] = field(default_factory=dict)
    begin: Callable[[nn.Module, R], None] | None = None
    precision: torch.dtype | Callable[[R], torch.dtype] = torch.float32

    def precision_of(self, recipe: R) -> torch.dtype:
        """What a recipe trains in."""
        return self.precision if isinstance(self.precision, torch.dtype) else self.precision(recipe)

    def recipe(self, name: str) -> R | None:
        """The recipe that makes the weights `name`, or None."""
        return self.recipes.get(name, self.more.get(name))


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a file of weights holds it: lists for tuples.

    >>> as_json(Recipe("vgg", 2, 3, 0.5))
    {'network': 'vgg', 'steps': 2, 'batch_size': 3, 'rate': 0.5}
    """
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}

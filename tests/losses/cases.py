"""Every loss, and what to call it with."""

import math

import pytest
import torch
from torch import Tensor, nn

from lipguide import losses

Y_BINARY = torch.tensor([1, 1, 1, 0, 0, 0])
F_BINARY = torch.tensor([0.5, 1.5, -0.5, -0.5, -1.5, 0.5])
LOGITS = torch.tensor(
    [[2, 0.2, -0.5], [-1, -1.2, 0.3], [0.8, 2, 0], [0, 1, -0.5], [2.4, -0.4, -1.1], [-0.1, -1.7, 0.6]]
)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
TWO_LOGITS, TWO_LABELS = torch.tensor([[2, 0.2, -0.5], [0, 1, -0.5]]), torch.tensor([0, 1])

BINARY = {
    "KR": losses.KR(),
    "HingeMargin": losses.HingeMargin(0.7),
    "HKR": losses.HKR(3.0, 0.7),
    "HKR, hinge only": losses.HKR(math.inf, 0.7),
    "TauBCEWithLogits": losses.TauBCEWithLogits(2.0),
}
CATEGORICAL = {
    "MulticlassKR": losses.MulticlassKR,
    "MulticlassHinge": lambda **kw: losses.MulticlassHinge(0.7, **kw),
    "MulticlassHKR": lambda **kw: losses.MulticlassHKR(3.0, 0.7, **kw),
    "MulticlassHKR, hinge only": lambda **kw: losses.MulticlassHKR(math.inf, 0.7, **kw),
    "MulticlassSoftHKR": lambda **kw: losses.MulticlassSoftHKR(3.0, 0.7, **kw),
    "MulticlassLseHKR": lambda **kw: losses.MulticlassLseHKR(3.0, 0.7, **kw),
    "CategoricalHinge": lambda **kw: losses.CategoricalHinge(0.7, **kw),
    "MultiMargin": lambda **kw: losses.MultiMargin(0.7, **kw),
    "TauCrossEntropy": lambda **kw: losses.TauCrossEntropy(5.0, **kw),
    "TauFocal": lambda **kw: losses.TauFocal(5.0, **kw),
    "CosineSimilarity": losses.CosineSimilarity,
    "OffsetCrossEntropy": losses.OffsetCrossEntropy,
    "LogitAnnealing": losses.LogitAnnealing,
    "EMMA": lambda **kw: losses.EMMA(0.3, **kw),
}
every_categorical = pytest.mark.parametrize("name", CATEGORICAL)
every_binary = pytest.mark.parametrize("name", BINARY)


def value(loss: nn.Module, logits: Tensor, target: Tensor) -> float:
    return loss(logits, target).item()


def random_batch(seed: int, n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Double-precision logits, and labels in which every class occurs when n allows it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % classes
    return logits, labels

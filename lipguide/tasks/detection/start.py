"""What a reader begins with: the weights of a classifier of single digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipguide.layers.orthogonal import OrthogonalKernel
from lipguide.layers.sll import SLLLinear
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.weights import give

__all__ = ["take_over"]

AFFINE = (nn.Conv2d, nn.Linear, SLLLinear)
FITS, FIT_RATE = 400, 0.03  # steps by which an orthogonal kernel is fitted to a given one, and their rate


def take_over(model: Detector, classifier: nn.Sequential, gain: float = 2.0) -> None:
    """Begin with what a trained classifier of single digits knows: `residual` of the same widths or, for orthogonal
    layers, `vgg`.

    A digit is `gain` times as clear on a level as in a crop; with biases `gain` times as large, trunk and features give
    `gain` times what they gave. The row of background stays random.
    """
    parts = (*model.trunk, model.halve, *model.cells, model.read, model.end, model.class_head)
    own, layers = ([layer for layer in some if isinstance(layer, AFFINE)] for some in (parts, classifier))
    for mine, theirs in zip(own, layers, strict=True):
        weight = theirs.weight.detach()
        if mine is model.class_head:
            weight = torch.cat([weight, mine.weight[-1:].detach()])
        weight = weight.reshape(mine.weight.shape)
        constraint = mine.parametrizations.weight[0]
        if isinstance(constraint, OrthogonalKernel) and mine.kernel_size != mine.stride:
            _fit(mine, weight)
        else:
            give(mine, "weight", weight)
        with torch.no_grad():
            mine.bias[: len(theirs.bias)] = gain * theirs.bias


def _fit(layer: nn.Conv2d, weight: Tensor) -> None:
    """Bring the free parameters behind an orthogonal kernel to where it is nearly `weight`, an orthogonal one too."""
    originals = list(layer.parametrizations.weight.parameters())
    adam = torch.optim.Adam(originals, FIT_RATE)
    for step in range(FITS):
        adam.param_groups[0]["lr"] = FIT_RATE * (1 - step / FITS)
        adam.zero_grad()
        (layer.weight - weight).square().sum().backward()
        adam.step()

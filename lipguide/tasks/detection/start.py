"""What a reader begins with: the weights of a classifier of single digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipguide.tasks.detection.reader import Detector

__all__ = ["take_over"]

FITS, FIT_RATE = 400, 0.03  # steps by which an orthogonal kernel is fitted to a given one, and their rate


def take_over(model: Detector, classifier: nn.Sequential, gain: float = 2.0) -> None:
    """Begin with what a classifier of single digits knows: `vgg` of the same widths, trained.

    A digit is `gain` times as clear on a level as in a crop; with biases `gain` times as large, trunk and features give
    `gain` times what they gave. The row of background stays random.
    """
    layers = [layer for layer in classifier if isinstance(layer, nn.Conv2d | nn.Linear)]
    own = [layer for layer in (*model.trunk, model.halve, model.read) if isinstance(layer, nn.Conv2d)]
    for mine, theirs in zip([*own, model.class_head], layers, strict=True):
        weight = theirs.weight.detach()
        if mine is model.class_head:
            weight = torch.cat([weight, mine.weight[-1:].detach()])
        elif mine.kernel_size == mine.stride:
            weight = weight.reshape(mine.weight.shape)
        if isinstance(mine, nn.Linear) or mine.kernel_size == mine.stride:
            mine.weight = weight
        else:
            _fit(mine, weight)
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

"""The layers of which the reader is made, and what its constants ask of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lipguide.layers.activations import GroupSort2
from lipguide.layers.brick import computes_as
from lipguide.tasks.twins import Lipschitz

__all__ = ["Layers", "check_kind", "check_layer", "residual_layers", "sorted_layers", "unpadded"]

Layers = tuple[list[nn.Module], nn.Conv2d, list[nn.Module]]  # of a level, the halving, of its cells


def sorted_layers(first: int, second: int, third: int) -> Layers:
    """Those of `vgg`."""
    trunk = [
        *Lipschitz.layer(nn.Conv2d(3, first, 3, padding=1)),
        *Lipschitz.layer(nn.Conv2d(first, 2 * first, 2, 2)),
        *Lipschitz.layer(nn.Conv2d(2 * first, second, 3, padding=1)),
        *Lipschitz.layer(nn.Conv2d(second, 2 * second, 2, 2)),
        *Lipschitz.layer(nn.Conv2d(2 * second, third, 3, padding=1)),
    ]
    return trunk, nn.Conv2d(third, 2 * third, 2, 2), []


def residual_layers(first: int, second: int, third: int) -> Layers:
    """Those of `residual`, two linear residuals at each size."""
    residuals = [[*Lipschitz.linear_residual(width), *Lipschitz.linear_residual(width)] for width in (first, second)]
    trunk = [
        *Lipschitz.layer(nn.Conv2d(3, first, 2, 2)),
        *residuals[0],
        *Lipschitz.layer(nn.Conv2d(first, second, 2, 2)),
        *residuals[1],
    ]
    cells = [*Lipschitz.linear_residual(third), *Lipschitz.linear_residual(third)]
    return trunk, nn.Conv2d(second, third, 2, 2), cells


def check_kind(name: str, part: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raise ValueError for a part that is of none of these kinds, or changes what they compute."""
    if not computes_as(part, *kinds):
        known = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"{name} ({parametrize.type_before_parametrizations(part).__name__}) is no {known}, or changes what one "
            f"computes: the constants of the detector are not known with it. Take {known}, or give a subclass of "
            "Detector a method constants of its own"
        )


def check_layer(name: str, layer: nn.Module, **settings: Any) -> None:
    """Sorted pairs, or a convolution of squares with these settings."""
    check_kind(name, layer, nn.Conv2d, GroupSort2)
    if not isinstance(layer, nn.Conv2d):
        return
    squares = {"kernel_size": layer.kernel_size[:1] * 2, "stride": layer.stride[:1] * 2}
    settings = {"padding_mode": "zeros", "dilation": (1, 1), "groups": 1} | squares | settings
    for what, known in settings.items():
        if getattr(layer, what) != known:
            raise ValueError(
                f"{name} has {what}={getattr(layer, what)}, with which the constants of the detector are not known: "
                f"build it with {what}={known}"
            )


def unpadded(layer: nn.Conv2d) -> nn.Conv2d:
    """The same filters for a part of a picture, around which there is more of it and no zeros."""
    weight = layer.weight.detach()
    outputs, inputs, *kernel = weight.shape
    bare = nn.Conv2d(inputs, outputs, kernel, layer.stride, bias=False, device=weight.device, dtype=weight.dtype)
    bare.weight = nn.Parameter(weight)
    return bare.train(layer.training)

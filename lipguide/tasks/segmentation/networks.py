"""Networks that label every pixel: an FCN and a U-Net, 1-Lipschitz or as their ordinary twins.

`lipguide.tasks.twins` has the layers of both. The head is a 1×1 convolution: the radius of a pixel is
margin / ‖w_k − w_j‖, and all pixels share one budget (`lipguide.robustness.certificates`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from lipguide.data import BACKGROUND
from lipguide.layers.blocks import Concat
from lipguide.layers.pooling import InvertibleDownSampling, InvertibleUpSampling
from lipguide.tasks.twins import Centred, Lipschitz, layers_of

__all__ = ["CLASSES", "NETWORKS", "build", "fcn", "unet"]

CLASSES = BACKGROUND + 1


def fcn(
    widths: Sequence[int] = (16, 32, 64, 96), classes: int = CLASSES, channels: int = 3, lipschitz: bool = True
) -> nn.Sequential:
    """1-Lipschitz FCN: convolutions of stride 2 on the way down, transposed convolutions on the way up.

    Args:
        widths: channels at each size, each half of the one before it.
        lipschitz: False for the twin, which has free layers of the same shapes, batch norm and ReLU.

    >>> import torch
    >>> fcn((4, 8))(torch.rand(2, 3, 10, 12)).shape
    torch.Size([2, 11, 10, 12])
    """
    make = layers_of(lipschitz)
    layers: list[nn.Module] = [Centred(channels, len(widths) - 1)]
    layers += make.layer(nn.Conv2d(channels, widths[0], 3, padding=1))
    for width, wider in zip(widths, widths[1:], strict=False):
        layers += make.layer(nn.Conv2d(width, wider, 2, stride=2))
        layers += make.layer(nn.Conv2d(wider, wider, 3, padding=1))
    for wider, width in zip(widths[::-1], widths[-2::-1], strict=False):
        layers += make.layer(nn.ConvTranspose2d(wider, width, 2, stride=2))
        layers += make.layer(nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(*layers, make.head(nn.Conv2d(widths[0], classes, 1)))


def unet(
    widths: Sequence[int] = (16, 32, 64, 96), classes: int = CLASSES, channels: int = 3, lipschitz: bool = True
) -> nn.Sequential:
    """1-Lipschitz U-Net: invertible down- and up-sampling, and at each size a concatenation (x, f(x)) / √2.

    Args as for `fcn`. In the twin batch norm undoes the 1/√2.

    >>> import torch
    >>> unet((4, 8))(torch.rand(2, 3, 10, 12)).shape
    torch.Size([2, 11, 10, 12])
    """
    make = layers_of(lipschitz)
    layers: list[nn.Module] = [Centred(channels, len(widths) - 1)]
    layers += make.layer(nn.Conv2d(channels, widths[0], 3, padding=1))
    layers += _unet_level(make, widths)
    return nn.Sequential(*layers, make.head(nn.Conv2d(widths[0], classes, 1)))


def _unet_level(make: type[Lipschitz], widths: Sequence[int]) -> list[nn.Module]:
    """(N, w, H, W) to (N, w, H, W): beside what stays at this size goes what the smaller sizes make of it."""
    width, *wider = widths
    if not wider:
        return make.layer(nn.Conv2d(width, width, 3, padding=1))
    below = nn.Sequential(
        InvertibleDownSampling(2),
        *make.layer(nn.Conv2d(4 * width, wider[0], 3, padding=1)),
        *_unet_level(make, wider),
        *make.layer(nn.Conv2d(wider[0], 4 * width, 1)),
        InvertibleUpSampling(2),
    )
    return [Concat(nn.Identity(), below), *make.layer(nn.Conv2d(2 * width, width, 3, padding=1))]


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "fcn": fcn,
    "ordinary-fcn": partial(fcn, lipschitz=False),
    "unet": unet,
    "ordinary-unet": partial(unet, lipschitz=False),
}


def build(network: str, **options: Any) -> nn.Sequential:
    """A network by its name, one of `NETWORKS`.

    >>> len(build("fcn", widths=(4, 8)))
    12
    """
    if network not in NETWORKS:
        raise ValueError(f"no network {network!r}; there are: {', '.join(NETWORKS)}")
    return NETWORKS[network](**options)

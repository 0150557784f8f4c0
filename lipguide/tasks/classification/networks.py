"""Classifiers of pictures: VGG, ResNet, SLL network and linear residuals, 1-Lipschitz or as their ordinary twins.

`lipguide.tasks.twins` has the layers of both. All halve the picture by 2×2 convolutions of stride 2. A VGG that pools
by the L2 norm, the guide's first choice, is there to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.tasks.twins import Centred, layers_of

__all__ = ["NETWORKS", "SIZES", "build", "check_labels", "residual", "resnet", "sll", "vgg"]


def vgg(
    widths: Sequence[int] = (16, 32, 64),
    depth: int = 1,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    pooling: bool = False,
    lipschitz: bool = True,
) -> nn.Sequential:
    """1-Lipschitz VGG: at each size `depth` convolutions of 3×3, then one of 2×2 that halves the side.

    Args:
        widths: channels at each size; the halving doubles them.
        features: of the dense layer below the head.
        pooling: halve the side by `ScaledL2NormPool2d` instead, followed by a convolution of 1×1.
        lipschitz: False for the twin, which has free layers of the same shapes, batch norm and ReLU.

    >>> vgg()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    make = layers_of(lipschitz)
    layers: list[nn.Module] = [Centred(channels, len(widths), pixels)]
    for width in widths:
        for _ in range(depth):  # the twin's convolutions have no bias: batch norm has one
            layers += make.layer(nn.Conv2d(channels, width, 3, padding=1, bias=lipschitz))
            channels = width
        if pooling:
            layers += [ScaledL2NormPool2d(2), *make.layer(nn.Conv2d(channels, 2 * width, 1, bias=lipschitz))]
        else:
            layers += make.layer(nn.Conv2d(channels, 2 * width, 2, stride=2, bias=lipschitz))
        channels, pixels = 2 * width, pixels // 2
    layers += [nn.Flatten(), *make.layer(nn.Linear(channels * pixels**2, features, bias=lipschitz))]
    return nn.Sequential(*layers, make.head(nn.Linear(features, classes)))


def resnet(
    widths: Sequence[int] = (24, 48, 96),
    depth: int = 1,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    lipschitz: bool = True,
) -> nn.Sequential:
    """1-Lipschitz ResNet: each size begins with a 2×2 convolution that halves the side, then `depth` residual blocks.

    Args as for `vgg`.

    >>> resnet()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    make = layers_of(lipschitz)

    def block(width: int) -> list[nn.Module]:
        first = make.layer(nn.Conv2d(width, width, 3, padding=1, bias=lipschitz))
        second = make.normed(nn.Conv2d(width, width, 3, padding=1, bias=lipschitz))
        return [make.residual(nn.Sequential(*first, *second)), make.activation()]

    layers: list[nn.Module] = [Centred(channels, len(widths), pixels)]
    for width in widths:
        layers += make.layer(nn.Conv2d(channels, width, 2, stride=2, bias=lipschitz))
        for _ in range(depth):
            layers += block(width)
        channels, pixels = width, pixels // 2
    layers += [nn.Flatten(), *make.layer(nn.Linear(channels * pixels**2, features, bias=lipschitz))]
    return nn.Sequential(*layers, make.head(nn.Linear(features, classes)))


def sll(
    widths: Sequence[int] = (24, 48, 96),
    depth: int = 1,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    lipschitz: bool = True,
) -> nn.Sequential:
    """1-Lipschitz SLL network: as `resnet`, with blocks that are residual without a half and end in no activation.

    Args as for `vgg`.

    >>> sll()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    make = layers_of(lipschitz)
    layers: list[nn.Module] = [Centred(channels, len(widths), pixels)]
    for width in widths:
        layers.append(make.bare(nn.Conv2d(channels, width, 2, stride=2)))
        layers += [make.sll(width) for _ in range(depth)]
        channels, pixels = width, pixels // 2
    layers += [nn.Flatten(), *make.sll_dense(nn.Linear(channels * pixels**2, features, bias=lipschitz))]
    return nn.Sequential(*layers, make.head(nn.Linear(features, classes)))


def residual(
    widths: Sequence[int] = (24, 48, 96),
    depth: int = 2,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    lipschitz: bool = True,
) -> nn.Sequential:
    """1-Lipschitz network of linear residuals, the best brick of `frontier`, that ends in an SLL block.

    Each size begins with a 2×2 convolution that halves the side. The end is what `lip.certificates.local_radius` looks
    into. Args as for `vgg`.

    >>> residual()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    make = layers_of(lipschitz)
    layers: list[nn.Module] = [Centred(channels, len(widths), pixels)]
    for width in widths:
        layers += make.layer(nn.Conv2d(channels, width, 2, stride=2, bias=lipschitz))
        for _ in range(depth):
            layers += make.linear_residual(width)
        channels, pixels = width, pixels // 2
    layers += [nn.Flatten(), *make.sll_dense(nn.Linear(channels * pixels**2, features, bias=lipschitz))]
    return nn.Sequential(*layers, make.head(nn.Linear(features, classes)))


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "vgg": vgg,
    "pooled-vgg": partial(vgg, pooling=True),
    "ordinary-vgg": partial(vgg, lipschitz=False),
    "resnet": resnet,
    "ordinary-resnet": partial(resnet, lipschitz=False),
    "sll": sll,
    "ordinary-sll": partial(sll, lipschitz=False),
    "residual": residual,
    "ordinary-residual": partial(residual, lipschitz=False),
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"vgg": {}, "resnet": {}, "sll": {}, "residual": {}},  # the functions' own
    "gpu": {
        "vgg": {"widths": (64, 128, 256), "depth": 3, "features": 1024},
        "resnet": {"widths": (128, 256, 512), "depth": 4, "features": 1024},
        "sll": {"widths": (128, 256, 512), "depth": 5, "features": 1024},
        "residual": {"widths": (128, 256, 512), "depth": 6, "features": 1024},
    },
}


def build(name: str, size: str = "cpu", classes: int = 10, pixels: int = 32) -> nn.Sequential:
    """A network of `NETWORKS` in a size for two cores ("cpu") or for one GPU ("gpu").

    >>> small, large = build("ordinary-vgg"), build("ordinary-vgg", "gpu")
    >>> sum(p.numel() for p in large.parameters()) > 10 * sum(p.numel() for p in small.parameters())
    True
    """
    if name not in NETWORKS or size not in SIZES:
        raise ValueError(
            f"no network {name!r} of size {size!r}; there are {', '.join(NETWORKS)}, {' and '.join(SIZES)}"
        )
    return NETWORKS[name](**SIZES[size][name.split("-")[-1]], classes=classes, pixels=pixels)


def check_labels(model: nn.Module, labels: torch.Tensor) -> None:
    """Raise ValueError unless every label has an output of the head.

    >>> check_labels(vgg(), torch.tensor([3, 10]))
    Traceback (most recent call last):
    ...
    ValueError: the labels go from 3 to 10, and the head has 10 outputs, for 0 to 9: build the network with classes=11
    """
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"labels must be class indices (N,), not {tuple(labels.shape)} of {labels.dtype}")
    if not isinstance(model, nn.Sequential) or not isinstance(model[-1], nn.Linear):
        raise ValueError("the network must be an nn.Sequential that ends in its head, an nn.Linear with a row a class")
    outputs = model[-1].out_features
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0:
        raise ValueError(f"the labels go from {low} to {high}: number the classes from 0 on")
    if high >= outputs:
        raise ValueError(
            f"the labels go from {low} to {high}, and the head has {outputs} outputs, for 0 to {outputs - 1}: build "
            f"the network with classes={high + 1}"
        )

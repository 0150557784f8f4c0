"""Classifiers of pictures: a VGG, a ResNet and an SLL network, 1-Lipschitz, each beside its ordinary twin.

A 1-Lipschitz network is an `nn.Sequential` whose last layer is the head: `model[:-1]` is the 1-Lipschitz trunk, and the
head's rows have norm 1, so that the radius of a picture is margin / ‖w_k − w_j‖. The ordinary twin has layers of the
same shape, free, with batch norm and ReLU.

Both halve the picture by 2×2 convolutions of stride 2. A VGG that pools by the L2 norm, the guide's first choice, is
there to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import orthogonal, unit_rows
from lipguide.layers.blocks import Residual
from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.layers.sll import SLL, SLLLinear

__all__ = [
    "NETWORKS",
    "Centred",
    "build",
    "check_labels",
    "ordinary_resnet",
    "ordinary_sll",
    "ordinary_vgg",
    "resnet",
    "sll",
    "vgg",
]


class Centred(nn.Module):
    """y = x − 1/2, an isometry that makes the zeros of padding medium grey; refuses pictures of another size.

    Args:
        channels, pixels: of the pictures, (N, channels, pixels, pixels).
        halvings: how often the network halves a side: `pixels` must be a multiple of 2^halvings.

    >>> Centred(3, 74, halvings=3)
    Traceback (most recent call last):
    ...
    ValueError: a side of 74 pixels cannot be halved 3 times: 72 or 80 would do (crop or pad the pictures)
    """

    def __init__(self, channels: int, pixels: int, halvings: int) -> None:
        super().__init__()
        self.shape = (channels, pixels, pixels)
        self.multiple = 2**halvings
        below = pixels - pixels % self.multiple
        if pixels != below or pixels < 1:
            sizes = f"{below} or {below + self.multiple}" if below > 0 else f"{self.multiple}"
            raise ValueError(
                f"a side of {pixels} pixels cannot be halved {halvings} times: {sizes} would do (crop or pad the "
                "pictures)"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[1:]) != self.shape:
            need, got = "×".join(map(str, self.shape)), "×".join(map(str, x.shape[1:]))
            raise ValueError(
                f"this network was built for pictures of {need}, not of {got}: scale or crop them to {need}, or build "
                f"it with other `channels` and `pixels` (a multiple of {self.multiple})"
            )
        return x - 0.5

    def lipschitz(self, constant: float, through: Callable[[nn.Module, float], Any]) -> float:
        return constant

    def extra_repr(self) -> str:
        return "×".join(map(str, self.shape))


class OrdinaryBlock(nn.Module):
    """y = x + f(x): the residual block without a bound.

    >>> OrdinaryBlock(nn.Identity())(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


Affine = nn.Conv2d | nn.Linear


class _Lipschitz:
    """The layers of a 1-Lipschitz network: orthogonal, with MaxMin, and blocks that stretch nothing."""

    bias = True
    activation, residual = GroupSort2, Residual
    bare, head = staticmethod(orthogonal), staticmethod(unit_rows)

    @staticmethod
    def normed(affine: Affine) -> list[nn.Module]:
        return [orthogonal(affine)]

    @staticmethod
    def sll(width: int) -> nn.Module:
        return SLL(width, width, 3, iterations=2)

    @staticmethod
    def sll_dense(affine: nn.Linear) -> list[nn.Module]:
        return [orthogonal(affine), SLLLinear(affine.out_features, affine.out_features)]


class _Ordinary:
    """The same layers, free, with batch norm and ReLU."""

    bias = False  # batch norm has one
    activation, residual = nn.ReLU, OrdinaryBlock

    @staticmethod
    def bare(affine: Affine) -> nn.Module:
        return affine

    head = bare

    @staticmethod
    def normed(affine: Affine) -> list[nn.Module]:
        if isinstance(affine, nn.Linear):
            return [affine, nn.BatchNorm1d(affine.out_features)]
        return [affine, nn.BatchNorm2d(affine.out_channels)]

    @staticmethod
    def sll(width: int) -> nn.Module:
        """x + g(relu(batch norm(f(x)))), with the free convolutions f and g for Vᵀ and V."""
        inward = _layer(_Ordinary, nn.Conv2d(width, width, 3, padding=1, bias=False))
        return OrdinaryBlock(nn.Sequential(*inward, nn.Conv2d(width, width, 3, padding=1)))

    @staticmethod
    def sll_dense(affine: nn.Linear) -> list[nn.Module]:
        return _layer(_Ordinary, affine)


Bricks = type[_Lipschitz] | type[_Ordinary]


def _layer(bricks: Bricks, affine: Affine) -> list[nn.Module]:
    return [*bricks.normed(affine), bricks.activation()]


def vgg(
    widths: Sequence[int] = (16, 32, 64),
    depth: int = 1,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    pooling: bool = False,
    bricks: Bricks = _Lipschitz,
) -> nn.Sequential:
    """1-Lipschitz VGG: at each size `depth` convolutions of 3×3, then one of 2×2 that halves the side.

    Args:
        widths: channels at each size; the halving doubles them.
        features: of the dense layer below the head.
        pooling: halve the side by `ScaledL2NormPool2d` instead, followed by a convolution of 1×1.
        bricks: what the layers are made of; `ordinary_vgg` has others.

    >>> vgg()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    layer, bias = partial(_layer, bricks), bricks.bias
    layers: list[nn.Module] = [Centred(channels, pixels, len(widths))]
    for width in widths:
        for _ in range(depth):
            layers += layer(nn.Conv2d(channels, width, 3, padding=1, bias=bias))
            channels = width
        if pooling:
            layers += [ScaledL2NormPool2d(2), *layer(nn.Conv2d(channels, 2 * width, 1, bias=bias))]
        else:
            layers += layer(nn.Conv2d(channels, 2 * width, 2, stride=2, bias=bias))
        channels, pixels = 2 * width, pixels // 2
    layers += [nn.Flatten(), *layer(nn.Linear(channels * pixels**2, features, bias=bias))]
    return nn.Sequential(*layers, bricks.head(nn.Linear(features, classes)))


def ordinary_vgg(widths: Sequence[int] = (16, 32, 64), **options: int) -> nn.Sequential:
    """The twin of `vgg`, which takes the same arguments: the same shapes, batch norm and ReLU.

    >>> ordinary_vgg()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return vgg(widths, **options, bricks=_Ordinary)


def resnet(
    widths: Sequence[int] = (24, 48, 96),
    depth: int = 1,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    bricks: Bricks = _Lipschitz,
) -> nn.Sequential:
    """1-Lipschitz ResNet: each size begins with a 2×2 convolution that halves the side, then `depth` residual blocks.

    Args as for `vgg`.

    >>> resnet()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    layer, bias = partial(_layer, bricks), bricks.bias

    def block(width: int) -> list[nn.Module]:
        first = layer(nn.Conv2d(width, width, 3, padding=1, bias=bias))
        second = bricks.normed(nn.Conv2d(width, width, 3, padding=1, bias=bias))
        return [bricks.residual(nn.Sequential(*first, *second)), bricks.activation()]

    layers: list[nn.Module] = [Centred(channels, pixels, len(widths))]
    for width in widths:
        layers += layer(nn.Conv2d(channels, width, 2, stride=2, bias=bias))
        for _ in range(depth):
            layers += block(width)
        channels, pixels = width, pixels // 2
    layers += [nn.Flatten(), *layer(nn.Linear(channels * pixels**2, features, bias=bias))]
    return nn.Sequential(*layers, bricks.head(nn.Linear(features, classes)))


def ordinary_resnet(widths: Sequence[int] = (24, 48, 96), **options: int) -> nn.Sequential:
    """The twin of `resnet`, which takes the same arguments: batch norm and ReLU, x + f(x) without a half.

    >>> ordinary_resnet()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return resnet(widths, **options, bricks=_Ordinary)


def sll(
    widths: Sequence[int] = (24, 48, 96),
    depth: int = 1,
    features: int = 128,
    classes: int = 10,
    pixels: int = 32,
    channels: int = 3,
    bricks: Bricks = _Lipschitz,
) -> nn.Sequential:
    """SLL network: as `resnet`, with blocks that are residual without a half and need no activation between them.

    Args as for `vgg`.

    >>> sll()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    layers: list[nn.Module] = [Centred(channels, pixels, len(widths))]
    for width in widths:
        layers += [bricks.bare(nn.Conv2d(channels, width, 2, stride=2)), *(bricks.sll(width) for _ in range(depth))]
        channels, pixels = width, pixels // 2
    layers += [nn.Flatten(), *bricks.sll_dense(nn.Linear(channels * pixels**2, features, bias=bricks.bias))]
    return nn.Sequential(*layers, bricks.head(nn.Linear(features, classes)))


def ordinary_sll(widths: Sequence[int] = (24, 48, 96), **options: int) -> nn.Sequential:
    """The twin of `sll`, which takes the same arguments: x + g(relu(batch norm(f(x)))) with free f and g for Vᵀ and V.

    >>> ordinary_sll()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return sll(widths, **options, bricks=_Ordinary)


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "vgg": vgg,
    "pooled-vgg": partial(vgg, pooling=True),
    "ordinary-vgg": ordinary_vgg,
    "resnet": resnet,
    "ordinary-resnet": ordinary_resnet,
    "sll": sll,
    "ordinary-sll": ordinary_sll,
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"vgg": {}, "resnet": {}, "sll": {}},  # the functions' own
    "gpu": {
        "vgg": {"widths": (64, 128, 256), "depth": 3, "features": 1024},
        "resnet": {"widths": (128, 256, 512), "depth": 4, "features": 1024},
        "sll": {"widths": (128, 256, 512), "depth": 5, "features": 1024},
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

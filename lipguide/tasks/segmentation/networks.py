"""Networks that label every pixel: a 1-Lipschitz FCN and U-Net, and their ordinary twins.

A network is an `nn.Sequential` whose last layer is the head, a 1×1 convolution: `model[:-1]` is the 1-Lipschitz trunk,
and the head's rows have norm 1, so that the radius of a pixel is margin / ‖w_k − w_j‖ and all pixels share one budget
(`lipguide.robustness.certificates`). The ordinary twin has layers of the same shape, free, with batch norm and ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipguide.checks import IGNORE, class_indices
from lipguide.data import BACKGROUND
from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import orthogonal, unit_rows
from lipguide.layers.blocks import Concat
from lipguide.layers.pooling import InvertibleDownSampling, InvertibleUpSampling

__all__ = [
    "CLASSES",
    "NETWORKS",
    "Entry",
    "build",
    "fcn",
    "flipped",
    "ordinary_fcn",
    "ordinary_unet",
    "soft_flips",
    "unet",
]

CLASSES = BACKGROUND + 1
SOFT = 0.05  # margin over which a pixel counts as half flipped, relative to the spread of the logits


class Entry(nn.Module):
    """y = x − 1/2, an isometry that makes the zeros of padding medium grey; refuses pictures that do not halve.

    Args:
        channels: of the pictures, (N, channels, H, W).
        halvings: how often the network halves a side: H and W must be multiples of 2^halvings.

    >>> Entry(3, halvings=2)(torch.zeros(1, 3, 74, 72))
    Traceback (most recent call last):
    ...
    ValueError: a picture of 74×72 cannot be halved 2 times: 72×72 or 76×72 would do (crop it, or pad it with grey)
    """

    def __init__(self, channels: int, halvings: int) -> None:
        super().__init__()
        self.channels, self.multiple, self.halvings = channels, 2**halvings, halvings

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"the network takes pictures (N, {self.channels}, H, W), not {tuple(x.shape)}")
        sides = x.shape[2:]
        below = [side - side % self.multiple for side in sides]
        above = [side + -side % self.multiple for side in sides]
        if list(sides) != below or 0 in sides:
            sizes = [f"{h}×{w}" for h, w in (below, above) if h and w] or [f"{self.multiple}×{self.multiple}"]
            raise ValueError(
                f"a picture of {sides[0]}×{sides[1]} cannot be halved {self.halvings} times: {' or '.join(sizes)} "
                "would do (crop it, or pad it with grey)"
            )
        return x - 0.5

    def lipschitz(self, constant: float, through: Callable[[nn.Module, float], Any]) -> float:
        return constant

    def extra_repr(self) -> str:
        return f"channels={self.channels}, halvings={self.halvings}"


class _Lipschitz:
    """The layers of a 1-Lipschitz network: orthogonal, with MaxMin."""

    @staticmethod
    def layer(affine: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
        return [orthogonal(affine), GroupSort2()]

    @staticmethod
    def head(affine: nn.Conv2d) -> nn.Module:
        return unit_rows(affine)


class _Ordinary:
    """The same layers, free, with batch norm and ReLU."""

    @staticmethod
    def layer(affine: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
        affine.bias = None  # batch norm has one
        return [affine, nn.BatchNorm2d(affine.out_channels), nn.ReLU()]

    @staticmethod
    def head(affine: nn.Conv2d) -> nn.Module:
        return affine


Bricks = type[_Lipschitz] | type[_Ordinary]


def _fcn(bricks: Bricks, widths: Sequence[int], classes: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [Entry(channels, len(widths) - 1)]
    layers += bricks.layer(nn.Conv2d(channels, widths[0], 3, padding=1))
    for width, wider in zip(widths, widths[1:], strict=False):
        layers += bricks.layer(nn.Conv2d(width, wider, 2, stride=2))
        layers += bricks.layer(nn.Conv2d(wider, wider, 3, padding=1))
    for wider, width in zip(widths[::-1], widths[-2::-1], strict=False):
        layers += bricks.layer(nn.ConvTranspose2d(wider, width, 2, stride=2))
        layers += bricks.layer(nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(*layers, bricks.head(nn.Conv2d(widths[0], classes, 1)))


def _unet_level(bricks: Bricks, widths: Sequence[int]) -> list[nn.Module]:
    """(N, w, H, W) to (N, w, H, W): beside what stays at this size goes what the smaller sizes make of it."""
    width, *wider = widths
    if not wider:
        return bricks.layer(nn.Conv2d(width, width, 3, padding=1))
    below = nn.Sequential(
        InvertibleDownSampling(2),
        *bricks.layer(nn.Conv2d(4 * width, wider[0], 3, padding=1)),
        *_unet_level(bricks, wider),
        *bricks.layer(nn.Conv2d(wider[0], 4 * width, 1)),
        InvertibleUpSampling(2),
    )
    return [Concat(nn.Identity(), below), *bricks.layer(nn.Conv2d(2 * width, width, 3, padding=1))]


def _unet(bricks: Bricks, widths: Sequence[int], classes: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [Entry(channels, len(widths) - 1)]
    layers += bricks.layer(nn.Conv2d(channels, widths[0], 3, padding=1))
    layers += _unet_level(bricks, widths)
    return nn.Sequential(*layers, bricks.head(nn.Conv2d(widths[0], classes, 1)))


def fcn(widths: Sequence[int] = (16, 32, 64, 96), classes: int = CLASSES, channels: int = 3) -> nn.Sequential:
    """1-Lipschitz FCN: convolutions of stride 2 on the way down, transposed convolutions on the way up.

    Args:
        widths: channels at each size, each half of the one before it.

    >>> fcn((4, 8))(torch.rand(2, 3, 10, 12)).shape
    torch.Size([2, 11, 10, 12])
    """
    return _fcn(_Lipschitz, widths, classes, channels)


def ordinary_fcn(widths: Sequence[int] = (16, 32, 64, 96), classes: int = CLASSES, channels: int = 3) -> nn.Sequential:
    """The twin of `fcn`: the same shapes, batch norm and ReLU.

    >>> ordinary_fcn((4, 8))(torch.rand(2, 3, 10, 12)).shape
    torch.Size([2, 11, 10, 12])
    """
    return _fcn(_Ordinary, widths, classes, channels)


def unet(widths: Sequence[int] = (16, 32, 64, 96), classes: int = CLASSES, channels: int = 3) -> nn.Sequential:
    """1-Lipschitz U-Net: invertible down- and up-sampling, and at each size a concatenation (x, f(x)) / √2.

    Args:
        widths: channels at each size, each half of the one before it.

    >>> unet((4, 8))(torch.rand(2, 3, 10, 12)).shape
    torch.Size([2, 11, 10, 12])
    """
    return _unet(_Lipschitz, widths, classes, channels)


def ordinary_unet(widths: Sequence[int] = (16, 32, 64, 96), classes: int = CLASSES, channels: int = 3) -> nn.Sequential:
    """The twin of `unet`: the same shapes, batch norm and ReLU (which undoes the 1/√2 of the concatenation).

    >>> ordinary_unet((4, 8))(torch.rand(2, 3, 10, 12)).shape
    torch.Size([2, 11, 10, 12])
    """
    return _unet(_Ordinary, widths, classes, channels)


NETWORKS = {"fcn": fcn, "ordinary-fcn": ordinary_fcn, "unet": unet, "ordinary-unet": ordinary_unet}


def build(network: str, **options: Any) -> nn.Sequential:
    """A network by its name, one of `NETWORKS`.

    >>> len(build("fcn", widths=(4, 8)))
    12
    """
    if network not in NETWORKS:
        raise ValueError(f"no network {network!r}; there are: {', '.join(NETWORKS)}")
    return NETWORKS[network](**options)


def flipped(logits: Tensor, masks: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """1 for a pixel whose label is wrong, 0 for one that is right or ignored: (N, H, W); what an attack is after.

    >>> flipped(torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]]), torch.tensor([[[0, 0]]]))
    tensor([[[0., 1.]]])
    """
    labels, counts = class_indices(masks, ignore_index)
    return ((logits.argmax(1) != labels) & counts).to(logits.dtype)


def soft_flips(logits: Tensor, masks: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """`flipped`, made smooth: σ((best wrong logit − right logit) / s), with s a twentieth of the spread of the logits.

    Cross-entropy spends most of its gradient on pixels that are wrong already. This loss has its steepest slope where a
    pixel is about to flip, and gives up both on those far behind and on those far ahead.

    >>> soft_flips(torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]]), torch.tensor([[[0, 0]]])).round(decimals=2)
    tensor([[[0., 1.]]])
    """
    labels, counts = class_indices(masks, ignore_index)
    label = labels.unsqueeze(1)  # (N, 1, H, W)
    wrong = logits.scatter(1, label, -torch.inf).amax(1)
    spread = (logits.detach().amax(1) - logits.detach().amin(1)).flatten(1).amax(1)[:, None, None]
    scale = SOFT * spread.clamp(min=torch.finfo(logits.dtype).tiny)
    right = logits.gather(1, label).squeeze(1)
    return torch.where(counts, torch.sigmoid((wrong - right) / scale), 0.0)

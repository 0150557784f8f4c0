"""One classifier, seven times: one network from each of seven kinds of brick, for the chapter `frontier`.

=========== =====================================================================================================
brick       a block of it, on `width` channels
=========== =====================================================================================================
orthogonal  `lip.orthogonal`, sorted pairs
spectral    `lip.spectral`, sorted pairs
aol         `lip.aol`, begun near the identity as in its paper, sorted pairs
sll         `lip.SLL`, which has its activation inside
reflector   a block reflector at each frequency (BRO; Lai et al., 2025), sorted pairs
residual    x + K ∗ x over its norm (LiResNet; Hu et al., 2023), sorted pairs
shift       two orthogonal matrices around a shift by one pixel, half of the channels folded (LipNeXt, 2026)
=========== =====================================================================================================

The last three are the cells of that chapter. They are here to be compared and are no part of `lip`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import aol, near_identity, orthogonal, spectral, unit_rows
from lipguide.layers.brick import Through
from lipguide.layers.sll import SLL, SLLLinear
from lipguide.tasks.twins import Centred, Lipschitz

__all__ = [
    "FAMILIES",
    "BlockReflector",
    "FrequencyReflector",
    "HalfAbs",
    "Shift",
    "ShiftBlock",
    "classifier",
    "parameters",
    "width_for",
]

SIZES = (1, 2, 4)  # widths at the three sizes of the picture, as multiples of the first
DEPTH = 2  # blocks at each size
FEATURES = 64


class BlockReflector(nn.Module):
    """W = I − 2 V (VᵀV)⁻¹ Vᵀ, and rows or columns dropped where W is not square.

    >>> layer = nn.Linear(6, 6)
    >>> _ = parametrize.register_parametrization(layer, "weight", BlockReflector())
    >>> torch.allclose(layer.weight @ layer.weight.mT, torch.eye(6), atol=1e-5)
    True
    """

    def forward(self, raw: Tensor) -> Tensor:
        tall = raw if raw.shape[0] >= raw.shape[1] else raw.mT
        q, _ = torch.linalg.qr(tall[:, : max(1, len(tall) // 2)])  # V (VᵀV)⁻¹ Vᵀ = Q Qᵀ, (m, n)
        w = torch.eye(len(q), dtype=raw.dtype, device=raw.device) - 2 * q @ q.mT
        return w[: raw.shape[0], : raw.shape[1]]


class FrequencyReflector(nn.Module):
    """y = z − 2 V (VᴴV)⁻¹ Vᴴ z + b at each frequency of a circle.

    >>> layer, x = FrequencyReflector(8), torch.randn(2, 8, 6, 6)
    >>> torch.allclose(layer(x).norm(), x.norm(), rtol=1e-4)
    True
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, channels // 2, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        v = torch.fft.rfft2(self.kernel, size).permute(2, 3, 0, 1)  # (H, W', C, n)
        z = torch.fft.rfft2(x).permute(2, 3, 1, 0)  # (H, W', C, N)
        q, _ = torch.linalg.qr(v)
        z = z - 2 * q @ (q.mH @ z)
        return torch.fft.irfft2(z.permute(3, 2, 0, 1), size) + self.bias

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant  # a unitary matrix at each frequency, between unitary maps


class Shift(nn.Module):
    """Four eighths of the channels move by one pixel, on a circle: down, up, right, left.

    >>> Shift()(torch.eye(3).expand(1, 8, 3, 3))[0, 0]
    tensor([[0., 0., 1.],
            [1., 0., 0.],
            [0., 1., 0.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        eighth = x.shape[1] // 8
        down, up, right, left, rest = x.split([eighth] * 4 + [x.shape[1] - 4 * eighth], 1)
        moved = [down.roll(1, 2), up.roll(-1, 2), right.roll(1, 3), left.roll(-1, 3)]
        return torch.cat([*moved, rest], 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant  # values change their place, none is lost or doubled


class HalfAbs(nn.Module):
    """|x| on the first half of the channels.

    >>> HalfAbs()(torch.tensor([[-1.0, -2.0]]))
    tensor([[ 1., -2.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        folded, rest = x.chunk(2, 1)
        return torch.cat([folded.abs(), rest], 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class ShiftBlock(nn.Module):
    """z = σ(M Rᵀ S R (x + p) + b), with a learned picture p, for pictures of one size.

    >>> ShiftBlock(16, 8)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(channels, side, side))  # p
        self.turn = orthogonal(nn.Conv2d(channels, channels, 1, bias=False))  # R
        self.mix = orthogonal(nn.Conv2d(channels, channels, 1))  # M, b
        self.shift, self.activation = Shift(), HalfAbs()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shift(self.turn(x + self.place))
        y = F.conv_transpose2d(y, self.turn.weight)  # Rᵀ
        return self.activation(self.mix(y))

    def lipschitz(self, constant: float, through: Through) -> float:
        turned = through(self.turn, constant)  # ‖R‖, and once more for Rᵀ
        back = through(self.turn, through(self.shift, turned))
        return through(self.activation, through(self.mix, back))


class Family(NamedTuple):
    """What a network of one kind of brick is made of."""

    block: Callable[[int, int], list[nn.Module]]
    """`block(width, side)`, on pictures of side × side."""
    dense: Callable[[int, int], list[nn.Module]]
    """`dense(inputs, outputs)`."""


Constraint = Callable[[nn.Module], nn.Module]


def _sorted(constraint: Constraint) -> Family:
    def block(width: int, side: int) -> list[nn.Module]:
        return [constraint(nn.Conv2d(width, width, 3, padding=1)), GroupSort2()]

    def dense(inputs: int, outputs: int) -> list[nn.Module]:
        return [constraint(nn.Linear(inputs, outputs)), GroupSort2()]

    return Family(block, dense)


def _reflecting(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Linear(inputs, outputs)
    parametrize.register_parametrization(layer, "weight", BlockReflector())
    return [layer, GroupSort2()]


ORTHOGONAL = _sorted(orthogonal)
FAMILIES: dict[str, Family] = {
    "orthogonal": ORTHOGONAL,
    "spectral": _sorted(spectral),
    "aol": Family(_sorted(lambda conv: aol(near_identity(conv))).block, ORTHOGONAL.dense),
    "sll": Family(
        lambda width, side: [SLL(width, width, 3, iterations=2)],
        lambda inputs, outputs: [orthogonal(nn.Linear(inputs, outputs)), SLLLinear(outputs, outputs)],
    ),
    "reflector": Family(lambda width, side: [FrequencyReflector(width), GroupSort2()], _reflecting),
    "residual": Family(lambda width, side: Lipschitz.linear_residual(width), ORTHOGONAL.dense),
    "shift": Family(lambda width, side: [ShiftBlock(width, side)], ORTHOGONAL.dense),
}


def classifier(brick: str, width: int, classes: int = 10, pixels: int = 32) -> nn.Sequential:
    """The network: three sizes, each begun by an orthogonal 2×2 convolution that halves the side, a dense end, a head.

    Args:
        brick: one of `FAMILIES`; entries and head are the same in all.
        width: channels at the first size, an even number from 8 on.

    >>> classifier("shift", 8)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if brick not in FAMILIES or width % 2 or width < 8:
        raise ValueError(f"no classifier of {brick!r}, {width}: take one of {', '.join(FAMILIES)}; 8, 10, 12 or more")
    family, channels, side = FAMILIES[brick], 3, pixels
    layers: list[nn.Module] = [Centred(channels, len(SIZES), pixels)]
    for size in SIZES:
        layers += [orthogonal(nn.Conv2d(channels, size * width, 2, stride=2)), GroupSort2()]
        channels, side = size * width, side // 2
        for _ in range(DEPTH):
            layers += family.block(channels, side)
    layers += [nn.Flatten(), *family.dense(channels * side**2, FEATURES)]
    return nn.Sequential(*layers, unit_rows(nn.Linear(FEATURES, classes)))


def parameters(model: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def width_for(brick: str, budget: int) -> int:
    """The width that comes nearest to a number of parameters.

    >>> width_for("aol", 0)
    8
    """

    def count(width: int) -> int:
        return parameters(classifier(brick, width))

    widths = range(8, 130, 2)
    above = min(bisect_left(widths, budget, key=count), len(widths) - 1)
    near = widths[max(above - 1, 0) : above + 1]
    return min(near, key=lambda width: abs(count(width) - budget))

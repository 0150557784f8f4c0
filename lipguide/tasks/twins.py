"""The layers of a 1-Lipschitz network and of its ordinary twin, side by side.

A network is an `nn.Sequential` whose last layer is the head: `model[:-1]` is the 1-Lipschitz trunk, and the head's rows
have norm 1, so that a radius is margin / ‖w_k − w_j‖. The ordinary twin has layers of the same shape, free, with batch
norm and ReLU.
"""

from __future__ import annotations

from torch import Tensor, nn

from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import near_identity, orthogonal, spectral, unit_rows
from lipguide.layers.blocks import Residual
from lipguide.layers.brick import Brick, Through
from lipguide.layers.sll import SLL, SLLLinear

__all__ = ["Centred", "Lipschitz", "Ordinary", "OrdinaryBlock", "layers_of"]

Affine = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


class Centred(Brick):
    """y = x − 1/2, an isometry that makes the zeros of padding medium grey; refuses pictures that do not halve.

    Args:
        channels: of the pictures, (N, channels, H, W).
        halvings: how often the network halves a side: H and W must be multiples of 2^halvings.
        pixels: H and W, if the network takes pictures of one size only.

    >>> import torch
    >>> Centred(3, halvings=2)(torch.zeros(1, 3, 75, 72))
    Traceback (most recent call last):
    ...
    ValueError: a picture of 75×72 cannot be halved 2 times: 72×72 or 76×72 would do (crop it, or pad it with grey)
    >>> Centred(3, halvings=3, pixels=74)  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
    ...
    ValueError: a picture of 74×74 cannot be halved 3 times: 72×72 or 80×80 would do (crop it, or pad it with grey), or
    halve it once, by fewer `widths`
    """

    def __init__(self, channels: int, halvings: int, pixels: int | None = None) -> None:
        super().__init__()
        self.channels, self.halvings, self.pixels = channels, halvings, pixels
        if pixels is not None:
            self._check_sides(pixels, pixels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"the network takes pictures (N, {self.channels}, H, W), not {tuple(x.shape)}")
        height, width = x.shape[2:]
        if self.pixels is None:
            self._check_sides(height, width)
        elif (height, width) != (self.pixels, self.pixels):
            side = f"{self.pixels}×{self.pixels}"
            raise ValueError(
                f"the network was built for pictures of {side}, not of {height}×{width}: scale or crop them to {side}, "
                f"or build it with other `pixels` (a multiple of {2**self.halvings})"
            )
        return x - 0.5

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainCentred()

    def extra_repr(self) -> str:
        return f"channels={self.channels}, halvings={self.halvings}, pixels={self.pixels}"

    def _check_sides(self, height: int, width: int) -> None:
        multiple = 2**self.halvings
        below = height - height % multiple, width - width % multiple
        above = height + -height % multiple, width + -width % multiple
        if below == (height, width) and min(below) > 0:
            return
        would_do = [f"{h}×{w}" for h, w in (below, above) if h > 0 and w > 0] or [f"{multiple}×{multiple}"]
        raise ValueError(
            f"a picture of {height}×{width} cannot be halved {self.halvings} times: {' or '.join(would_do)} would do "
            f"(crop it, or pad it with grey){_fewer(height, width)}"
        )


def _fewer(height: int, width: int) -> str:
    """What else would do: to halve the picture only as often as its sides can be halved."""
    possible = 0
    while height and width and height % 2 == width % 2 == 0:
        height, width, possible = height // 2, width // 2, possible + 1
    if not possible:
        return ""
    often = "once" if possible == 1 else f"{possible} times"
    return f", or halve it {often}, by fewer `widths`"


class _PlainCentred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


class OrdinaryBlock(nn.Module):
    """y = x + f(x): the residual block without a bound.

    >>> import torch
    >>> OrdinaryBlock(nn.Identity())(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Lipschitz:
    """The layers of a 1-Lipschitz network: orthogonal, with MaxMin, and blocks that stretch nothing.

    >>> [type(part).__name__ for part in Lipschitz.layer(nn.Linear(4, 2))]
    ['ParametrizedLinear', 'GroupSort2']
    """

    @staticmethod
    def bare(affine: Affine) -> nn.Module:
        """An affine layer that no activation follows."""
        return orthogonal(affine)

    @staticmethod
    def normed(affine: Affine) -> list[nn.Module]:
        """An affine layer and what keeps its outputs in bounds."""
        return [orthogonal(affine)]

    @staticmethod
    def activation() -> nn.Module:
        return GroupSort2()

    @classmethod
    def layer(cls, affine: Affine) -> list[nn.Module]:
        """An affine layer and its activation."""
        return [*cls.normed(affine), cls.activation()]

    @staticmethod
    def residual(branch: nn.Module) -> nn.Module:
        return Residual(branch)

    @staticmethod
    def linear_residual(width: int) -> list[nn.Module]:
        """x + K ∗ x over its norm, on (N, width, H, W), and its activation."""
        return [spectral(near_identity(nn.Conv2d(width, width, 3, padding=1))), GroupSort2()]

    @staticmethod
    def sll(width: int) -> nn.Module:
        """A residual block on (N, width, H, W) that ends in no activation."""
        return SLL(width, width, 3, iterations=2)

    @staticmethod
    def sll_dense(affine: nn.Linear) -> list[nn.Module]:
        """A dense layer and such a block."""
        return [orthogonal(affine), SLLLinear(affine.out_features, affine.out_features)]

    @staticmethod
    def head(affine: Affine) -> nn.Module:
        return unit_rows(affine)


class Ordinary(Lipschitz):
    """The same layers, free, with batch norm and ReLU.

    >>> [type(part).__name__ for part in Ordinary.layer(nn.Linear(4, 2))]
    ['Linear', 'BatchNorm1d', 'ReLU']
    """

    @staticmethod
    def bare(affine: Affine) -> nn.Module:
        return affine

    @staticmethod
    def normed(affine: Affine) -> list[nn.Module]:
        affine.bias = None  # batch norm has one
        if isinstance(affine, nn.Linear):
            return [affine, nn.BatchNorm1d(affine.out_features)]
        return [affine, nn.BatchNorm2d(affine.out_channels)]

    @staticmethod
    def activation() -> nn.Module:
        return nn.ReLU()

    @staticmethod
    def residual(branch: nn.Module) -> nn.Module:
        return OrdinaryBlock(branch)

    @classmethod
    def linear_residual(cls, width: int) -> list[nn.Module]:
        return cls.layer(near_identity(nn.Conv2d(width, width, 3, padding=1)))

    @classmethod
    def sll(cls, width: int) -> nn.Module:
        """x + g(relu(batch norm(f(x)))), with the free convolutions f and g for Vᵀ and V."""
        inward = cls.layer(nn.Conv2d(width, width, 3, padding=1, bias=False))
        return OrdinaryBlock(nn.Sequential(*inward, nn.Conv2d(width, width, 3, padding=1)))

    @classmethod
    def sll_dense(cls, affine: nn.Linear) -> list[nn.Module]:
        return cls.layer(affine)

    @staticmethod
    def head(affine: Affine) -> nn.Module:
        return affine


def layers_of(lipschitz: bool) -> type[Lipschitz]:
    """What a network is made of.

    >>> layers_of(False).head(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    return Lipschitz if lipschitz else Ordinary

"""A picture pyramid of norm 1: each level is one linear map of the picture, an area average with a gain.

The mean of f×f pixels has norm 1 / f, so a level that only averages wastes a factor f of contrast. The gain 1 / ‖A‖
gives it back: the level is then 1-Lipschitz, and a large digit stands out of it f times as clearly as in the picture,
while noise of norm ε is at most ε there. In the level of its size every digit is as high as any other, so one reader of
one window can read them all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipguide.arguments import whole
from lipguide.layers.brick import Brick, Through

__all__ = ["Canvas", "Level", "averages"]

ROOM = 1e-6  # by which a level stays below norm 1, for the rounding of its entries to float32


class Canvas(NamedTuple):
    """Where the picture lies on a level: the picture is `side` pixels wide there, and `above` and `before` pixels of
    zeros precede it on a canvas of (height, width)."""

    side: int
    height: int
    width: int
    above: int
    before: int


def averages(pixels: int, side: int) -> Tensor:
    """(side, pixels) in float64: row i has the shares of the pixels that output pixel i covers; each row sums to 1.

    >>> averages(3, 2)
    tensor([[0.6667, 0.3333, 0.0000],
            [0.0000, 0.3333, 0.6667]], dtype=torch.float64)
    """
    whole("pixels", pixels, "a picture has one pixel or more")
    whole("side", side, "a level has one pixel or more")
    edges = torch.arange(side + 1, dtype=torch.float64) * pixels / side
    left = torch.arange(pixels, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], left)
    high = torch.minimum(edges[1:, None], left + 1)
    shares = (high - low).clamp(min=0)
    return shares / shares.sum(1, keepdim=True)


class Level(Brick):
    """y = gain · A x Aᵀ on a canvas of zeros, with the gain that makes the norm 1.

    A picture that is moved by whole pixels on the canvas (`moved`) is the same map with other zeros.

    Args:
        pixels: the side of the picture.
        canvas: the size of the level, and of the zeros around it.

    >>> level = Level(4, Canvas(2, 4, 4, 1, 1))
    >>> level(torch.ones(1, 1, 4, 4))[0, 0, 1]  # the mean of four pixels, times two
    tensor([0.0000, 2.0000, 2.0000, 0.0000])
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, pixels: int, canvas: Canvas) -> None:
        super().__init__()
        self.pixels, self.canvas = pixels, canvas
        shares = averages(pixels, canvas.side)
        # ‖A ⊗ A‖ = ‖A‖², so each of the two factors may have norm 1.
        shares = shares * (1 - ROOM) / torch.linalg.matrix_norm(shares, 2)
        self.register_buffer("rows", _placed(shares, canvas.height, canvas.above), persistent=False)
        self.register_buffer("columns", _placed(shares, canvas.width, canvas.before).mT, persistent=False)

    @property
    def gain(self) -> float:
        """What a picture of one colour is multiplied by in the middle of the level."""
        height, width = self.canvas.height // 2, self.canvas.width // 2
        return float(self.rows[height].sum() * self.columns[:, width].sum())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2:] != (self.pixels, self.pixels):
            raise ValueError(
                f"this level takes pictures (N, C, {self.pixels}, {self.pixels}), not {tuple(x.shape)}: scale them, or "
                f"build it with other `pixels`"
            )
        return self.rows @ x @ self.columns

    def lipschitz(self, constant: float, through: Through) -> float:
        # Row and column map by row and column map; padding adds zeros and no norm.
        return constant * math.prod(float(torch.linalg.matrix_norm(part.double(), 2)) for part in self._parts)

    def plain(self) -> nn.Module:
        return _PlainLevel(*self._parts)

    @property
    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.columns

    def extra_repr(self) -> str:
        return f"pixels={self.pixels}, {self.canvas}"


def _placed(shares: Tensor, length: int, before: int) -> Tensor:
    """(length, pixels): the rows of a level, with rows of zeros before and behind."""
    side = len(shares)
    if before < 0 or before + side > length:
        raise ValueError(f"a level of {side} pixels, {before} from the edge, does not lie on a canvas of {length}")
    placed = shares.new_zeros(length, shares.shape[1])
    placed[before : before + side] = shares
    return placed.float()


class _PlainLevel(nn.Module):
    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant * math.prod(float(torch.linalg.matrix_norm(p.double(), 2)) for p in (self.rows, self.columns))

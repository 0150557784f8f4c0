"""Pooling that is 1-Lipschitz and keeps the norm of the gradient; the averages lose that of the signal.

A pooling window is a map of its own pixels only, so the layer is as Lipschitz as one window, *provided that no pixel
lies in two windows*: that is why the stride must equal the size. (torch's own `nn.MaxPool2d` is no exception: with
size 3 and stride 2 a pixel can be the maximum of four windows, and the layer stretches by 2.)

Like torch's pooling, the local layers drop the last rows and columns that do not fill a window. Dropping pixels is a
projection: still 1-Lipschitz, but these pixels get no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipguide.arguments import pair, whole
from lipguide.layers.brick import Brick, Through

__all__ = [
    "GlobalAvgPool2d",
    "GlobalL2NormPool2d",
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "ScaledAvgPool2d",
    "ScaledL2NormPool2d",
]

WINDOW = "a window has one pixel or more an axis"

# The root r of the smallest ε = r² whose ε^(-3/2), a factor of the second derivative, stays finite.
SMOOTHING = {torch.float32: 2.0**-42, torch.float64: 2.0**-340}


def _check_picture(module: nn.Module, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{type(module).__name__} pools (N, C, H, W), but the input has shape {tuple(x.shape)}")


def _root(squares: Tensor) -> Tensor:
    """√(s + r²) − r: 0 at 0, √s elsewhere to within r, with a slope below that of √s, and finite at 0.

    r is 2⁻⁴² ≈ 2e-13 in float32, which its rounding swallows as soon as √s exceeds 4e-6. A smaller slope cannot break
    the Lipschitz bound; the usual √(s + ε) is safe too, but shifts every value near zero by √ε.
    """
    r = SMOOTHING[squares.dtype]
    return torch.sqrt(squares + r * r) - r


def _wide(x: Tensor) -> Tensor:
    """Half precision cannot hold the squares of ordinary pixels (300² overflows): sum them in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _LocalPool2d(Brick):
    def __init__(self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        self.kernel_size = pair("kernel_size", kernel_size, WINDOW)
        if stride is not None and pair("stride", stride, WINDOW) != self.kernel_size:
            raise ValueError(
                f"stride {stride} differs from kernel_size {kernel_size}: where windows overlap, one pixel enters "
                "several outputs and the layer is not 1-Lipschitz any more; where they leave gaps, pixels are lost. "
                "Leave stride out, or give it the value of kernel_size"
            )

    def _check(self, x: Tensor) -> None:
        _check_picture(self, x)
        if x.shape[2] < self.kernel_size[0] or x.shape[3] < self.kernel_size[1]:
            raise ValueError(
                f"a picture of {x.shape[2]}×{x.shape[3]} holds no window of "
                f"{self.kernel_size[0]}×{self.kernel_size[1]}: pool less, or use a global pooling layer"
            )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class ScaledL2NormPool2d(_LocalPool2d):
    """y = ‖window‖₂, channel by channel: keeps the norm of the gradient, the guide's first choice.

    At a window of zeros, where the norm has a kink, the gradient is zero.

    Args:
        kernel_size: k or (rows, columns).
        stride: may be left out; anything but `kernel_size` is an error.

    >>> ScaledL2NormPool2d(2)(torch.tensor([[[[3.0, 0.0], [4.0, 0.0]]]]))
    tensor([[[[5.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        mean_square = F.avg_pool2d(_wide(x).square(), self.kernel_size)
        return _root(mean_square * math.prod(self.kernel_size)).to(x.dtype)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainL2NormPool(self.kernel_size)


class _PlainL2NormPool(nn.Module):
    """Over windows, or over the whole picture."""

    def __init__(self, window: tuple[int, int] | None) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        # Half precision cannot hold the squares: like the original, sum them in float32 (and doubles as doubles).
        wide = x.new_zeros(1) + x.new_zeros(1, dtype=torch.float32)
        if self.window is None:
            squares = x.to(wide).square().sum((2, 3), keepdim=True)
        else:
            squares = F.avg_pool2d(x.to(wide).square(), self.window) * math.prod(self.window)
        r = SMOOTHING[torch.float32]
        return (torch.sqrt(squares + r * r) - r).to(x)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class ScaledAvgPool2d(_LocalPool2d):
    """y = (window mean) · √(pixels in a window): 1-Lipschitz, and not more only for windows of one value.

    The mean of k² pixels is 1/k-Lipschitz, so torch's average pooling wastes a factor k. A gradient keeps
    its norm on the way back (JJᵀ = I); the signal keeps it only where windows are constant.

    Args:
        kernel_size: k or (rows, columns).
        stride: may be left out; anything but `kernel_size` is an error.

    >>> ScaledAvgPool2d(2)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    tensor([[[[5.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return F.avg_pool2d(x, self.kernel_size) * math.sqrt(math.prod(self.kernel_size))

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainScaledAvgPool2d(self.kernel_size)


class _PlainScaledAvgPool2d(nn.Module):
    def __init__(self, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.window) * math.sqrt(math.prod(self.window))

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class GlobalL2NormPool2d(Brick):
    """y = ‖channel‖₂, shape (N, C, 1, 1): keeps the norm of the gradient.

    >>> GlobalL2NormPool2d()(torch.ones(1, 1, 3, 3))
    tensor([[[[3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_picture(self, x)
        return _root(_wide(x).square().sum((2, 3), keepdim=True)).to(x.dtype)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainL2NormPool(None)


class GlobalAvgPool2d(Brick):
    """y = (channel mean) · √(H W), shape (N, C, 1, 1): 1-Lipschitz, and the signal loses its norm.

    >>> GlobalAvgPool2d()(torch.ones(1, 1, 3, 3))
    tensor([[[[3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_picture(self, x)
        return x.mean((2, 3), keepdim=True) * math.sqrt(x.shape[2] * x.shape[3])

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainGlobalAvgPool2d()


class _PlainGlobalAvgPool2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True) * (x.shape[2] * x.shape[3]) ** 0.5

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class InvertibleDownSampling(Brick):
    """(C, H, W) becomes (C k², H/k, W/k): each k×k window is laid out as k² channels, nothing is lost.

    A permutation of the values, hence norm preserving both ways. It does not reduce the number of neurons; a layer
    that mixes channels has to follow. H and W must be multiples of k: cutting pixels off could not be undone.

    Args:
        kernel_size: k, which is also the stride.

    >>> InvertibleDownSampling(2)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 12, 4, 4])
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = whole("kernel_size", kernel_size, WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        _check_picture(self, x)
        k, (height, width) = self.kernel_size, x.shape[2:]
        if height % k or width % k:
            raise ValueError(
                f"a picture of {height}×{width} cannot be cut into windows of {k}×{k}: pad it with zeros to "
                f"{k * math.ceil(height / k)}×{k * math.ceil(width / k)} or crop it to {height - height % k}×"
                f"{width - width % k}"
            )
        return F.pixel_unshuffle(x, k)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return nn.PixelUnshuffle(self.kernel_size)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class InvertibleUpSampling(Brick):
    """(C k², H, W) becomes (C, H k, W k): the inverse of `InvertibleDownSampling(k)`.

    Args:
        kernel_size: k, which is also the stride.

    >>> x = torch.randn(1, 3, 8, 8)
    >>> torch.equal(InvertibleUpSampling(2)(InvertibleDownSampling(2)(x)), x)
    True
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = whole("kernel_size", kernel_size, WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        _check_picture(self, x)
        k, channels = self.kernel_size, x.shape[1]
        if channels % k**2:
            raise ValueError(
                f"{channels} channels cannot be laid out as windows of {k}×{k}: "
                f"{k**2 * math.ceil(channels / k**2)} would do"
            )
        return F.pixel_shuffle(x, k)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return nn.PixelShuffle(self.kernel_size)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"

"""Blocks that join layers without losing the bound: residual, concatenation, patches, padding and centering.

Each `forward` is its equation, with the factor that keeps it 1-Lipschitz in sight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipguide.arguments import whole
from lipguide.layers.brick import Brick, Through

__all__ = ["BatchCentering", "Concat", "PadChannels", "Patches", "Residual"]


class Residual(Brick):
    """y = (x + f(x)) / 2, which is 1-Lipschitz if f is; without the half it would be 2-Lipschitz.

    The half has a price: where x and f(x) point in unrelated directions, y is shorter by √2. `lip.SLL` is residual
    without it.

    Args:
        branch: f, a module that keeps the shape.

    >>> Residual(nn.Identity())(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if y.shape != x.shape:  # adding would broadcast, and repeat values: no longer 1-Lipschitz
            raise ValueError(
                f"Residual adds its input of shape {tuple(x.shape)} to the branch's output of shape {tuple(y.shape)}: "
                "the branch must keep the shape"
            )
        return (x + y) / 2

    def lipschitz(self, constant: float, through: Through) -> float:
        return (constant + through(self.branch, constant)) / 2

    def plain(self) -> nn.Module:
        return _PlainResidual(self.branch)


class _PlainResidual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)) / 2


class Concat(Brick):
    """y = (f₁(x), …, f_n(x)) / √n, channels side by side: 1-Lipschitz if every f_i is.

    Args:
        branches: modules whose outputs agree but for the channels; `nn.Identity()` makes a skip connection.

    >>> Concat(nn.Identity(), nn.Identity())(torch.ones(1, 1))
    tensor([[0.7071, 0.7071]])
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError("Concat() has nothing to concatenate: give it one branch or more")
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1) / math.sqrt(len(self.branches))

    def lipschitz(self, constant: float, through: Through) -> float:
        squares = [through(branch, constant) ** 2 for branch in self.branches]
        return math.sqrt(sum(squares) / len(squares))

    def plain(self) -> nn.Module:
        return self  # its forward can be traced as it stands


class Patches(Brick):
    """Cuts a picture into size×size patches, applies one function to all of them, puts the results back in place.

    Patches share no pixel, so ‖y − y'‖² is a sum over patches and the whole is exactly as Lipschitz as the function.

    Args:
        fn: takes patches (M, C, size, size) and returns pictures (M, C', h, w), which are tiled, or vectors (M, C'),
            each of which becomes one pixel.
        size: of a patch; height and width of the picture must be multiples of it.

    >>> Patches(nn.Flatten(), 4)(torch.zeros(2, 3, 8, 12)).shape
    torch.Size([2, 48, 2, 3])
    """

    def __init__(self, fn: nn.Module, size: int) -> None:
        super().__init__()
        self.fn = fn
        self.size = whole("size", size, "a patch has one pixel or more an axis")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"Patches cuts (N, C, H, W), but the input has shape {tuple(x.shape)}")
        s, (batch, channels, height, width) = self.size, x.shape
        if height % s or width % s:
            raise ValueError(
                f"a picture of {height}×{width} cannot be cut into patches of {s}×{s}: pad it with zeros to "
                f"{s * math.ceil(height / s)}×{s * math.ceil(width / s)}"
            )
        rows, columns = height // s, width // s
        patches = x.reshape(batch, channels, rows, s, columns, s).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch * rows * columns, channels, s, s)
        y = self.fn(patches)
        if y.dim() not in (2, 4):
            raise ValueError(
                f"Patches puts pictures (M, C, H, W) or vectors (M, C) back in place, but the function made "
                f"{tuple(y.shape)} of {tuple(patches.shape)}"
            )
        y = y if y.dim() == 4 else y[:, :, None, None]
        y = y.reshape(batch, rows, columns, *y.shape[1:]).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(batch, y.shape[1], rows * y.shape[3], columns * y.shape[5])

    def lipschitz(self, constant: float, through: Through) -> float:
        return through(self.fn, constant)

    def plain(self) -> nn.Module:
        return _PlainPatches(self.fn, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class _PlainPatches(nn.Module):
    def __init__(self, fn: nn.Module, size: int) -> None:
        super().__init__()
        self.fn = fn
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        s, rows, columns = self.size, x.shape[2] // self.size, x.shape[3] // self.size
        patches = x.reshape(x.shape[0], x.shape[1], rows, s, columns, s).permute(0, 2, 4, 1, 3, 5)
        # A vector (M, C) becomes a picture of one pixel; behind a picture the two ones change nothing.
        y = self.fn(patches.reshape(-1, x.shape[1], s, s))[..., None, None]
        height, width = y.shape[2], y.shape[3]
        y = y.reshape(x.shape[0], rows, columns, y.shape[1], height, width).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(x.shape[0], y.shape[1], rows * height, columns * width)

    def lipschitz(self, constant: float, through: Through) -> float:
        return through(self.fn, constant)


class PadChannels(Brick):
    """Appends channels of zeros up to a given number: an isometry, for an entry or a widening of a stack of `SLL`.

    >>> PadChannels(3)(torch.ones(1, 1))
    tensor([[1., 0., 0.]])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = whole("channels", channels, "PadChannels fills up to a number of channels")

    def forward(self, x: Tensor) -> Tensor:
        missing = self.channels - x.shape[1]
        if missing < 0:
            raise ValueError(
                f"PadChannels({self.channels}) got {x.shape[1]} channels; it can only add some. To have fewer, use a "
                "1-Lipschitz layer such as lip.orthogonal(nn.Conv2d(...))"
            )
        return torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainPadChannels(self.channels)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class _PlainPadChannels(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x.movedim(1, -1), (0, self.channels - x.shape[1])).movedim(-1, 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant


class BatchCentering(Brick):
    """y = x − mean + bias, channel by channel: batch norm without the division, and so without its stretch.

    *In eval mode* the mean is a constant, the running one: y is a shift of x, an isometry for each sample. This is the
    mode that certificates speak of. *In training* the mean is the batch's, so a sample moves the outputs of its
    neighbours too: as a map of the whole batch it is an orthogonal projection (1-Lipschitz in the norm over the batch),
    with the other samples held fixed it is 1-Lipschitz in each, and within one batch all differences are kept.

    Under DistributedDataParallel each process centres its own share of the batch, as `nn.BatchNorm2d` does, and the
    running mean is that of process 0 (DDP broadcasts buffers).

    Args:
        channels: C, for inputs (N, C) or (N, C, ...).
        momentum: weight of the newest batch in the running mean. The first batches are averaged plainly until that
            weight is reached, so a short training leaves no trace of the initial zero.

    >>> BatchCentering(1)(torch.tensor([[1.0], [3.0]]))
    tensor([[-1.],
            [ 1.]], grad_fn=<AddBackward0>)
    """

    running_mean: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels = whole("channels", channels, "BatchCentering has a mean for each channel")
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"BatchCentering({self.channels}) got an input of shape {tuple(x.shape)}")
        mean = self._batch_mean(x) if self.training else self.running_mean
        column = (1, self.channels) + (1,) * (x.dim() - 2)
        return x - mean.view(column).to(x.dtype) + self.bias.view(column).to(x.dtype)

    def _batch_mean(self, x: Tensor) -> Tensor:
        if x.numel() <= self.channels:
            raise ValueError(
                f"in training, an input of shape {tuple(x.shape)} has one value a channel or none: centred, nothing "
                "would be left of it. Use larger batches, or drop the last one of an epoch"
            )
        mean = x.mean([d for d in range(x.dim()) if d != 1])
        with torch.no_grad():
            self.batches += 1
            weight = (1 / self.batches).clamp_min(self.momentum).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        return mean

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

    def plain(self) -> nn.Module:
        return _PlainBatchCentering(self.bias.detach() - self.running_mean)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, momentum={self.momentum}"


class _PlainBatchCentering(nn.Module):
    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        # Adding would repeat values where there are more or fewer channels: `unflatten` fails there, with the shape of
        # the trace, and `expand_as` with that of now.
        channels_last = x.movedim(1, -1).unflatten(-1, self.shift.shape)
        return (channels_last + self.shift.expand_as(channels_last)).movedim(-1, 1)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant

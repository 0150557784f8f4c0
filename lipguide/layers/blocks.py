"""Blocks that join layers without losing the bound: residual, concatenation, patches, centering, and SLL.

Each `forward` is its equation, with the factor that keeps it 1-Lipschitz in sight. Below them, what it takes to show
that other layers have no such bound: `stretch` and `most_stretched_pair`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.layers.sll import GramScale

__all__ = [
    "SLL",
    "BatchCentering",
    "Concat",
    "PadChannels",
    "Patches",
    "Residual",
    "SLLLinear",
    "most_stretched_pair",
    "stretch",
]


class Residual(nn.Module):
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


class Concat(nn.Module):
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


class Patches(nn.Module):
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
        if size < 1:
            raise ValueError(f"size is {size}: a patch has one pixel or more an axis")
        self.fn = fn
        self.size = size

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

    def extra_repr(self) -> str:
        return f"size={self.size}"


class PadChannels(nn.Module):
    """Appends channels of zeros up to a given number: an isometry, for an entry or a widening of a stack of `SLL`.

    >>> PadChannels(3)(torch.ones(1, 1))
    tensor([[1., 0., 0.]])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        missing = self.channels - x.shape[1]
        if missing < 0:
            raise ValueError(
                f"PadChannels({self.channels}) got {x.shape[1]} channels; it can only add some. To have fewer, use a "
                "1-Lipschitz layer such as lip.orthogonal(nn.Conv2d(...))"
            )
        return torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class BatchCentering(nn.Module):
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
        self.channels = channels
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"BatchCentering({self.channels}) got an input of shape {tuple(x.shape)}")
        mean = self._batch_mean(x) if self.training else self.running_mean
        column = (1, -1) + (1,) * (x.dim() - 2)
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

    def extra_repr(self) -> str:
        return f"channels={self.channels}, momentum={self.momentum}"


def _orthogonal_filters(inner: int, channels: int, kernel_size: int) -> Tensor:
    """Orthonormal rows, each at one tap of its own: an isometry that already looks in all directions."""
    filters = torch.zeros(inner, channels, kernel_size**2)
    taps = torch.randperm(inner) % kernel_size**2
    filters[torch.arange(inner), :, taps] = nn.init.orthogonal_(torch.empty(inner, channels))
    return filters.unflatten(2, (kernel_size, kernel_size))


class SLL(nn.Module):
    """y = x − 2 W T⁻¹ relu(Wᵀx + b): the SDP-based Lipschitz layer (Araujo et al., 2023) as a convolution.

    Written with V = W T^(-1/2), which `weight` holds transposed: y = x − 2 V relu(Vᵀx + b), ‖V‖ ≤ 1. (A positive T
    goes through the ReLU; b absorbs a factor.) The Jacobian is I − 2 V D Vᵀ with 0 ⪯ D ⪯ I, a symmetric matrix with
    eigenvalues in [−1, 1]: the block is residual and 1-Lipschitz without a half. Where V is an isometry the block
    reflects and keeps the norm of the gradient; so it is at initialisation, with orthonormal filters of one tap each,
    as long as `inner` ≤ `channels`.

    T is recomputed from the filters at every call (`GramScale`); within `torch.nn.utils.parametrize.cached()` once, and
    after `torch.nn.utils.parametrize.remove_parametrizations(block, "weight")` never: V is a plain weight then, and
    training it would lose the bound.

    The channels are kept. A 1-Lipschitz way to change them: `PadChannels` for more of them, `InvertibleDownSampling` to
    trade pixels for channels, a layer under `lip.orthogonal` or `lip.spectral` for fewer.

    Args:
        channels: of the input and of the output.
        inner: the number of filters, columns of W.
        kernel_size: of the filters, which are square; with circular padding an odd one.
        padding_mode: "zeros" or "circular"; the size of the picture is kept either way.
        iterations: of the Gram iteration, 0 for plain row sums. Each one more is tighter and dearer: 64 random 3×3
            filters over 64 channels reach ‖V‖ = 0.58, 0.73, 0.81, 0.92, 0.96, 0.97 with 0 to 5 of them, 0.36 with the
            T of the public code.

    >>> block = SLL(8, 8, 3)
    >>> y = block(torch.randn(2, 8, 5, 7))
    >>> y.shape, block.weight.shape
    (torch.Size([2, 8, 5, 7]), torch.Size([8, 8, 3, 3]))
    """

    def __init__(
        self, channels: int, inner: int, kernel_size: int = 3, padding_mode: str = "zeros", iterations: int = 3
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1:
            raise ValueError(f"kernel_size is {kernel_size}: the filters of SLL are square, so give it one number ≥ 1")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f'padding_mode is {padding_mode!r}: "zeros" and "circular" keep the bound')
        if padding_mode == "circular" and kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size is {kernel_size}: circular padding has as much on either side, which needs an odd one; "
                'use padding_mode="zeros" or an odd kernel'
            )
        self.channels, self.inner, self.kernel_size = channels, inner, kernel_size
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(_orthogonal_filters(inner, channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(inner))
        parametrize.register_parametrization(self, "weight", GramScale(inner, iterations))

    def forward(self, x: Tensor) -> Tensor:
        v, p = self.weight, self.kernel_size // 2
        if self.padding_mode == "zeros":
            z = F.relu(F.conv2d(x, v, self.bias, padding=p))
            return x - F.conv_transpose2d(z, 2 * v, padding=p)
        z = F.relu(F.conv2d(self._wrap(x), v, self.bias))
        return x - F.conv2d(self._wrap(z), 2 * v.transpose(0, 1).flip(2, 3))

    def _wrap(self, x: Tensor) -> Tensor:
        p = self.kernel_size // 2
        if min(x.shape[2:]) < p:
            raise ValueError(
                f"a picture of {x.shape[2]}×{x.shape[3]} is smaller than the circular padding of {p} that a kernel of "
                f'size {self.kernel_size} needs: use padding_mode="zeros" or a smaller kernel'
            )
        return F.pad(x, (p, p, p, p), mode="circular")

    def extra_repr(self) -> str:
        return f"{self.channels}, inner={self.inner}, kernel_size={self.kernel_size}, {self.padding_mode}"


class SLLLinear(nn.Module):
    """y = x − 2 W T⁻¹ relu(Wᵀx + b): `SLL` for vectors; `weight` holds Vᵀ = T^(-1/2) Wᵀ, and y = x − 2 V relu(Vᵀx + b).

    Args:
        features: of the input and of the output, the last dimension.
        inner: the number of filters, columns of W.
        iterations: of the Gram iteration; 0 is the T of the paper.

    >>> block = SLLLinear(2, 2, iterations=0)
    >>> block.parametrizations.weight.original.data = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    >>> block(torch.tensor([[1.0, 2.0]])).detach().round(decimals=3)
    tensor([[-1., -2.]])
    """

    def __init__(self, features: int, inner: int, iterations: int = 3) -> None:
        super().__init__()
        self.features, self.inner = features, inner
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(inner, features)))
        self.bias = nn.Parameter(torch.zeros(inner))
        parametrize.register_parametrization(self, "weight", GramScale(inner, iterations))

    def forward(self, x: Tensor) -> Tensor:
        v_t = self.weight
        return x - F.linear(F.relu(F.linear(x, v_t, self.bias)), 2 * v_t.T)

    def extra_repr(self) -> str:
        return f"{self.features}, inner={self.inner}"


class StretchedPair(NamedTuple):
    """Two inputs and by how much the function pulls them apart."""

    a: Tensor
    b: Tensor
    stretch: float


def stretch(fn: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """‖f(a) − f(b)‖ / ‖a − b‖: a lower bound of every Lipschitz constant of f.

    Each tensor is one point, batch and all: what batch norm does is visible. Random layers draw the same numbers for
    both points.

    >>> stretch(lambda x: x + x, torch.zeros(1, 3), torch.ones(1, 3))
    2.0
    """
    distance = torch.linalg.vector_norm((a - b).double())
    if distance == 0:
        raise ValueError("the two points are the same: give it two that differ")
    with torch.no_grad():
        apart = _same_draws(fn, a).double() - _same_draws(fn, b).double()
    return float(torch.linalg.vector_norm(apart) / distance)


def most_stretched_pair(
    fn: Callable[[Tensor], Tensor], start: Tensor, distance: float = 0.1, steps: int = 200, seed: int = 0
) -> StretchedPair:
    """Searches two points a given distance apart that f pulls apart as far as it can, by gradient ascent on both.

    A stretch above 1 disproves that f is 1-Lipschitz; one below 1 proves nothing. A module is searched as a copy in its
    present mode, so that a batch norm in training keeps its statistics.

    Args:
        fn: the function f, or a module.
        start: the first point a, one tensor, batch and all.
        distance: ‖a − b‖ in the L2 norm.
        steps: of Adam, each at a rate of a tenth of `distance`.
        seed: of the direction in which b lies at first.

    >>> most_stretched_pair(nn.Linear(4, 4), torch.randn(1, 4)).stretch > 0
    True
    """
    fn = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
    generator = torch.Generator().manual_seed(seed)
    a = start.detach().clone().requires_grad_()
    direction = torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device).requires_grad_()
    ascent = torch.optim.Adam([a, direction], lr=distance / 10, maximize=True)
    best = None
    for _ in range(steps + 1):
        b = a + distance * direction / torch.linalg.vector_norm(direction)
        pair = StretchedPair(a.detach().clone(), b.detach().clone(), stretch(fn, a.detach(), b.detach()))
        best = pair if best is None or pair.stretch > best.stretch else best
        apart = torch.linalg.vector_norm(_same_draws(fn, a) - _same_draws(fn, b))
        a.grad, direction.grad = torch.autograd.grad(apart, (a, direction))
        ascent.step()
    return best


def _same_draws(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[x.device.index] if x.is_cuda else []):
        torch.default_generator.manual_seed(0)
        if x.is_cuda:
            torch.cuda.default_generators[x.device.index].manual_seed(0)
        return fn(x)

"""SLL blocks, the SDP-based Lipschitz layers: residual and 1-Lipschitz without a half. `gram` has their scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.arguments import whole
from lipguide.layers.brick import Brick, Through
from lipguide.layers.export import are_fresh
from lipguide.layers.gram import GramScale
from lipguide.layers.norms import conv_norm, matrix_norm

__all__ = ["SLL", "SLLLinear"]


def _orthogonal_filters(inner: int, channels: int, kernel_size: int) -> Tensor:
    """Orthonormal rows, each at one tap of its own: an isometry that already looks in all directions."""
    filters = torch.zeros(inner, channels, kernel_size**2)
    taps = torch.randperm(inner) % kernel_size**2
    filters[torch.arange(inner), :, taps] = nn.init.orthogonal_(torch.empty(inner, channels))
    return filters.unflatten(2, (kernel_size, kernel_size))


def _even_circle(kernel_size: int) -> str:
    return (
        f"kernel_size is {kernel_size}: circular padding has as much on either side, which needs an odd one; "
        'use padding_mode="zeros" or an odd kernel'
    )


def _scaled_by_gram(block: SLL | SLLLinear) -> bool:
    """Is V what `GramScale` makes of the filters now? Another may come out of a cache."""
    if not parametrize.is_parametrized(block, "weight"):
        return False
    held = block.parametrizations.weight
    if [type(part) for part in held] != [GramScale]:
        return False
    if held[0].training:  # then V may lie above 1
        return False
    if are_fresh():
        return True
    with torch.no_grad():
        return torch.equal(held[0](held.original), block.weight)


def _plain_constant(v: Tensor) -> float:
    """max(1, 2‖V‖² − 1), the constant of x − 2 V relu(Vᵀx + b): its Jacobian I − 2 V D Vᵀ is symmetric, 0 ⪯ D ⪯ I."""
    norm = matrix_norm(v) if v.dim() == 2 else conv_norm(v)
    return max(1.0, 2 * norm**2 - 1)


class SLL(Brick):
    """y = x − 2 W T⁻¹ relu(Wᵀx + b): the SDP-based Lipschitz layer (Araujo et al., 2023) as a convolution.

    Written with V = W T^(-1/2), which `weight` holds transposed: y = x − 2 V relu(Vᵀx + b), ‖V‖ ≤ 1. (A positive T
    goes through the ReLU; b absorbs a factor.) The Jacobian is I − 2 V D Vᵀ with 0 ⪯ D ⪯ I, a symmetric matrix with
    eigenvalues in [−1, 1]: the block is residual and 1-Lipschitz without a half. Where V is an isometry the block
    reflects and keeps the norm of the gradient; so it is at initialisation, with orthonormal filters of one tap each,
    as long as `inner` ≤ `channels`.

    T is recomputed from the filters at every call (`GramScale`): proved in eval mode, and in training on the few
    frequencies that matter, so that V may lie a little above 1. Within `torch.nn.utils.parametrize.cached()` it is
    computed once, and after `torch.nn.utils.parametrize.remove_parametrizations(block, "weight")` never: V is a plain
    weight then, and training it would lose the bound.

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
        self.channels = whole("channels", channels, "SLL keeps a number of channels")
        self.inner = whole("inner", inner, "SLL has one filter or more")
        self.kernel_size = whole("kernel_size", kernel_size, "the filters of SLL are square")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f'padding_mode is {padding_mode!r}: "zeros" and "circular" keep the bound')
        if padding_mode == "circular" and kernel_size % 2 == 0:
            raise ValueError(_even_circle(kernel_size))
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(_orthogonal_filters(inner, channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(inner))
        parametrize.register_parametrization(self, "weight", GramScale(self.weight.shape, iterations))

    def forward(self, x: Tensor) -> Tensor:
        v = self.weight
        p = self._padding(v)
        if self.padding_mode == "zeros":
            z = F.relu(F.conv2d(x, v, self.bias, padding=p))
            return x - F.conv_transpose2d(z, 2 * v, padding=p)
        z = F.relu(F.conv2d(self._wrap(x, p), v, self.bias))
        return x - F.conv2d(self._wrap(z, p), 2 * v.transpose(0, 1).flip(2, 3))

    def _padding(self, v: Tensor) -> int:
        """That of the kernel at hand: with any other the two convolutions would not be each other's adjoint."""
        k = v.shape[2]
        if k != self.kernel_size or self.padding_mode not in ("zeros", "circular"):
            raise ValueError(
                f"an SLL block with a kernel of size {k} now says kernel_size={self.kernel_size!r} and "
                f"padding_mode={self.padding_mode!r}: build a new block instead of changing these"
            )
        if self.padding_mode == "circular" and k % 2 == 0:
            raise ValueError(_even_circle(k))
        return k // 2

    def _wrap(self, x: Tensor, p: int) -> Tensor:
        if min(x.shape[2:]) < p:
            raise ValueError(
                f"a picture of {x.shape[2]}×{x.shape[3]} is smaller than the circular padding of {p} that a kernel of "
                f'size {self.kernel_size} needs: use padding_mode="zeros" or a smaller kernel'
            )
        return F.pad(x, (p, p, p, p), mode="circular")

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant if _scaled_by_gram(self) else constant * _plain_constant(self.weight)

    def plain(self) -> nn.Module:
        self._padding(self.weight)
        twin = _PlainSLL if self.padding_mode == "zeros" else _PlainCircularSLL
        return twin(self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, inner={self.inner}, kernel_size={self.kernel_size}, {self.padding_mode}"


class SLLLinear(Brick):
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
        self.features = whole("features", features, "SLLLinear keeps a number of features")
        self.inner = whole("inner", inner, "SLLLinear has one filter or more")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(inner, features)))
        self.bias = nn.Parameter(torch.zeros(inner))
        parametrize.register_parametrization(self, "weight", GramScale(self.weight.shape, iterations))

    def forward(self, x: Tensor) -> Tensor:
        v_t = self.weight
        return x - F.linear(F.relu(F.linear(x, v_t, self.bias)), 2 * v_t.T)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant if _scaled_by_gram(self) else constant * _plain_constant(self.weight)

    def plain(self) -> nn.Module:
        return _PlainSLLLinear(self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.features}, inner={self.inner}"


class _PlainSLL(nn.Module):
    """y = x − 2 V relu(Vᵀx + b) with Vᵀ in `weight`; the padding follows the kernel, so the shape is always kept."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        p = self.weight.shape[2] // 2
        z = F.relu(F.conv2d(x, self.weight, self.bias, padding=p))
        return x - F.conv_transpose2d(z, 2 * self.weight, padding=p)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant * _plain_constant(self.weight)


class _PlainCircularSLL(_PlainSLL):
    def forward(self, x: Tensor) -> Tensor:
        p = self.weight.shape[2] // 2
        z = F.relu(F.conv2d(F.pad(x, (p, p, p, p), mode="circular"), self.weight, self.bias))
        back = 2 * self.weight.transpose(0, 1).flip(2, 3)
        return x - F.conv2d(F.pad(z, (p, p, p, p), mode="circular"), back)

    def lipschitz(self, constant: float, through: Through) -> float:
        rows, columns = self.weight.shape[2:]
        if rows != columns or rows % 2 == 0:
            raise ValueError(f"a kernel of {rows}×{columns} does not keep the shape of a circle: give it an odd square")
        return constant * _plain_constant(self.weight)


class _PlainSLLLinear(_PlainSLL):
    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(F.linear(x, self.weight, self.bias))
        return x - F.linear(z, 2 * self.weight.T)

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant * _plain_constant(self.weight)

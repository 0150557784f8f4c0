"""The scale of an SLL block: a diagonal T ⪰ WᵀW, by Gram iteration, for matrices and for convolutions.

    ‖W T^(-1/2)‖ ≤ 1  ⟺  WᵀW ⪯ T

A diagonal T leaves each filter a scale of its own, which one spectral norm for all of them would not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.layers.arguments import whole
from lipguide.layers.brick import Brick, Through
from lipguide.layers.constraints import Constraint
from lipguide.layers.norms import conv_norm, matrix_norm

__all__ = ["SLL", "GramScale", "SLLLinear", "between_frequencies", "diagonal_bound"]

FLOAT32_ROOM = 2**8  # units of rounding by which V is made smaller
LEAST_DENSITY = 4  # frequencies of the grid a wavelength


class GramScale(Constraint):
    """The parametrization of SLL: turns free filters K = Wᵀ into V with ‖V‖ ≤ 1, as V = T^(-1/2) Q K.

    T is a diagonal matrix with T ⪰ G = (QK)(QK)ᴴ, which says just that ‖V‖ ≤ 1. It is found in three steps.

    1. *Row sums.* For a symmetric A, diag(Σ_j |A_ij|) ⪰ A, because 2|x_i||x_j| ≤ x_i² + x_j².
    2. *Gram iteration.* With A = G^p, p = 2^iterations: G^p ⪯ D implies G ⪯ D^(1/p) (Löwner and Heinz: roots keep
       the order of positive matrices), and D^(1/p) is diagonal as D is. The surplus of the row sums, up to a factor
       √n, is rooted away: the larger p, the tighter.
    3. *Learned q.* Q = diag(q), q = exp(log_q) > 0, enters before the powers are taken, as QGQ. The block depends on
       q only through Q T^(-1) Q, whose diagonal at p = 1 is 1 / Σ_j |KKᵀ|_ij q_j/q_i: the T of the SLL paper, whose
       public code divides q out again. After the powers, q would be rooted away with the rest. q adds no function
       that other filters could not give (q_i K_i is a filter as well); it lets the share that each filter has of the
       bound be learned on a scale of its own.

    A *convolution* has one such G per frequency ω, and T must serve them all. It is computed on a grid of N = (k − 1)ρ
    frequencies an axis, with a density ρ that grows with the iterations. *Between them*: let M = sup ‖V(ω)‖, attained
    at ω* by unit vectors u, v. Along one axis, Re(uᴴV(ω)v) is a trigonometric polynomial of degree d = (k − 1)/2, with
    taps counted from the centre, and never above M in modulus: from its maximum it falls no faster than M cos(d·) (M.
    Riesz; where k is even and d a half, the polynomial is one in ω/2, of degree 2d). A grid point lies within π/N, so
    ‖V‖ ≥ M cosθ where this axis is on the grid, θ = πd/N = π/(2ρ). In the same way along the other axis, 1 ≥ ‖V‖ ≥ M
    cos²θ somewhere on the grid: M ≤ 1/cos²θ. A constant part needs no such allowance. Shift each filter so that its
    largest tap, its own, is at 0: that multiplies the rows of V(ω) by phases, which leaves ‖V(ω)‖ as it is, and at most
    doubles d. If the other taps have norm at most b together, Re(uᴴV(ω)v) stays within ±b of a constant, the same
    argument about its mid-range shows a fall of at most b(1 − cos2θ) an axis, and M ≤ 1 + 2b(1 − cos2θ): nothing is
    lost on filters of one tap each. V is divided by the smaller of the two.
    *At the border*: zero padding restricts the operator on the infinite lattice, circular padding samples its
    frequencies, so ‖V‖ ≤ 1 holds for pictures of every size.

    *Rounding*: all this runs in float32 or better. V is made smaller by 2⁻¹⁵, a few hundred times that rounding, and in
    half precision by the room that its own rounding takes (`rounded`).

    Args:
        inner: the number of filters.
        iterations: of the Gram iteration, 0 for plain row sums.
    """

    def __init__(self, inner: int, iterations: int) -> None:
        super().__init__()
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}: 0 takes plain row sums, each one more is tighter")
        self.iterations = iterations
        self.density = max(LEAST_DENSITY, 2 * iterations)  # so that neither source of slack outweighs the other
        self.log_q = nn.Parameter(torch.zeros(inner))

    def constrained(self, filters: Tensor) -> Tensor:
        log_q = self.log_q.to(filters.dtype)
        # V depends on the directions in Q K, not on its size: with a largest entry of 1, no power overflows.
        q = torch.exp(log_q - log_q.detach().amax())
        kernel = filters * _column(q, filters)
        kernel = kernel / _nonzero(kernel.detach().abs().amax())
        real, imag = _symbol(kernel, self.density)
        t = diagonal_bound(real, imag, self.iterations)  # (filters,)
        v = kernel / _column(t.sqrt(), kernel)
        return v / between_frequencies(v, self.density)

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """V in the precision of the layer, a little smaller, so that its norm is at most 1 after rounding too."""
        room = FLOAT32_ROOM * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        if dtype in (torch.float16, torch.bfloat16):
            with torch.no_grad():
                room = room + self._room_for(weight, dtype)
        return (weight / (1 + room)).to(dtype)

    def _room_for(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """By how much V must be smaller so that half precision, which adds an error E to it, leaves ‖V + E‖ ≤ 1.

        One unit of rounding is enough for nearly every V: take it if the norm of the E that it brings is proved to be
        small enough. If not, take the room that is enough for any E, with |E_ij| ≤ ½ unit |V_ij| or ½ the smallest
        number, from Schur's bound of ‖|V|‖.
        """
        unit, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        smaller = v / (1 + unit + FLOAT32_ROOM * torch.finfo(torch.float32).eps)
        error = smaller.to(dtype).to(v.dtype) - smaller
        fits = 1 / (1 + unit) + self._norm(error) <= 1

        taps = v.abs().flatten(2).sum(2) if v.dim() > 2 else v.abs()  # (filters, channels)
        schur = (taps.sum(0).amax() * taps.sum(1).amax()).sqrt()
        any_error = unit / 2 * schur
        below_the_smallest = smallest / 2 * (v.numel() / v.shape[0] * v.numel() / v.shape[1]) ** 0.5
        return torch.where(fits, unit, any_error + 2 * below_the_smallest * (1 + any_error))

    def _norm(self, kernel: Tensor) -> Tensor:
        """Upper bound of the norm of any kernel, from the same row sums."""
        largest = _nonzero(kernel.abs().amax())
        real, imag = _symbol(kernel / largest, self.density)
        on_grid = diagonal_bound(real, imag, self.iterations).amax().sqrt()
        return largest * on_grid / math.cos(math.pi / (2 * self.density)) ** 2


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value == 0, 1.0, value)


def _symbol(kernel: Tensor, density: int) -> tuple[Tensor, Tensor | None]:
    """F = R + iI, the filters at the frequencies of the grid: matrices (frequencies, n, c), one half of them all."""
    if kernel.dim() == 2 or kernel.shape[-1] == 1:
        return kernel.flatten(1)[None], None
    filters, channels, _, k = kernel.shape
    places = torch.arange(k, device=kernel.device, dtype=torch.float64)
    side = density * (k - 1)
    turns = torch.arange(side, device=kernel.device, dtype=torch.float64) * (2 * math.pi / side)
    frequencies = torch.cartesian_prod(turns, turns[: side // 2 + 1])  # (frequencies, 2)
    angles = frequencies @ torch.cartesian_prod(places, places).T  # (frequencies, taps)
    taps = kernel.flatten(2).permute(2, 0, 1).flatten(1)  # (taps, n · c)
    real = angles.cos().to(kernel) @ taps
    imag = angles.sin().to(kernel) @ taps
    return real.view(-1, filters, channels), imag.view(-1, filters, channels)


def diagonal_bound(real: Tensor, imag: Tensor | None, iterations: int) -> Tensor:
    """The diagonal of a T ⪰ FFᴴ for each of the matrices F = R + iI in (frequencies, n, c).

    Each entry of T is set by the one frequency where it is largest, so the gradient needs only those few: the powers
    are taken at all frequencies without a gradient, and once more with one where it matters.

    >>> diagonal_bound(torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), None, iterations=0)
    tensor([3., 2.])
    """
    has_gradient = torch.is_grad_enabled() and real.requires_grad
    if imag is None or not has_gradient:
        return _log_row_sums(real, imag, iterations).amax(0).exp()
    with torch.no_grad():
        log_bound, frequency = _log_row_sums(real, imag, iterations).max(0)
    where = frequency.unique()
    with_gradient = _log_row_sums(real[where], imag[where], iterations).amax(0)
    return (log_bound + (with_gradient - with_gradient.detach())).exp()


def _log_row_sums(real: Tensor, imag: Tensor | None, iterations: int) -> Tensor:
    """log D(ω)^(1/p) as (frequencies, n), with D the row sums of |(FFᴴ)^p|.

    p = 2^iterations, or one more where F is tall: the powers of a tall F cost less on its other side, where
    (FFᴴ)^(p + 1) = F (FᴴF)^p Fᴴ.
    """
    tall = iterations > 0 and real.shape[-2] > real.shape[-1]
    gram = _times_adjoint(*_adjoint(real, imag)) if tall else _times_adjoint(real, imag)
    log_size = real.new_zeros(())
    for _ in range(iterations):
        # The largest diagonal entry is the largest of all, and at most the largest eigenvalue: scaled by it, the
        # next power neither overflows nor fades.
        diagonal = gram[0].detach().diagonal(dim1=-2, dim2=-1)
        size = _nonzero(diagonal.amax())
        gram = _times_adjoint(*_divided(gram, size))
        log_size = 2 * (log_size + size.log())
    if tall:
        f = _complex(real, imag)
        modulus = (f @ _complex(*gram) @ f.mH).abs()
    else:
        modulus = _modulus(*gram)
    # Rows that are small, raised to a high power, can vanish below the smallest number: never count them as zero.
    vanished = torch.finfo(real.dtype).tiny * 2**26
    power = 2**iterations + 1 if tall else 2**iterations
    return ((modulus.sum(-1) + vanished).log() + log_size) / power


# Complex matrices as a real and an imaginary part; None in place of the second where all are real.


def _times_adjoint(real: Tensor, imag: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """FFᴴ = RRᵀ + IIᵀ + i (IRᵀ − RIᵀ); of a Hermitian F that is F². Three real products, a complex one has four."""
    if imag is None:
        return real @ real.mT, None
    both = torch.cat((real, imag), -1)
    cross = imag @ real.mT
    return both @ both.mT, cross - cross.mT


def _adjoint(real: Tensor, imag: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if imag is None:
        return real.mT, None
    return real.mT, -imag.mT


def _divided(gram: tuple[Tensor, Tensor | None], size: Tensor) -> tuple[Tensor, Tensor | None]:
    real, imag = gram
    if imag is None:
        return real / size, None
    return real / size, imag / size


def _complex(real: Tensor, imag: Tensor | None) -> Tensor:
    return real if imag is None else torch.complex(real, imag)


def _modulus(real: Tensor, imag: Tensor | None) -> Tensor:
    if imag is None:
        return real.abs()
    # hypot has no slope at (0, 0); one smallest number away from it has one. (A complex abs is four times slower.)
    return torch.hypot(real, imag + torch.finfo(real.dtype).tiny)


def between_frequencies(v: Tensor, density: int) -> Tensor:
    """Upper bound of the norm of a convolution V whose symbol has norm at most 1 on the grid (see `GramScale`).

    >>> between_frequencies(torch.ones(1, 1, 3, 3) / 9, density=6)
    tensor(1.0718)
    """
    if v.dim() == 2 or v.shape[-1] == 1:
        return v.new_ones(())
    theta = math.pi / (2 * density)
    taps = v.abs().flatten(2)  # (filters, channels, taps)
    own = taps.detach().sum(1).argmax(1)  # the largest tap of each filter
    own_taps = taps.gather(2, own.view(-1, 1, 1).expand(*v.shape[:2], 1))[:, :, 0]
    others = taps.sum(2) - own_taps  # (filters, channels)
    b = (others.sum(0).amax() + others.sum(1).amax()) / 2  # Schur's bound, ‖A‖² ≤ ‖A‖₁ ‖A‖_∞, and means
    around_a_constant = 1 + 2 * b * (1 - math.cos(2 * theta))
    return around_a_constant.clamp_max(1 / math.cos(theta) ** 2)


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
        parametrize.register_parametrization(self, "weight", GramScale(inner, iterations))

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
        parametrize.register_parametrization(self, "weight", GramScale(inner, iterations))

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

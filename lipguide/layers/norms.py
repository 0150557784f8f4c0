"""Sound and tight norms of linear maps: what `lip.spectral` divides by and what `lip.lipschitz_bound` multiplies.

A convolution on the infinite grid is diagonal in frequency: at ω it multiplies by the matrix
Ŵ(ω) = Σ_t W_t e^{i⟨ω, t⟩}, so its norm is M = max_ω σ_max(Ŵ(ω)). Zero padding only restricts that map and circular
padding only samples its frequencies, so M bounds the layer on pictures of every size.

M is enclosed from both sides. *Below*: σ_max at any frequency. *Above*: for unit vectors u, v the function
Re(uᴴ Ŵ(ω) v) is, up to a phase, a sum of exponentials of degree at most d = (k − 1) / 2 an axis, so it cannot fall
faster than a cosine from its maximum (Duffin and Schaeffer): at a place δ away from the maximiser,
σ_max(Ŵ) ≥ M cos(d|δ₁| + d|δ₂|). Cover the frequencies with cells d|δ₁| + d|δ₂| ≤ r, which are diamonds. One whose
centre has σ_max < τ cos(r) cannot hold the maximiser of any M ≥ τ. One Cholesky factorisation of τ² cos²(r) I − ŴᴴŴ
proves that inequality; a cell that fails is split in four. When every cell is proved, M < τ.

On a *picture of given size* the norm is smaller, by several per cent where the picture is small or the kernel large.
Let x live on n₁×n₂ pixels and embed it in a circle of P = n + k − 1 pixels an axis, where nothing wraps around onto the
result. There ‖Wx‖² is the mean over the P₁P₂ frequencies of ‖Ŵ(ω) x̂(ω)‖² ≤ λ(ω) ‖x̂(ω)‖² with λ = σ_max², and that
mean is ⟨x, T x⟩ with T the n₁n₂×n₁n₂ matrix of entries λ̌(p − q), λ̌ being the inverse Fourier transform of λ. So the
largest eigenvalue of one small matrix bounds the layer: `picture_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lipguide.layers.geometry import Geometry

__all__ = ["aol_norm", "check_finite", "conv_norm", "matrix_norm", "picture_norm"]

MEMORY = 2**21  # complex numbers held at once
CUSHION = 1e-7  # relative: far above the rounding of float64, far below any tolerance asked for
LEAST_TOLERANCE = 1e-6  # below it the first cells are millions, and the cushion is no longer small beside it
ROUNDS = 30
LARGEST_PICTURE = 2304  # pixels for which `picture_norm` solves an eigenvalue problem of that size
CLIMB = 16  # steps of the search for the maximiser
FIRST_STEP, SHRINK = 0.3, 0.8  # of that search, in units of 1 / degree; each step is shorter than the one before

Pair = tuple[int, int]
Degree = tuple[float, float]


def matrix_norm(weight: Tensor) -> float:
    """Upper bound of the largest singular value of a matrix, tight to 1e-7.

    >>> matrix_norm(torch.diag(torch.tensor([3.0, 4.0]))) >= 4.0
    True
    """
    check_finite(weight)
    matrix, scale = _at_scale_one(weight.detach().double())
    if not scale:
        return 0.0
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return scale * math.sqrt(largest) * (1 + CUSHION)


def aol_norm(kernel: Tensor) -> float:
    """√ max_i Σ_j |K ⋆ K|_ij over a polyphase kernel: a cheap upper bound, exact for orthogonal convolutions.

    >>> delta = torch.zeros(1, 2, 2, 3, 3)
    >>> delta[0, 0, 0, 1, 1] = delta[0, 1, 1, 0, 2] = 1
    >>> round(aol_norm(delta), 6)
    1.0
    """
    return _row_sum_norm(_correlation(kernel.double()))


def conv_norm(
    weight: Tensor,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
    tolerance: float = 3e-3,
) -> float:
    """Upper bound of the norm of a convolution, for zero or circular padding and pictures of every size.

    It exceeds the norm on an infinitely large picture by at most the relative `tolerance`. The norm of a transposed
    convolution is that of the convolution with the same weight.

    Args:
        weight: the kernel (outputs, inputs / groups, height, width), as torch stores it.
        stride, dilation, groups: those of the layer.
        tolerance: how far above the true norm the bound may lie, relatively.

    >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
    >>> 1.0 <= conv_norm(blur) <= 1.003
    True
    """
    check_finite(weight)
    if not LEAST_TOLERANCE <= tolerance < math.inf:
        raise ValueError(
            f"tolerance is {tolerance}: the proof takes ever more time and memory as it shrinks; give one of "
            f"{LEAST_TOLERANCE} or more, such as 3e-3"
        )
    geometry = Geometry(tuple(weight.shape[2:]), stride, dilation, groups).undilated()
    kernel, scale = _at_scale_one(geometry.polyphase(weight.detach().double()))
    if not scale:
        return 0.0
    return scale * _torus_norm(kernel, tolerance)


def picture_norm(
    weight: Tensor,
    size: Pair,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
    circular: bool = False,
) -> float:
    """Upper bound of the norm of a convolution whose outputs are pictures of a given size; tight for small pictures.

    With zero padding, any of it, the bound of the module's introduction: for 3×3 kernels within a thousandth of the
    norm from 16×16 pixels on. A convolution with circular padding that keeps the size (or divides it by the stride) is
    diagonal at the frequencies of its own circle, and the bound is its norm.

    Args:
        weight, stride, dilation, groups: as in `conv_norm`.
        size: rows and columns of the outputs; of the inputs if the layer is a transposed convolution.
        circular: whether the padding is circular and complete.

    >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
    >>> picture_norm(blur, (4, 4)) < 0.88 < picture_norm(blur, (4, 4), circular=True)
    True
    """
    check_finite(weight)
    geometry = Geometry(tuple(weight.shape[2:]), stride, dilation, groups)
    if not circular:
        size, geometry = geometry.apart(size), geometry.undilated()
    kernel, scale = _at_scale_one(geometry.polyphase(weight.detach().double()))
    if not scale:
        return 0.0
    if circular:
        largest = float(_squares_on_circle(kernel, size).amax())
        return scale * math.sqrt(largest) * (1 + CUSHION)
    circle = size[0] + kernel.shape[3] - 1, size[1] + kernel.shape[4] - 1
    largest = _largest_on_picture(_squares_on_circle(kernel, circle), size)
    return scale * math.sqrt(max(0.0, largest)) * (1 + CUSHION)


def check_finite(weight: Tensor) -> None:
    """A NaN or an infinity in a weight has no norm: say so rather than certify it.

    >>> check_finite(torch.tensor([math.nan]))
    Traceback (most recent call last):
    ValueError: a weight of shape (1,) holds NaN or infinite values, so no norm can be certified; ...
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values, so no norm can be certified; "
            "the training that made it has diverged"
        )


def _at_scale_one(kernel: Tensor) -> tuple[Tensor, float]:
    """The kernel with a largest entry of 1, and what that was: a Gram matrix of others would leave float64's range."""
    if kernel.numel() == 0:
        return kernel, 0.0
    scale = float(kernel.abs().amax())
    if scale == 0:
        return kernel, 0.0
    return kernel / scale, scale


# The Gram matrices ŴŴᴴ of a kernel, at any frequency.


def _correlation(kernel: Tensor) -> Tensor:
    """The taps G_l = Σ_s K_{s+l} K_sᵀ of ŴŴᴴ = Σ_l G_l e^{i⟨ω, l⟩}, as (groups, n, n, l₁, l₂).

    Where there are fewer inputs than outputs, those of Ŵᵀ, which has the same norm.
    """
    if kernel.shape[2] < kernel.shape[1]:
        kernel = kernel.transpose(1, 2)
    groups, n, _, height, width = kernel.shape
    stacked = kernel.permute(0, 3, 4, 1, 2).flatten(1, 3)  # (groups, taps · n, m)
    lags = kernel.new_zeros(groups, 2 * height - 1, 2 * width - 1, n, n)
    for row in range(height):
        for column in range(width):
            tap = kernel[:, :, :, row, column]  # (groups, n, m)
            products = (stacked @ tap.mT).reshape(groups, height, width, n, n)
            # K_{s+l} K_sᵀ with s = (row, column) belongs to the lags l = −s … (height, width) − 1 − s.
            first_row, first_column = height - 1 - row, width - 1 - column
            lags[:, first_row : first_row + height, first_column : first_column + width] += products
    return lags.permute(0, 3, 4, 1, 2)


def _row_sum_norm(correlation: Tensor) -> float:
    sums = correlation.abs().sum((2, 3, 4))  # (groups, n)
    return math.sqrt(float(sums.amax())) * (1 + CUSHION)


def _filter_norm(correlation: Tensor) -> float:
    """The norm of the largest single filter, which is a lower bound of the norm: what an impulse becomes."""
    at_lag_zero = correlation[..., correlation.shape[3] // 2, correlation.shape[4] // 2]  # (groups, n, n)
    return math.sqrt(float(at_lag_zero.diagonal(dim1=1, dim2=2).amax()))


def _grams(correlation: Tensor, cells: Tensor) -> Iterator[Tensor]:
    """ŴᴴŴ or ŴŴᴴ at the given frequencies (cells, 2), in pieces of shape (cells, groups, n, n)."""
    groups, n, _, height, width = correlation.shape
    lags = _centred_places(height, width, cells.device)  # (lags, 2)
    # G_{−l} = G_lᵀ, so one half of the lags will do: cosines for the symmetric part, sines for the other.
    middle = len(lags) // 2
    lags = lags[middle:]
    taps = correlation.flatten(3).permute(3, 0, 1, 2)[middle:]  # (half of the lags, groups, n, n)
    even = (taps + taps.mT).flatten(1)
    odd = (taps - taps.mT).flatten(1)
    even[0] /= 2  # lag 0 has no partner
    for piece in cells.split(max(1, MEMORY // (groups * n * n))):
        angles = piece @ lags.T  # (cells, half of the lags)
        gram = torch.complex(angles.cos() @ even, angles.sin() @ odd)
        yield gram.reshape(len(piece), groups, n, n)


def _centred_places(height: int, width: int, device: torch.device) -> Tensor:
    """The places (height · width, 2) of a grid around its middle, row by row."""
    rows = torch.arange(height, device=device).double() - (height - 1) / 2
    columns = torch.arange(width, device=device).double() - (width - 1) / 2
    return torch.cartesian_prod(rows, columns)


# Pictures of every size: M is enclosed from below and from above.


def _torus_norm(kernel: Tensor, tolerance: float) -> float:
    degree = (kernel.shape[3] - 1) / 2, (kernel.shape[4] - 1) / 2
    correlation = _correlation(kernel)
    easy = _row_sum_norm(correlation)
    if easy <= _filter_norm(correlation) * (1 + tolerance):
        return easy
    best = _climb(kernel, _start(degree, kernel.device))
    # At a radius of acos(1 / (1 + tolerance)) no cell can fail if `best` is the maximum: begin with four times that,
    # and in any case well below π/2, where a cosine would change its sign.
    radius = min(1.0, 4 * math.acos(1 / (1 + tolerance)))
    cells, reach = _first_cells(degree, radius, kernel.device)
    for _ in range(ROUNDS):
        target = best * (1 + tolerance)
        if easy <= target:
            return easy
        # A cell may be given up if its centre has σ_max < target · cos(r), with r the cell's radius.
        slack = math.cos(max(degree[0] * reach[0], degree[1] * reach[1]))
        proved = [_below(gram, target * slack) for gram in _grams(correlation, cells)]
        cells = cells[~torch.cat(proved)]
        if len(cells) == 0:
            return target * (1 + CUSHION)
        some = cells[:: math.ceil(len(cells) / 16)]
        best = max(best, _climb(kernel, some))
        cells, reach = _split(cells, reach, degree)
    return easy  # never seen in practice; the loose bound is sound all the same


def _below(gram: Tensor, limit: float) -> Tensor:
    """For each cell: is σ_max < limit proved, in every group, by a Cholesky factorisation of limit² I − Gram?"""
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(limit**2)
    failed_at = torch.linalg.cholesky_ex(shifted).info  # (cells, groups), 0 where there is a factorisation
    return (failed_at == 0).all(dim=1)


def _first_cells(degree: Degree, radius: float, device: torch.device) -> tuple[Tensor, Degree]:
    """Centres (cells, 2) and half-diagonals of diamonds that cover half of the frequencies; the others mirror them."""
    counts = [1, 1]  # an axis on which the kernel has one tap has a constant symbol: it needs no cells
    spacing = [0.0, 0.0]
    for axis in (0, 1):
        if degree[axis] > 0:
            counts[axis] = 2 * math.ceil(math.pi * degree[axis] / radius)
            spacing[axis] = 2 * math.pi / counts[axis]
    rows, columns = _halved(counts, degree)
    places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    places = places[places.sum(1) % 2 == 0]  # the centres of diamonds make a chessboard
    centres = places * torch.tensor(spacing, device=device, dtype=torch.float64)
    return centres, (spacing[0], spacing[1])


def _halved(counts: list[int], degree: Degree) -> list[int]:
    """The counts, with the last axis that has more than one tap cut in half, its ends included."""
    mirrored = 0 if degree[1] == 0 else 1
    return [n // 2 + 1 if axis == mirrored else n for axis, n in enumerate(counts)]


def _split(cells: Tensor, reach: Degree, degree: Degree) -> tuple[Tensor, Degree]:
    """Each diamond becomes four of half its size, whose centres lie towards its corners."""
    half = (reach[0] / 2, reach[1] / 2)
    steps = []
    if degree[0] > 0:
        steps += [(-half[0], 0.0), (half[0], 0.0)]
    if degree[1] > 0:
        steps += [(0.0, -half[1]), (0.0, half[1])]
    if not steps:
        steps = [(0.0, 0.0)]
    offsets = torch.tensor(steps, device=cells.device, dtype=torch.float64)
    return (cells[:, None] + offsets).reshape(-1, 2), half


def _start(degree: Degree, device: torch.device) -> Tensor:
    """Frequencies (places, 2) from which to look for the maximiser: two a wavelength and a few more."""
    counts = [1 if d == 0 else int(4 * d + 4) for d in degree]
    rows, columns = _halved(counts, degree)
    down = 2 * math.pi * torch.arange(rows, device=device).double() / counts[0]
    across = 2 * math.pi * torch.arange(columns, device=device).double() / counts[1]
    return torch.cartesian_prod(down, across)


def _climb(kernel: Tensor, start: Tensor) -> float:
    """The largest σ_max(Ŵ(ω)) found by power steps that move ω uphill as well: a lower bound of the norm.

    The search runs in float32. What it finds is evaluated in float64 at the end, so nothing rests on its rounding.
    """
    groups, outputs, inputs, height, width = kernel.shape
    taps = _centred_places(height, width, kernel.device)
    rows = kernel.float().permute(0, 3, 4, 1, 2).flatten(1, 3)  # (groups, taps · outputs, inputs)
    start = start[:: math.ceil(9 * len(start) * len(taps) * groups / MEMORY)]  # fewer where many would not fit
    omega = start.expand(groups, -1, 2)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(groups, inputs, len(start), 2, generator=generator, dtype=torch.float32)
    v = torch.view_as_complex(v.to(kernel.device))  # (groups, inputs, places)
    for step in range(CLIMB):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-30)
        products = _real_product(rows, v).unflatten(1, (len(taps), outputs))  # W_t v: (groups, taps, outputs, places)
        length = FIRST_STEP * SHRINK**step / max(1.0, (max(height, width) - 1) / 2)
        omega = _uphill(omega, products, taps, length)
        # u ← Ŵ(ω) v, then v ← Ŵ(ω)ᴴ u, at the new ω
        waves = _waves(omega, taps)  # (groups, taps, 1, places)
        u = (products * waves).sum(1)  # (groups, outputs, places)
        v = _real_product(rows.mT, (u[:, None] * waves.conj()).flatten(1, 2))
    found = torch.linalg.vector_norm(u, dim=1)  # (groups, places)
    best = found.flatten().topk(min(4, found.numel())).indices
    group, place = best // found.shape[1], best % found.shape[1]
    return _largest_of(kernel[group], omega[group, place], taps)


def _uphill(omega: Tensor, products: Tensor, taps: Tensor, length: float) -> Tensor:
    """Of each frequency and its eight neighbours the one where |uᴴ Ŵ(ω) v| is largest, with u = Ŵ(ω) v held fixed.

    There it is a short trigonometric sum, Σ_t (uᴴ W_t v) e^{i⟨ω, t⟩}.

    Args:
        omega: (groups, places, 2).
        products: W_t v as (groups, taps, outputs, places).
        taps: (taps, 2).
        length: of one move along an axis.
    """
    u = (products * _waves(omega, taps)).sum(1)  # (groups, outputs, places)
    to = torch.tensor([-1.0, 0.0, 1.0], device=omega.device, dtype=torch.float64)
    moves = length * torch.cartesian_prod(to, to)  # (moves, 2)
    around = omega[:, :, None] + moves  # (groups, places, moves, 2)
    one = torch.ones((), device=omega.device, dtype=torch.float32)
    waves = torch.polar(one, (around @ taps.T).float())  # (groups, places, moves, taps)
    modulus = torch.einsum("gtom,gom,gmnt->gmn", products, u.conj(), waves).abs()  # (groups, places, moves)
    best = modulus.argmax(2)[:, :, None, None].expand(-1, -1, 1, 2)
    return around.gather(2, best)[:, :, 0]


def _largest_of(kernels: Tensor, omega: Tensor, taps: Tensor) -> float:
    """max σ_max(Ŵ(ω)) in float64 over pairs of a kernel (pairs, outputs, inputs, k₁, k₂) and a frequency (pairs, 2)."""
    angles = omega @ taps.T  # (pairs, taps)
    waves = torch.polar(torch.ones_like(angles), angles)
    symbol = torch.einsum("foit,ft->foi", kernels.flatten(3).to(torch.complex128), waves)
    return float(torch.linalg.matrix_norm(symbol, ord=2).max())


def _waves(omega: Tensor, taps: Tensor) -> Tensor:
    """e^{i⟨ω, t⟩} as (groups, taps, 1, places)."""
    angles = (omega @ taps.T).mT.float()
    return torch.polar(torch.ones_like(angles), angles)[:, :, None]


def _real_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """A real matrix times complex columns, as one real product."""
    product = matrix @ torch.view_as_real(columns).flatten(2)
    return torch.view_as_complex(product.unflatten(2, (-1, 2)))


# Pictures of one size.


def _squares_on_circle(kernel: Tensor, circle: Pair) -> Tensor:
    """σ_max² at each frequency (p₁, p₂) of a circle, the largest over the groups."""
    rows, columns = circle
    half = columns // 2 + 1
    down = 2 * math.pi * torch.arange(rows, device=kernel.device).double() / rows
    across = 2 * math.pi * torch.arange(half, device=kernel.device).double() / columns
    grams = _grams(_correlation(kernel), torch.cartesian_prod(down, across))
    largest = [torch.linalg.eigvalsh(gram)[..., -1].amax(1) for gram in grams]
    squares = torch.cat(largest).reshape(rows, half)
    # The other half mirrors this one: the symbol at −ω is the conjugate of that at ω.
    mirrored_rows = (-torch.arange(rows, device=kernel.device)) % rows
    others = squares[mirrored_rows, 1 : columns - half + 1].flip(1)
    return torch.cat((squares, others), 1)


def _largest_on_picture(squares: Tensor, size: Pair) -> float:
    """The largest eigenvalue of T, or where T would be large a bound of it from one axis alone."""
    if math.prod(size) <= LARGEST_PICTURE:
        return _restricted(squares, size)
    rows_alone = _restricted(squares.amax(1)[:, None], (size[0], 1))  # λ(ω) ≤ max over the other frequency
    columns_alone = _restricted(squares.amax(0)[:, None], (size[1], 1))
    return min(rows_alone, columns_alone)


def _restricted(squares: Tensor, size: Pair) -> float:
    """The largest eigenvalue of the circular convolution with symbol `squares`, restricted to pictures of `size`."""
    filtered = torch.fft.ifft2(squares).real
    rows = _differences(size[0], squares.shape[0], squares.device)
    columns = _differences(size[1], squares.shape[1], squares.device)
    matrix = filtered[rows[:, None, :, None], columns[None, :, None, :]].reshape(math.prod(size), -1)
    # Turning the picture by 180° changes nothing, so even and odd pictures can be treated apart, at half the size.
    n = len(matrix)
    turned = matrix.flip(1)
    even = (matrix + turned)[: n - n // 2, : n - n // 2]
    odd = (matrix - turned)[: n // 2, : n // 2]
    if n % 2:  # the pixel in the middle is its own partner
        even[-1] /= math.sqrt(2)
        even[:, -1] /= math.sqrt(2)
    return max(float(torch.linalg.eigvalsh(part)[-1]) for part in (even, odd) if len(part))


def _differences(n: int, period: int, device: torch.device) -> Tensor:
    """(p − q) mod period for places p and q below n."""
    places = torch.arange(n, device=device)
    return (places[:, None] - places) % period

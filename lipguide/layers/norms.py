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
from torch.nn import functional as F

__all__ = ["aol_norm", "check_finite", "conv_norm", "matrix_norm", "picture_norm", "polyphase"]

MEMORY = 2**21  # complex numbers held at once
CUSHION = 1e-7  # relative: far above the rounding of float64, far below any tolerance asked for
ROUNDS = 30
LARGEST_PICTURE = 2304  # pixels for which `picture_norm` solves an eigenvalue problem of that size
CLIMB = 16  # steps of the search for the maximiser


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
    return scale * math.sqrt(float(torch.linalg.eigvalsh(gram)[-1])) * (1 + CUSHION)


def polyphase(weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
    """The kernel (groups, outputs, inputs·s², k', k') of the stride-1 convolution that equals a strided one.

    A convolution of stride s sees its input as s² interleaved pictures (space to depth); taps that dilation
    skips are zeros.

    >>> polyphase(torch.randn(8, 3, 3, 3), (2, 2), (1, 1), 1).shape
    torch.Size([1, 8, 12, 2, 2])
    """
    (height, width), (s1, s2), (d1, d2) = weight.shape[2:], stride, dilation
    reach = (d1 * (height - 1) + 1, d2 * (width - 1) + 1)
    rows, columns = math.ceil(reach[0] / s1), math.ceil(reach[1] / s2)
    spread = weight.new_zeros(*weight.shape[:2], rows * s1, columns * s2)
    spread[:, :, : reach[0] : d1, : reach[1] : d2] = weight
    phases = F.pixel_unshuffle(spread, s1) if s1 == s2 else _unshuffle(spread, s1, s2)
    return phases.reshape(groups, weight.shape[0] // groups, -1, rows, columns)


def _unshuffle(kernel: Tensor, s1: int, s2: int) -> Tensor:
    outputs, inputs, height, width = kernel.shape
    split = kernel.reshape(outputs, inputs, height // s1, s1, width // s2, s2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(outputs, inputs * s1 * s2, height // s1, width // s2)


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
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
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
    # At stride 1 dilation only relabels the frequencies.
    dilation = tuple(1 if s == 1 else d for s, d in zip(stride, dilation, strict=True))
    kernel, scale = _at_scale_one(polyphase(weight.detach().double(), stride, dilation, groups))
    return scale * _torus_norm(kernel, tolerance) if scale else 0.0


def picture_norm(
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
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
    if not circular:  # at stride 1 dilation d splits a picture into d that do not meet
        size = tuple(math.ceil(n / d) if s == 1 else n for n, s, d in zip(size, stride, dilation, strict=True))
        dilation = tuple(1 if s == 1 else d for s, d in zip(stride, dilation, strict=True))
    kernel, scale = _at_scale_one(polyphase(weight.detach().double(), stride, dilation, groups))
    if not scale:
        return 0.0
    circle = size if circular else tuple(n + k - 1 for n, k in zip(size, kernel.shape[3:], strict=True))
    squares = _squares_on_circle(kernel, circle)
    if circular:
        return scale * math.sqrt(float(squares.amax())) * (1 + CUSHION)
    if math.prod(size) <= LARGEST_PICTURE:
        square = _restricted(squares, size)
    else:  # one axis alone, for λ(ω) ≤ max over the other frequency
        square = min(_restricted(squares.amax(1 - axis)[:, None], (size[axis], 1)) for axis in (0, 1))
    return scale * math.sqrt(max(0.0, square)) * (1 + CUSHION)


def _restricted(squares: Tensor, size: tuple[int, int]) -> float:
    """The largest eigenvalue of the circular convolution with symbol `squares`, restricted to pictures of `size`."""
    filtered = torch.fft.ifft2(squares).real
    rows, columns = (_differences(n, p, squares.device) for n, p in zip(size, squares.shape, strict=True))
    matrix = filtered[rows[:, None, :, None], columns[None, :, None, :]].reshape(math.prod(size), -1)
    # Turning the picture by 180° changes nothing, so even and odd pictures can be treated apart, at half the size.
    n, turned = len(matrix), matrix.flip(1)
    even, odd = (matrix + turned)[: n - n // 2, : n - n // 2], (matrix - turned)[: n // 2, : n // 2]
    if n % 2:  # the pixel in the middle is its own partner
        even[-1] /= math.sqrt(2)
        even[:, -1] /= math.sqrt(2)
    return max(float(torch.linalg.eigvalsh(part)[-1]) for part in (even, odd) if len(part))


def _differences(n: int, period: int, device: torch.device) -> Tensor:
    places = torch.arange(n, device=device)
    return (places[:, None] - places) % period


def _at_scale_one(kernel: Tensor) -> tuple[Tensor, float]:
    # A Gram matrix of tiny or huge numbers would leave the range of float64.
    scale = float(kernel.abs().amax()) if kernel.numel() else 0.0
    return (kernel / scale if scale else kernel), scale


def _squares_on_circle(kernel: Tensor, circle: tuple[int, int]) -> Tensor:
    """σ_max² at each frequency of a circle, the largest over the groups; one half of them mirrors the other."""
    turns = [2 * math.pi * torch.arange(p, device=kernel.device).double() / p for p in circle]
    half = circle[1] // 2 + 1
    cells = torch.cartesian_prod(turns[0], turns[1][:half])
    largest = [torch.linalg.eigvalsh(gram)[..., -1].amax(1) for gram in _grams(_correlation(kernel), cells)]
    squares = torch.cat(largest).reshape(circle[0], half)
    rows = (-torch.arange(circle[0], device=kernel.device)) % circle[0]
    return torch.cat((squares, squares[rows, 1 : circle[1] - half + 1].flip(1)), 1)


def _torus_norm(kernel: Tensor, tolerance: float) -> float:
    degree = (kernel.shape[3] - 1) / 2, (kernel.shape[4] - 1) / 2
    correlation = _correlation(kernel)
    easy = _row_sum_norm(correlation)
    if easy <= _filter_norm(correlation) * (1 + tolerance):
        return easy
    best = _climb(kernel, _start(degree, kernel.device))
    # At a radius of acos(1 / (1 + tolerance)) no cell can fail if `best` is the maximum: begin with four times that,
    # and in any case well below π/2, where a cosine would change its sign.
    cells, reach = _first_cells(degree, min(1.0, 4 * math.acos(1 / (1 + tolerance))), kernel.device)
    for _ in range(ROUNDS):
        target = best * (1 + tolerance)
        if easy <= target:
            return easy
        slack = math.cos(max(d * a for d, a in zip(degree, reach, strict=True)))
        cells = cells[~torch.cat([_below(gram, target * slack) for gram in _grams(correlation, cells)])]
        if not len(cells):
            return target * (1 + CUSHION)
        best = max(best, _climb(kernel, cells[:: math.ceil(len(cells) / 16)]))
        cells, reach = _split(cells, reach, degree)
    return easy  # never seen in practice; the loose bound is sound all the same


def _correlation(kernel: Tensor) -> Tensor:
    """The taps G_l = Σ_s K_{s+l} K_sᵀ of ŴŴᴴ = Σ_l G_l e^{i⟨ω, l⟩}, as (groups, n, n, l₁, l₂).

    Where there are fewer inputs than outputs, those of Ŵᵀ, which has the same norm.
    """
    if kernel.shape[2] < kernel.shape[1]:
        kernel = kernel.transpose(1, 2)
    groups, n, _, height, width = kernel.shape
    columns = kernel.permute(0, 3, 4, 1, 2).flatten(1, 3)  # (groups, taps · n, m)
    lags = kernel.new_zeros(groups, 2 * height - 1, 2 * width - 1, n, n)
    for row in range(height):
        for column in range(width):
            product = columns @ kernel[:, :, :, row, column].mT
            lags[:, height - 1 - row :, width - 1 - column :][:, :height, :width] += product.reshape(
                groups, height, width, n, n
            )
    return lags.permute(0, 3, 4, 1, 2)


def _row_sum_norm(correlation: Tensor) -> float:
    return math.sqrt(float(correlation.abs().sum((2, 3, 4)).amax())) * (1 + CUSHION)


def _filter_norm(correlation: Tensor) -> float:
    """The norm of the largest single filter, which is a lower bound of the norm: what an impulse becomes."""
    rows, columns = correlation.shape[3] // 2, correlation.shape[4] // 2
    return math.sqrt(float(correlation[..., rows, columns].diagonal(dim1=1, dim2=2).amax()))


def _grams(correlation: Tensor, cells: Tensor) -> Iterator[Tensor]:
    """ŴᴴŴ or ŴŴᴴ at the given frequencies, in pieces of shape (cells, groups, n, n)."""
    groups, n, _, height, width = correlation.shape
    lags = torch.cartesian_prod(
        *(torch.arange(side, device=cells.device).double() - side // 2 for side in (height, width))
    )
    # G_{−l} = G_lᵀ, so one half of the lags will do: cosines for the symmetric part, sines for the other.
    middle = len(lags) // 2
    taps = correlation.flatten(3).permute(3, 0, 1, 2)[middle:]
    even, odd = (taps + taps.mT).flatten(1), (taps - taps.mT).flatten(1)
    even[0] /= 2
    for piece in cells.split(max(1, MEMORY // (groups * n * n))):
        angles = piece @ lags[middle:].T
        gram = torch.complex(angles.cos() @ even, angles.sin() @ odd)
        yield gram.reshape(len(piece), groups, n, n)


def _below(gram: Tensor, limit: float) -> Tensor:
    """For each cell: is σ_max < limit proved, in every group, by a Cholesky factorisation of limit² I − Gram?"""
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(limit**2)
    return (torch.linalg.cholesky_ex(shifted).info == 0).all(dim=1)


def _first_cells(
    degree: tuple[float, float], radius: float, device: torch.device
) -> tuple[Tensor, tuple[float, float]]:
    """Centres and half-diagonals of diamonds that cover half of the frequencies (the other half mirrors it)."""
    # An axis on which the kernel has one tap has a constant symbol: it needs no cells.
    counts = [1 if d == 0 else 2 * math.ceil(math.pi * d / radius) for d in degree]
    spacing = [0.0 if d == 0 else 2 * math.pi / n for d, n in zip(degree, counts, strict=True)]
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in _halved(counts, degree)))
    places = places[places.sum(1) % 2 == 0]
    return places * torch.tensor(spacing, device=device, dtype=torch.float64), (spacing[0], spacing[1])


def _halved(counts: list[int], degree: tuple[float, float]) -> list[int]:
    mirrored = 0 if degree[1] == 0 else 1
    return [n // 2 + 1 if axis == mirrored else n for axis, n in enumerate(counts)]


def _split(
    cells: Tensor, reach: tuple[float, float], degree: tuple[float, float]
) -> tuple[Tensor, tuple[float, float]]:
    half = (reach[0] / 2, reach[1] / 2)
    steps = [(-half[0], 0.0), (half[0], 0.0)] * (degree[0] > 0) + [(0.0, -half[1]), (0.0, half[1])] * (degree[1] > 0)
    offsets = torch.tensor(steps or [(0.0, 0.0)], device=cells.device, dtype=torch.float64)
    return (cells[:, None] + offsets).reshape(-1, 2), half


def _start(degree: tuple[float, float], device: torch.device) -> Tensor:
    """Frequencies from which to look for the maximiser: two a wavelength and a few more."""
    counts = [1 if d == 0 else int(4 * d + 4) for d in degree]
    turns = [
        2 * math.pi * torch.arange(h, device=device).double() / n
        for h, n in zip(_halved(counts, degree), counts, strict=True)
    ]
    return torch.cartesian_prod(*turns)


def _climb(kernel: Tensor, start: Tensor) -> float:
    """The largest σ_max(Ŵ(ω)) found by power steps that move ω uphill as well: a lower bound of the norm."""
    groups, outputs, inputs, height, width = kernel.shape
    taps = torch.cartesian_prod(
        *(torch.arange(n, device=kernel.device).double() - (n - 1) / 2 for n in (height, width))
    )
    rows = kernel.float().permute(0, 3, 4, 1, 2).flatten(1, 3)  # the taps' matrices, stacked
    start = start[:: math.ceil(9 * len(start) * len(taps) * groups / MEMORY)]  # fewer where many would not fit
    omega = start.expand(groups, -1, 2)
    moves = torch.cartesian_prod(*(torch.tensor([-1.0, 0.0, 1.0], device=kernel.device).double(),) * 2)
    v = torch.randn(groups, inputs, len(start), 2, generator=torch.Generator().manual_seed(0)).to(kernel.device)
    v = torch.view_as_complex(v)
    for step in range(CLIMB):
        products = _real_product(rows, v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-30))
        products = products.unflatten(1, (len(taps), outputs))  # W_t v: (groups, taps, outputs, frequencies)
        u = (products * _phases(omega, taps)[:, :, None]).sum(1)
        # With u and v held fixed |uᴴ Ŵ(ω) v| is a short trigonometric sum: try the neighbours of ω.
        around = omega[:, :, None] + moves * (0.3 * 0.8**step / max(1.0, (max(height, width) - 1) / 2))
        waves = torch.polar(torch.ones((), device=omega.device), (around @ taps.T).float())
        height_around = torch.einsum("gtom,gom,gmnt->gmn", products, u.conj(), waves).abs()
        omega = around.gather(2, height_around.argmax(2)[:, :, None, None].expand(-1, -1, 1, 2))[:, :, 0]
        phases = _phases(omega, taps)[:, :, None]
        u = (products * phases).sum(1)
        v = _real_product(rows.mT, (u[:, None] * phases.conj()).flatten(1, 2))
    found = torch.linalg.vector_norm(u, dim=1)
    top = found.flatten().topk(min(4, found.numel())).indices
    group, place = top // found.shape[1], top % found.shape[1]
    angles = omega[group, place] @ taps.T
    symbol = torch.einsum(
        "foit,ft->foi", kernel[group].flatten(3).to(torch.complex128), torch.polar(torch.ones_like(angles), angles)
    )
    return float(torch.linalg.matrix_norm(symbol, ord=2).max())


def _phases(omega: Tensor, taps: Tensor) -> Tensor:
    angles = (omega @ taps.T).mT.float()
    return torch.polar(torch.ones_like(angles), angles)


def _real_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """A real matrix times complex columns, as one real product."""
    return torch.view_as_complex((matrix @ torch.view_as_real(columns).flatten(2)).unflatten(2, (-1, 2)))


def check_finite(weight: Tensor) -> None:
    """A NaN or an infinity in a weight has no norm: say so rather than certify it."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values, so no norm can be certified; "
            "the training that made it has diverged"
        )

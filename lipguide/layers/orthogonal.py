"""Orthogonal matrices and orthogonal convolutions: the constraint behind `lip.orthogonal`.

A matrix is made orthogonal by a QR factorisation. On a GPU, where that goes through the matrices of a batch one by one,
a training step takes the same factor from products of matrices (`orthonormal_by_products`).

A convolution larger than its stride is composed of maps that are orthogonal one by one (block convolutions of
projectors; Xiao et al. 2018, Li et al. 2019):

    x ↦ P x + S (I − P) x        P = V Vᵀ a projector, S the shift by one pixel along an axis

keeps part of the channels and shifts the rest, which loses nothing. Each adds one tap to the kernel along its axis. A
matrix on the stride's own block of pixels (reshaped kernel) ends the chain and sets the channels (Boissin et al. 2025).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F

from lipguide.layers.constraints import Constraint, at_scale_one, exact
from lipguide.layers.geometry import chained

__all__ = ["OrthogonalKernel", "OrthogonalMatrix", "orthonormal", "orthonormal_by_products", "polar"]

BY_PRODUCTS = {"cuda"}  # devices on which many small kernels cost more than a few large products
# Of the Gram matrix, in units of its trace: none of its eigenvalues is lost to the rounding of float64.
SHIFT = 2.0**-46
ORTHONORMAL = 1e-5  # from the identity, entries of a Gram matrix that float32 has rounded


def orthonormal(raw: Tensor) -> Tensor:
    """The Q of a QR factorisation with positive diagonal: orthonormal columns, or rows if there are fewer of those.

    >>> q = orthonormal(torch.randn(5, 3))
    >>> torch.allclose(q.mT @ q, torch.eye(3), atol=1e-6)
    True
    """
    if raw.shape[-2] < raw.shape[-1]:
        return orthonormal(raw.mT).mT
    q, r = torch.linalg.qr(raw)  # (…, n, m) with n ≥ m, and (…, m, m)
    # QR is unique, and so a continuous function of `raw`, only with a sign chosen for the diagonal of R.
    diagonal = r.diagonal(dim1=-2, dim2=-1)  # (…, m)
    minus_one = -torch.ones_like(diagonal)
    sign = torch.where(diagonal < 0, minus_one, 1)
    return q * sign.unsqueeze(-2)


def orthonormal_by_products(raw: Tensor) -> Tensor:
    """The same Q from a Cholesky factorisation: VᵀV = RᵀR and Q = V R⁻¹; for training, where no proof rests on it.

    R is taken as a constant: then X = V R⁻¹ is orthonormal up to rounding, and its Q is that of V, for a triangular R
    of positive diagonal changes none. Near an orthonormal X it is X (I − P) with P the upper half of XᵀX − I, up to the
    square of that rounding. This step corrects the value, and its gradient is that of Q. (Its second derivative is
    not.) All is done in float64, for VᵀV squares the condition of V. Nothing is asked of the numbers on the way, so a
    GPU is never waited for; a V whose columns nearly depend on each other gives a Q of norm about 1 or less.

    >>> v = torch.randn(5, 3)
    >>> torch.allclose(orthonormal_by_products(v), orthonormal(v), atol=1e-5)
    True
    """
    if raw.shape[-2] < raw.shape[-1]:
        return orthonormal_by_products(raw.mT).mT
    v = raw.double()  # (…, n, m), n ≥ m
    if raw.dtype == torch.float64:  # squares of any float32 are in the range of float64; its own may not be
        v = at_scale_one(raw, (-2, -1))
    m = raw.shape[-1]
    eye = torch.eye(m, dtype=torch.float64, device=raw.device)
    inverse = _inverse_of_r(v.detach(), eye)  # (…, m, m)
    x = v @ inverse
    triangle = torch.triu(torch.ones_like(eye))
    half = triangle - eye / 2  # the upper triangle and half of the diagonal
    gram = x.mT @ x  # (…, m, m)
    upper = half * gram  # P + I / 2
    q = x @ (1.5 * eye - upper)
    return q.to(raw.dtype)


def _inverse_of_r(v: Tensor, eye: Tensor) -> Tensor:
    """R⁻¹ with VᵀV = RᵀR; a small multiple of I is added so that there is a factorisation."""
    gram = v.mT @ v  # (…, m, m)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # (…, m)
    trace = diagonal.sum(-1)
    trace = trace[..., None, None]
    shift = SHIFT * trace + torch.finfo(gram.dtype).tiny
    shifted = gram + shift * eye
    lower = torch.linalg.cholesky_ex(shifted).L
    eyes = eye.expand_as(gram)
    return torch.linalg.solve_triangular(lower.mT, eyes, upper=True)


def polar(weight: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, U Vᵀ of the singular value decomposition.

    >>> polar(torch.diag(torch.tensor([3.0, 0.2])))
    tensor([[1., 0.],
            [0., 1.]])
    """
    # In float32 the routine may not converge where all singular values are nearly equal.
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u @ vh).to(weight.dtype)


def _are_orthonormal(columns: Tensor) -> bool:
    gram = columns.mT @ columns
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return bool((gram - eye).abs().max() < ORTHONORMAL)


def _orthonormal_in(constraint: Constraint, raw: Tensor) -> Tensor:
    """By products where that is faster, but only in training."""
    if constraint.training and raw.device.type in BY_PRODUCTS:
        return orthonormal_by_products(raw)
    return orthonormal(raw)


class OrthogonalMatrix(Constraint):
    """W ↦ Q of W = QR; what is registered is the nearest orthogonal matrix to the weight that it finds."""

    batches = True

    def constrained(self, raw: Tensor) -> Tensor:
        return _orthonormal_in(self, raw)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return polar(exact(weight)).to(weight.dtype)


class OrthogonalKernel(Constraint):
    """A kernel (outputs, inputs / groups, k₁, k₂) of an orthogonal convolution of stride (s₁, s₂).

    kernel = R ⊛ B_n ⊛ … ⊛ B_1 ⊛ L, with R on blocks of s₁×s₂ pixels, B_i the shifts of projected channels and L a
    1×1 lift where there are more outputs than R could reach otherwise. Each of the three is made of matrices with
    orthonormal columns or rows, whose free parameters are the originals: one for R, one for all B_i, one for L.
    """

    batches = True

    def __init__(self, shape: torch.Size, stride: tuple[int, int], groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.groups = groups
        self.outputs = shape[0] // groups
        self.inputs = shape[1]
        # Alternate the axes; a kernel of k taps on a stride of s needs k − s shifts.
        rows = shape[2] - stride[0]
        columns = shape[3] - stride[1]
        self.axes = [0, 1] * min(rows, columns)
        self.axes += [0] * (rows - columns)
        self.axes += [1] * (columns - rows)
        pixels = stride[0] * stride[1]  # of a block
        self.middle = max(self.inputs, self.outputs // pixels)
        # A shift moves half of the channels; one channel cannot be split into a part that stays and a part that moves.
        self.rank = self.middle // 2
        self.shifts = bool(self.axes) and self.rank > 0
        self.lifts = self.middle > self.inputs
        self.projects = not self.axes and not self.lifts

    def settings(self) -> Hashable:
        return self.stride, self.groups, self.outputs, self.inputs, tuple(self.axes)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """R is the block of the weight's first taps; all else is drawn.

        A kernel without shifts is kept as it is if it is orthogonal already: then L puts the inputs first, and what is
        drawn for R is at right angles to the kernel.
        """
        kernel = exact(weight).unflatten(0, (self.groups, -1))  # (groups, outputs, inputs, k₁, k₂)
        ending = self._first_ending(at_scale_one(kernel)).flatten(2)  # (groups, outputs, middle · s₁ · s₂)
        columns = kernel.flatten(2)
        kept = self.lifts and not self.shifts and _are_orthonormal(columns)
        if kept:
            others = ending[..., columns.shape[2] :]
            ending = torch.cat([columns, others - columns @ (columns.mT @ others)], 2)
        raw = [polar(ending)]
        if self.shifts:
            raw.append(_drawn(weight, self.groups, len(self.axes), self.middle, self.rank))
        if self.lifts:
            lift = _drawn(weight, self.groups, self.middle, self.inputs)
            inputs_first = torch.eye(*lift.shape[1:], dtype=lift.dtype, device=lift.device)
            raw.append(inputs_first.expand_as(lift).clone() if kept else polar(lift))
        return tuple(part.to(weight.dtype) for part in raw)

    def _first_ending(self, kernel: Tensor) -> Tensor:
        """The taps of the first block, with random ones for channels that the kernel does not have."""
        s1, s2 = self.stride
        block = kernel[..., :s1, :s2]  # (groups, outputs, inputs, s₁, s₂)
        ending = block.new_zeros(self.groups, self.outputs, self.middle, s1, s2)
        ending[:, :, : self.inputs] = block
        others = ending[:, :, self.inputs :]
        size = block.std(correction=0)
        others.copy_(torch.randn_like(others) * size)
        return ending

    def constrained(self, *raw: Tensor) -> Tensor:
        parts = [_orthonormal_in(self, part) for part in raw]
        ending = parts[0]  # (groups, outputs, middle · s₁ · s₂)
        taps = self._shifts(parts[1]) if self.shifts else self._one_tap(ending)  # (groups, k₁, k₂, middle, middle)
        if self.lifts:
            lift = parts[-1]  # (groups, middle, inputs)
            taps = taps @ lift[:, None, None]
        last = ending.unflatten(2, (self.middle, *self.stride))
        last = last.permute(0, 3, 4, 1, 2)  # (groups, s₁, s₂, outputs, middle)
        kernel = chained(taps, last)  # (groups, k₁, k₂, outputs, inputs)
        kernel = kernel.permute(0, 3, 4, 1, 2)
        # contiguous: torch's convolutions are slower on a permuted kernel
        return kernel.flatten(0, 1).contiguous()

    def _one_tap(self, like: Tensor) -> Tensor:
        """The identity, or for a single channel a plain shift."""
        rows = self.axes.count(0)
        columns = self.axes.count(1)
        above = rows // 2
        left = columns // 2
        around = left, columns - left, above, rows - above
        identity = self._identity(like)
        return F.pad(identity, (0, 0, 0, 0, *around))

    def _shifts(self, v: Tensor) -> Tensor:
        """B_n ⊛ … ⊛ B_1; each B keeps P x and shifts (I − P) x, with P the projector on the columns of one V."""
        taps = self._identity(v)
        for i, axis in enumerate(self.axes):
            basis = v[:, i, None, None]  # (groups, 1, 1, middle, rank)
            seen = taps @ basis
            kept = seen @ basis.mT
            moved = taps - kept
            behind = (0, 0) * (3 - axis)  # the axes behind the one that grows
            kept = F.pad(kept, (*behind, 0, 1))
            moved = F.pad(moved, (*behind, 1, 0))
            taps = kept + moved
        return taps

    def _identity(self, like: Tensor) -> Tensor:
        eye = torch.eye(self.middle, dtype=like.dtype, device=like.device)
        return eye.expand(self.groups, 1, 1, -1, -1)


def _drawn(weight: Tensor, *shape: int) -> Tensor:
    """Random numbers of the kind of a weight, in float32 or better."""
    return torch.randn(shape, dtype=exact(weight).dtype, device=weight.device)

"""Orthogonal matrices and orthogonal convolutions: the constraint behind `lip.orthogonal`.

A matrix is made orthogonal by a QR factorisation. A convolution larger than its stride is composed of maps that are
orthogonal one by one (block convolutions of projectors; Xiao et al. 2018, Li et al. 2019):

    x ↦ P x + S (I − P) x        P = V Vᵀ a projector, S the shift by one pixel along an axis

keeps part of the channels and shifts the rest, which loses nothing. Each adds one tap to the kernel along its axis. A
matrix on the stride's own block of pixels (reshaped kernel) ends the chain and sets the channels (Boissin et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["OrthogonalKernel", "OrthogonalMatrix", "orthonormal", "polar"]


def exact(weight: Tensor) -> Tensor:
    """The weight in float32 or better: constraints are computed there whatever the precision around them.

    >>> exact(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return weight if weight.dtype == torch.float64 else weight.float()


def orthonormal(raw: Tensor) -> Tensor:
    """The Q of a QR factorisation with positive diagonal: orthonormal columns, or rows if there are fewer of those.

    >>> q = orthonormal(torch.randn(5, 3))
    >>> torch.allclose(q.mT @ q, torch.eye(3), atol=1e-6)
    True
    """
    if raw.shape[-2] < raw.shape[-1]:
        return orthonormal(raw.mT).mT
    q, r = torch.linalg.qr(raw)
    # QR is unique, and so a continuous function of `raw`, only with a sign chosen for the diagonal of R.
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * sign.unsqueeze(-2)


def polar(weight: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, U Vᵀ of the singular value decomposition.

    >>> polar(torch.diag(torch.tensor([3.0, 0.2])))
    tensor([[1., 0.],
            [0., 1.]])
    """
    # In float32 the routine may not converge where all singular values are nearly equal.
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u @ vh).to(weight.dtype)


class OrthogonalMatrix(nn.Module):
    """W ↦ Q of W = QR; what is registered is the nearest orthogonal matrix to the weight that it finds."""

    def forward(self, raw: Tensor) -> Tensor:
        with torch.autocast(raw.device.type, enabled=False):
            return orthonormal(exact(raw)).to(raw.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return polar(exact(weight)).to(weight.dtype)


class OrthogonalKernel(nn.Module):
    """A kernel (outputs, inputs / groups, k₁, k₂) of an orthogonal convolution of stride (s₁, s₂).

    kernel = R ⊛ B_n ⊛ … ⊛ B_1 ⊛ L, with R on blocks of s₁×s₂ pixels, B_i the shifts of projected channels and L a
    1×1 lift where there are more outputs than R could reach otherwise.
    """

    def __init__(self, shape: torch.Size, stride: tuple[int, int], groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.outputs, self.inputs = shape[0] // groups, shape[1]
        # Alternate the axes; a kernel of k taps on a stride of s needs k − s shifts.
        rows, columns = shape[2] - stride[0], shape[3] - stride[1]
        self.axes = [0, 1] * min(rows, columns) + [0] * (rows - columns) + [1] * (columns - rows)
        self.middle = max(self.inputs, self.outputs // (stride[0] * stride[1]))
        if self.middle < 2:  # one channel cannot be split into a part that stays and a part that moves
            self.rank = 0
        else:
            self.rank = self.middle // 2
        self.projects = not self.axes and self.middle == self.inputs

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        s1, s2 = self.stride
        block = exact(weight).unflatten(0, (self.groups, -1))[..., :s1, :s2]
        ending = block.new_zeros(self.groups, self.outputs, self.middle, s1, s2)
        ending[:, :, : self.inputs] = block
        ending[:, :, self.inputs :] = torch.randn_like(ending[:, :, self.inputs :]) * block.std(correction=0)
        raw = [polar(ending.flatten(2))]
        if self.axes and self.rank:
            raw.append(torch.randn(self.groups, len(self.axes), self.middle, self.rank, device=weight.device))
        if self.middle > self.inputs:
            raw.append(polar(torch.randn(self.groups, self.middle, self.inputs, device=weight.device)))
        return tuple(r.to(weight.dtype) for r in raw)

    def forward(self, *raw: Tensor) -> Tensor:
        with torch.autocast(raw[0].device.type, enabled=False):
            ending, *factors = (orthonormal(exact(r)) for r in raw)
            blocks = self._shifts(factors.pop(0)) if self.axes and self.rank else self._one_tap(ending)
            if factors:
                blocks = blocks @ factors.pop()[:, None, None]
            last = ending.unflatten(2, (self.middle, *self.stride))
            return self._compose(last, blocks).to(raw[0].dtype)

    def _one_tap(self, like: Tensor) -> Tensor:
        """The identity, or for a single channel a plain shift, as taps (groups, k₁, k₂, middle, middle)."""
        rows, columns = self.axes.count(0), self.axes.count(1)
        eye = torch.eye(self.middle, dtype=like.dtype, device=like.device).expand(self.groups, 1, 1, -1, -1)
        return F.pad(eye, (0, 0, 0, 0, columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _shifts(self, v: Tensor) -> Tensor:
        """B_n ⊛ … ⊛ B_1 as taps (groups, k₁, k₂, middle, middle); each B keeps P x and shifts (I − P) x."""
        taps = torch.eye(self.middle, dtype=v.dtype, device=v.device).expand(self.groups, 1, 1, -1, -1)
        for i, axis in enumerate(self.axes):
            basis = v[:, i, None, None]
            kept = (taps @ basis) @ basis.mT
            one = (0, 0, 0, 0, 0, 0) if axis == 0 else (0, 0, 0, 0)
            taps = F.pad(kept, (*one, 0, 1)) + F.pad(taps - kept, (*one, 1, 0))
        return taps

    def _compose(self, last: Tensor, blocks: Tensor) -> Tensor:
        """The kernel of `last` after `blocks`: sums over all pairs of taps, one group beside the other."""
        first = blocks.permute(4, 0, 3, 1, 2).flatten(1, 2)  # (inputs, groups · middle, k, k)
        (s1, s2), groups = self.stride, self.groups
        kernel = F.conv2d(first, last.flatten(0, 1).flip(2, 3), padding=(s1 - 1, s2 - 1), groups=groups)
        # contiguous: torch's convolutions are slower on a permuted kernel
        return kernel.unflatten(1, (groups, self.outputs)).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()

"""What `lipguide.layers.affine` registers on a weight: each constraint is one module with a short `constrained`."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipguide.layers.norms import conv_norm, matrix_norm, polyphase
from lipguide.layers.orthogonal import exact

__all__ = ["AOL", "Clip", "Constraint", "Geometry", "Scaled", "Spectral", "UnitRows"]


class Geometry(NamedTuple):
    """What, besides its weight, decides the norm of an affine layer."""

    dense: bool
    transposed: bool
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def _columns(z: Tensor) -> Tensor:
    """Complex columns (groups, n, m) as real ones (groups, n, 2m)."""
    return torch.view_as_real(z).flatten(2)


def _nonzero(norm: Tensor) -> Tensor:
    """A norm that can be divided by: a weight of zeros stays zero, with a finite gradient by which it can leave."""
    return torch.where(norm < torch.finfo(norm.dtype).tiny, 1.0, norm)


def _tiny(norm: Tensor) -> Tensor:
    """The same where no gradient flows, and faster."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


class Constraint(nn.Module):
    """W ↦ the constrained W, computed in float32 or better whatever the precision around it."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self.constrained(exact(weight)).to(weight.dtype)

    def constrained(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Clip(Constraint):
    """W ↦ min(max(W, −limit), limit)."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def constrained(self, weight: Tensor) -> Tensor:
        return weight.clamp(-self.limit, self.limit)


class Scaled(Constraint):
    """W ↦ W / (√overlap · ‖W‖₂) with the norm over all entries: Frobenius (overlap > 1 for convolutions)."""

    def __init__(self, overlap: int = 1) -> None:
        super().__init__()
        self.overlap = overlap

    def constrained(self, weight: Tensor) -> Tensor:
        return weight / _nonzero(math.sqrt(self.overlap) * torch.linalg.vector_norm(weight))


class UnitRows(Constraint):
    """w_k ↦ w_k / ‖w_k‖₂ for the filter w_k of each output."""

    def __init__(self, transposed: bool, groups: int) -> None:
        super().__init__()
        self.transposed, self.groups = transposed, groups

    def constrained(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return weight / _nonzero(torch.linalg.vector_norm(weight.flatten(1), dim=1)).reshape(
                -1, *[1] * (weight.ndim - 1)
            )
        # Stored as (inputs, outputs / groups, height, width): an output's filter spans the inputs of its group.
        grouped = weight.unflatten(0, (self.groups, -1))
        return (grouped / _nonzero(torch.linalg.vector_norm(grouped, dim=(1, 3, 4), keepdim=True))).flatten(0, 1)


class AOL(Constraint):
    """W ↦ W D^(−½) with D_ii = Σ_j |WᵀW|_ij (Prach and Lampert): D ⪰ WᵀW, so the product has norm at most 1."""

    def __init__(self, shape: Geometry) -> None:
        super().__init__()
        self.shape = shape

    def constrained(self, weight: Tensor) -> Tensor:
        if self.shape.dense:
            return weight / _nonzero((weight.mT @ weight).abs().sum(1)).sqrt()
        # A stride or a dilation is undone first: the same kernel on interleaved pictures.
        kernel = polyphase(weight, self.shape.stride, self.shape.dilation, self.shape.groups)
        scaled = torch.stack([k / _nonzero(self._gram_rows(k)).sqrt()[:, None, None] for k in kernel])
        return _merge_phases(scaled, weight.shape, self.shape)

    @staticmethod
    def _gram_rows(kernel: Tensor) -> Tensor:
        columns = kernel.transpose(0, 1)
        reach = kernel.shape[2] - 1, kernel.shape[3] - 1
        return F.conv2d(columns, columns, padding=reach).abs().sum((1, 2, 3))


def _merge_phases(kernel: Tensor, shape: torch.Size, layer: Geometry) -> Tensor:
    """Undo `polyphase`."""
    (s1, s2), (d1, d2) = layer.stride, layer.dilation
    rows, columns = kernel.shape[-2:]
    split = kernel.reshape(shape[0], shape[1], s1, s2, rows, columns).permute(0, 1, 4, 2, 5, 3)
    spread = split.reshape(shape[0], shape[1], rows * s1, columns * s2)
    return spread[:, :, : d1 * (shape[2] - 1) + 1 : d1, : d2 * (shape[3] - 1) + 1 : d2]


class Spectral(Constraint):
    """W ↦ W / σ with σ the largest singular value of the layer's linear map.

    *Training*: power iteration, one step a forward and warm-started, on the matrices Ŵ(ω) of a coarse grid of
    frequencies ω at once. The largest of these norms is a lower bound of σ, good enough to learn with, and the
    gradient flows through it.

    *Eval*: `norms.conv_norm`, a proved upper bound, of the weight as it is now. The proof is kept together with the
    weight that it was made for, and made anew once any entry of that weight has changed; it is derived data and
    therefore not in the `state_dict`.
    """

    def __init__(self, weight: Tensor, shape: Geometry) -> None:
        super().__init__()
        self.shape = shape
        self.proof: tuple[Tensor, float] | None = None
        kernel = self._kernel(exact(weight.detach()))
        frequencies = self._phases(kernel).shape[-1]
        v = torch.randn(shape.groups, kernel.shape[2], frequencies, 2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("v", v.to(weight.device))  # real and imaginary parts, one column a frequency
        self.register_buffer("waves", torch.view_as_real(self._phases(kernel)), persistent=False)
        with torch.no_grad():
            for _ in range(20):
                self._power_step(kernel)

    def constrained(self, weight: Tensor) -> Tensor:
        sigma = self._power_step(self._kernel(weight)) if self.training else self._proved_norm(weight.detach())
        return weight * _nonzero(sigma).reciprocal()

    def _kernel(self, weight: Tensor) -> Tensor:
        """The same map as a convolution of stride 1: taps (groups, outputs, inputs, k₁, k₂). Dense layers have one."""
        shape = self.shape
        if shape.dense:
            return weight[None, :, :, None, None]
        if shape.stride == shape.dilation == (1, 1):
            return weight.unflatten(0, (shape.groups, -1))
        return polyphase(weight, shape.stride, shape.dilation, shape.groups)

    @staticmethod
    def _phases(kernel: Tensor) -> Tensor:
        """e^{i⟨ω, t⟩} for every tap t (rows) and every frequency ω (columns) of half the torus."""
        height, width = kernel.shape[3:]
        rows, columns = (1 if k == 1 else 2 * k + 2 for k in (height, width))
        half = torch.arange(columns // 2 + 1, device=kernel.device)
        down = torch.arange(height, device=kernel.device)[:, None] * torch.arange(rows, device=kernel.device) / rows
        across = torch.arange(width, device=kernel.device)[:, None] * half / columns
        turns = (down[:, None, :, None] + across[:, None]).to(kernel.dtype) * (2 * math.pi)
        angles = turns.reshape(height * width, -1)
        return torch.complex(angles.cos(), angles.sin())

    def _power_step(self, kernel: Tensor) -> Tensor:
        """σ = Re(uᴴ Ŵ(ω) v) at the frequency where it is largest; then v ← Ŵᴴ u at every frequency."""
        rows = kernel.flatten(2)  # (groups, outputs, inputs · taps)
        with torch.no_grad():
            as_made = self.waves.dtype == kernel.dtype  # a layer cast to half precision has cast the waves as well
            phases = torch.view_as_complex(self.waves) if as_made else self._phases(kernel)
            # contiguous: in channels_last the pairs would lie apart
            old = self.v.to(kernel.dtype, memory_format=torch.contiguous_format)
            v = torch.view_as_complex(old / _tiny(torch.linalg.vector_norm(old, dim=(1, 3), keepdim=True)))
            taps = v[:, :, None] * phases  # (groups, inputs, taps, frequencies)
            u = (rows @ _columns(taps.flatten(1, 2))).unflatten(2, (-1, 2))
            norms = torch.linalg.vector_norm(u, dim=(1, 3), keepdim=True)
            u = u / _tiny(norms)
            back = torch.view_as_complex((rows.mT @ u.flatten(2)).view(*taps.shape, 2))
            back = torch.view_as_real((back * phases.conj()).sum(2))
            self.v.copy_(torch.where(norms > 0, back, old))  # a kernel of zeros leaves v as it is
            # σ is linear in the kernel; its gradient is Re(ū_o v_i e^{i⟨ω, t⟩}), a scalar product of pairs.
            best, frequencies = norms.flatten().argmax(0, keepdim=True), norms.shape[2]
            left = u.transpose(0, 1).flatten(1, 2).index_select(1, best)
            wave = phases.index_select(1, best % frequencies).T
            right = v.transpose(0, 1).flatten(1).index_select(1, best) * wave
            direction = left.flatten(1) @ torch.view_as_real(right.flatten()).mT
        chosen = rows if len(rows) == 1 else rows.index_select(0, best // frequencies)
        return chosen.flatten().dot(direction.flatten())

    def _proved_norm(self, weight: Tensor) -> Tensor:
        known = self.proof is not None and self.proof[0].device == weight.device
        if not known or not torch.equal(self.proof[0], weight):
            # Nothing here is worth compiling; without the compiler loaded there is nothing to keep out, and loading it
            # would take a second.
            prove = torch.compiler.disable(self._prove) if "torch._dynamo" in sys.modules else self._prove
            self.proof = (weight.clone(), prove(weight))
        return weight.new_tensor(self.proof[1])

    def _prove(self, weight: Tensor) -> float:
        return matrix_norm(weight) if self.shape.dense else conv_norm(weight, *self.shape[2:])

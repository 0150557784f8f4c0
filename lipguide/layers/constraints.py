"""What `lipguide.layers.affine` registers on a weight: each constraint is one module with a short `constrained`.

Constraints that divide by a norm do not depend on the size of the weight, so they look at it with a largest entry of 1:
then no square of a tiny or a huge number leaves the range of float32.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipguide.checks import HALF
from lipguide.layers.geometry import Geometry
from lipguide.layers.norms import conv_norm, matrix_norm
from lipguide.seeded import normal

__all__ = ["AOL", "Clip", "Constraint", "Scaled", "Spectral", "UnitRows", "at_scale_one", "exact"]

WARM_UP = 20  # power steps when a layer is made
LEAST, LARGEST = 2.0**-100, 2.0**100  # norms that a weight is divided by in float32 as it is


def exact(weight: Tensor) -> Tensor:
    """The weight in float32 or better.

    >>> exact(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return weight if weight.dtype == torch.float64 else weight.float()


def _working_dtype(weight: Tensor) -> torch.dtype:
    """float32 or better, and float64 where products would round float32 to three digits (TF32, bfloat16)."""
    if _rounds(weight.is_cuda):
        return torch.float64
    return torch.promote_types(weight.dtype, torch.float32)


def _rounds(cuda: bool) -> bool:
    """Has torch leave to round the products of matrices in float32?"""
    matrices = torch.backends.cuda.matmul if cuda else torch.backends.mkldnn.matmul
    return matrices.fp32_precision in ("tf32", "bf16")


# The compiler cannot follow the switches: it asks once for each graph, and anew when `set_float32_matmul_precision` has
# changed. (This mark is what torch.compiler.assume_constant_result sets, which would load the compiler to do so.)
_rounds._dynamo_marked_constant = True


def _nonzero(norm: Tensor) -> Tensor:
    """A norm that can be divided by: a weight of zeros stays zero, with a finite gradient by which it can leave.

    Numbers below the smallest normal one count as zeros.
    """
    return torch.where(norm < torch.finfo(norm.dtype).tiny, 1.0, norm)


def _tiny(norm: Tensor) -> Tensor:
    """The same where no gradient flows, and faster."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def at_scale_one(weight: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The weight divided by its largest entry, or by that of each slice over `dim`. The factor has no gradient.

    >>> at_scale_one(torch.tensor([1e-30, 2e-30]))
    tensor([0.5000, 1.0000])
    """
    if weight.numel() == 0:
        return weight
    magnitudes = weight.detach().abs()  # torch's norm of order ∞ takes ten times as long
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)
    return weight / _nonzero(largest)


class Constraint(nn.Module):
    """W ↦ the constrained W, computed in float32 or better whatever the precision around it.

    A subclass writes `constrained`, without convolutions, which a GPU rounds by default. Autocast is kept out of it;
    where torch has leave to round the matrix products of float32 (TF32 on a GPU, bfloat16 on a CPU), it is handed
    float64. No switch of torch is moved for that, so threads do not meet and `torch.compile` can follow.
    """

    projects = True  # whether `constrained(right_inverse(W))` is W where W obeys the constraint
    batches = False  # whether `together` may map several at once in training: no step of it asks for a number

    def forward(self, *raw: Tensor) -> Tensor:
        given, wide = raw[0].dtype, _working_dtype(raw[0])
        with torch.autocast(raw[0].device.type, enabled=False):
            return self.rounded(self.constrained(*(part.to(wide) for part in raw)), given)

    def constrained(self, *raw: Tensor) -> Tensor:
        raise NotImplementedError

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The result in the precision of the layer."""
        return weight.to(dtype)

    def settings(self) -> Hashable:
        """What, beside tensors, two constraints that `batches` must have in common to map alike in training."""
        return None

    def extendable(self) -> dict[str, tuple[int, ...]]:
        """Of the weight ("original") and of buffers, by name, the axes along which zeros behind the numbers change
        nothing but the zeros of the result: then `together` may map weights of several sizes at once."""
        return {}

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
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
        weight = at_scale_one(weight)
        return weight / _nonzero(math.sqrt(self.overlap) * torch.linalg.vector_norm(weight))


class UnitRows(Constraint):
    """w_k ↦ w_k / ‖w_k‖₂ for the filter w_k of each output."""

    batches = True

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed

    def settings(self) -> Hashable:
        return self.transposed

    def constrained(self, weight: Tensor) -> Tensor:
        # Stored as (outputs, inputs, …), or as (inputs, outputs, …) if the layer is a transposed convolution.
        filters = tuple(axis for axis in range(weight.dim()) if axis != int(self.transposed))
        weight = at_scale_one(weight, filters)
        return weight / _nonzero(torch.linalg.vector_norm(weight, dim=filters, keepdim=True))


class AOL(Constraint):
    """W ↦ W D^(−½) with D_ii = Σ_j |WᵀW|_ij (Prach and Lampert): D ⪰ WᵀW, so the product has norm at most 1.

    Args:
        geometry: of a convolution; None for a dense layer.
    """

    def __init__(self, geometry: Geometry | None) -> None:
        super().__init__()
        self.geometry = geometry

    def constrained(self, weight: Tensor) -> Tensor:
        weight = at_scale_one(weight)
        if self.geometry is None:
            gram = weight.mT @ weight  # (inputs, inputs)
            d = _nonzero(gram.abs().sum(1)).sqrt()
            return weight / d
        # A stride or a dilation is undone first: the same kernel on interleaved pictures.
        kernel = self.geometry.polyphase(weight)  # (groups, outputs, inputs, k₁, k₂)
        d = _nonzero(_gram_rows(kernel)).sqrt()  # (groups, inputs)
        return self.geometry.merged(kernel / d[:, None, :, None, None])


def _gram_rows(kernel: Tensor) -> Tensor:
    """Σ_j Σ_l |K ⋆ K|_ij(l) over the channels j and the shifts l, for each input channel i: (groups, inputs).

    The shifts −l hold the same numbers as l, with i and j exchanged.
    """
    groups, _, inputs, height, width = kernel.shape
    lags = _lags(kernel)  # (height · groups · i, j, 1, across)
    gram = lags.abs().sum((2, 3)).view(height, groups, inputs, inputs)  # shifts down by 0 … height − 1
    mirrored = gram[1:].sum((0, 2))  # the shifts up
    return gram.sum((0, 3)) + mirrored


def _lags(kernel: Tensor) -> Tensor:
    """(K ⋆ K)_ij(l) for the shifts l = (down, across) with down ≥ 0, as (height · groups · i, j, 1, across).

    (K ⋆ K)_ij(l) is the sum of K_si · K_tj over the pairs of taps with s − t = l. Products of matrices have all pairs.

    Args:
        kernel: (groups, outputs, inputs, height, width).
    """
    groups, _, inputs, height, width = kernel.shape
    left = kernel.permute(0, 2, 4, 3, 1).contiguous()  # (groups, inputs, width, height, outputs)
    right = left.flip(2)  # column t stands at place −t
    products = []
    for down in range(height):
        s = left[:, :, :, down:]
        t = right[:, :, :, : height - down]
        s = s.reshape(groups, inputs * width, -1)  # (groups, inputs · width, rows · outputs)
        t = t.reshape(groups, inputs * width, -1)
        products.append(s @ t.mT)  # (groups, inputs · width, inputs · width)

    # Block s at place −t of a row, overlapping blocks added up, is what `fold` makes of (…, s, −t).
    pairs = torch.stack(products).view(height * groups * inputs, width, inputs, width)
    pairs = pairs.transpose(1, 2).flatten(1, 2)  # (height · groups · i, j · s, −t)
    return F.fold(pairs, (1, 2 * width - 1), (1, width))


class Spectral(Constraint):
    """W ↦ W / σ with σ the largest singular value of the layer's linear map.

    *Training*: power iteration, one step a forward and warm-started, on the matrices Ŵ(ω) of a coarse grid of
    frequencies ω at once. The largest of these norms is a lower bound of σ, good enough to learn with, and the
    gradient flows through it.

    *Eval*: `norms.conv_norm`, a proved upper bound, of the weight as it is now. The proof is kept together with the
    weight and the geometry that it was made for, and made anew once any entry of that weight, or the geometry, has
    changed; it is derived data and therefore not in the `state_dict`.

    Args:
        weight: the first one, from which the power iteration starts.
        geometry: of a convolution; None for a dense layer.
    """

    batches = True

    def __init__(self, weight: Tensor, geometry: Geometry | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.proof: tuple[Tensor, Geometry | None, float] | None = None
        kernel = self._kernel(exact(weight.detach()))
        waves = _waves(kernel)  # (taps, frequencies)
        v = normal((len(kernel), kernel.shape[2], waves.shape[1], 2))  # (groups, inputs, frequencies, 2)
        self.register_buffer("v", v.to(weight.device))  # real and imaginary parts, one column a frequency
        self.register_buffer("waves", torch.view_as_real(waves), persistent=False)
        with torch.no_grad():
            rows, (root, waves) = kernel.flatten(2), self._root_and_waves(kernel)
            for _ in range(WARM_UP):
                self._iterate(rows, root, waves)

    def settings(self) -> Hashable:
        return self.geometry

    def extendable(self) -> dict[str, tuple[int, ...]]:
        """Outputs and inputs without weight have no part in σ. A stride or groups would have to be undone first."""
        geometry = self.geometry or Geometry((1, 1))
        plain = geometry.stride == geometry.dilation == (1, 1) and geometry.groups == 1
        return {"original": (0, 1), "v": (1,)} if plain else {}

    def constrained(self, weight: Tensor) -> Tensor:
        if self.training:
            return weight * self._power_step(self._kernel(weight))
        norm = self._proved_norm(weight.detach())
        if not LEAST < norm < LARGEST:
            weight = at_scale_one(weight)
            norm = self._proved_norm(weight.detach())
        return self._divided(weight, norm)

    @staticmethod
    def _divided(weight: Tensor, norm: float) -> Tensor:
        """A weight below the smallest normal number, whose norm is no number to divide by, stays as it is."""
        return weight * (1 / norm if norm > LEAST else 1.0)

    def vouches_for(self, weight: Tensor) -> bool:
        """Is this very weight the one that its proof has made? Another may come out of a cache, or of training."""
        if self.proof is None or self.proof[0].device != weight.device:
            return False
        proved, geometry, sigma = self.proof
        return geometry == self.geometry and torch.equal(self._divided(proved, sigma).to(weight.dtype), weight)

    def _kernel(self, weight: Tensor) -> Tensor:
        """The same map as a convolution of stride 1: taps (groups, outputs, inputs, k₁, k₂). Dense layers have one."""
        if self.geometry is None:
            return weight[None, :, :, None, None]
        if self.geometry.stride == self.geometry.dilation == (1, 1):
            return weight.unflatten(0, (self.geometry.groups, -1))
        return self.geometry.polyphase(weight)

    def _power_step(self, kernel: Tensor) -> Tensor:
        """1/σ with σ = Re(uᴴ Ŵ(ω) v) at the frequency where it is largest; then v ← Ŵᴴ u at every frequency."""
        rows = kernel.flatten(2)  # (groups, outputs, inputs · taps)
        with torch.no_grad():
            root, waves = self._root_and_waves(kernel)
            u, v, lengths = self._iterate(rows, root, waves)
            best = lengths.flatten().argmax(0, keepdim=True)  # of all groups and frequencies
            direction = _gradient_of_sigma(u, v, waves, best)
        chosen = rows if len(rows) == 1 else rows.index_select(0, best // lengths.shape[2])  # of the best group
        sigma = chosen.flatten().dot(direction.flatten())  # that of the kernel with a largest entry of 1
        return root / _nonzero(sigma) * root

    def _root_and_waves(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """One over the root of the largest entry, and the waves (taps, frequencies).

        A kernel may be of any size: u and v, which are small, are divided by that root, so that Ŵ appears in all
        products as if the largest entry were 1.
        """
        return _nonzero(kernel.abs().amax()).rsqrt(), self._waves_in(kernel)

    def _iterate(self, rows: Tensor, root: Tensor, waves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u ← Ŵ(ω) v and v ← Ŵ(ω)ᴴ u at every frequency; returns u, the v before, rescaled, and the lengths |Ŵ(ω) v|.

        Args:
            rows: (groups, outputs, inputs · taps).
            waves: (taps, frequencies).
        """
        # contiguous: in channels_last the pairs would lie apart
        old = self.v.to(rows.dtype, memory_format=torch.contiguous_format)  # (groups, inputs, frequencies, 2)
        v = torch.view_as_complex(old * (root / _tiny(_lengths(old))))  # (groups, inputs, frequencies)
        u = root * _symbol_times(rows, v, waves)  # (groups, outputs, frequencies, 2)
        lengths = _lengths(u)  # (groups, 1, frequencies, 1)
        u = u * (root / _tiny(lengths))
        back = root * _adjoint_times(rows, u, waves)  # as v
        self.v.copy_(torch.where(lengths > 0, back, old))  # a kernel of zeros leaves v as it is
        return u, v, lengths

    def _waves_in(self, kernel: Tensor) -> Tensor:
        """The waves in the precision of the kernel.

        In float64 they stay as exact as float32 was, which is enough where nothing is proved. A layer cast to half
        precision has cast them as well, which is not.
        """
        if self.waves.dtype in HALF:
            return _waves(kernel)
        return torch.view_as_complex(self.waves.to(kernel.dtype))

    def _proved_norm(self, weight: Tensor) -> float:
        known = self.proof is not None and self.proof[0].device == weight.device and self.proof[1] == self.geometry
        if not known or not torch.equal(self.proof[0], weight):
            # Nothing here is worth compiling; without the compiler loaded there is nothing to keep out, and loading it
            # would take a second.
            prove = torch.compiler.disable(self._prove) if "torch._dynamo" in sys.modules else self._prove
            self.proof = (weight.clone(), self.geometry, prove(weight))
        return self.proof[2]

    def _prove(self, weight: Tensor) -> float:
        if self.geometry is None:
            return matrix_norm(weight)
        return conv_norm(weight, self.geometry.stride, self.geometry.dilation, self.geometry.groups)


# A power step, at every frequency at once. Complex numbers are pairs, so that real products serve: a complex column is
# two real ones.


def _waves(kernel: Tensor) -> Tensor:
    """e^{i⟨ω, t⟩} for every tap t (rows) and every frequency ω (columns) of half the torus."""
    height, width = kernel.shape[3:]
    rows = 1 if height == 1 else 2 * height + 2
    columns = 1 if width == 1 else 2 * width + 2
    half = columns // 2 + 1
    down = _turns(height, rows, rows, kernel.device)  # (height, rows)
    across = _turns(width, half, columns, kernel.device)  # (width, half)
    turns = down[:, None, :, None] + across[:, None]  # (height, width, rows, half)
    angles = (2 * math.pi * turns).reshape(height * width, -1).to(kernel.dtype)
    return torch.complex(angles.cos(), angles.sin())


def _turns(taps: int, frequencies: int, circle: int, device: torch.device) -> Tensor:
    """t · p / circle, in turns of 2π, for the taps t (rows) and the frequencies 2πp / circle (columns)."""
    t = torch.arange(taps, device=device)
    p = torch.arange(frequencies, device=device)
    return t[:, None] * p.double() / circle


def _lengths(columns: Tensor) -> Tensor:
    """Of the columns of (groups, n, frequencies, 2), as (groups, 1, frequencies, 1)."""
    return torch.linalg.vector_norm(columns, dim=(1, 3), keepdim=True)


def _symbol_times(rows: Tensor, v: Tensor, waves: Tensor) -> Tensor:
    """Ŵ(ω) v as (groups, outputs, frequencies, 2).

    Args:
        rows: the kernel, (groups, outputs, inputs · taps).
        v: (groups, inputs, frequencies), complex.
        waves: (taps, frequencies).
    """
    shifted = v[:, :, None] * waves  # (groups, inputs, taps, frequencies)
    columns = torch.view_as_real(shifted.flatten(1, 2)).flatten(2)  # (groups, inputs · taps, frequencies · 2)
    return (rows @ columns).unflatten(2, (-1, 2))


def _adjoint_times(rows: Tensor, u: Tensor, waves: Tensor) -> Tensor:
    """Ŵ(ω)ᴴ u as (groups, inputs, frequencies, 2); the arguments as in `_symbol_times`."""
    taps, frequencies = waves.shape
    products = (rows.mT @ u.flatten(2)).view(len(rows), -1, taps, frequencies, 2)
    shifted = torch.view_as_complex(products) * waves.conj()  # (groups, inputs, taps, frequencies)
    return torch.view_as_real(shifted.sum(2))


def _gradient_of_sigma(u: Tensor, v: Tensor, waves: Tensor, best: Tensor) -> Tensor:
    """That of σ in the kernel of the best group, Re(ū_o v_i e^{i⟨ω, t⟩}), as (outputs, inputs · taps).

    σ is linear in the kernel. The real part of a product of two numbers is a scalar product of pairs.

    Args:
        u: (groups, outputs, frequencies, 2).
        v: (groups, inputs, frequencies), complex.
        waves: (taps, frequencies).
        best: a group and a frequency, in one number.
    """
    frequencies = waves.shape[1]
    left = u.transpose(0, 1).flatten(1, 2).index_select(1, best)  # (outputs, 1, 2)
    right = v.transpose(0, 1).flatten(1).index_select(1, best)  # (inputs, 1)
    frequency = best if len(u) == 1 else best % frequencies
    wave = waves.index_select(1, frequency).T  # (1, taps)
    pairs = torch.view_as_real((right * wave).flatten())  # (inputs · taps, 2)
    return left.flatten(1) @ pairs.mT

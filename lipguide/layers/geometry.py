"""The geometry of a convolution: what decides its norm besides the numbers of its weight.

Three facts carry all norms and constraints of this package.

*Stride.* A convolution of stride s sees its input as s² interleaved pictures (space to depth). On these it is a
convolution of stride 1 with s² times the channels and a smaller kernel: `Geometry.polyphase`.

*Dilation.* At stride 1 a dilation of d splits the picture into d² smaller ones that do not meet, and treats all alike;
in frequency it only relabels: `Geometry.undilated`, `Geometry.apart`.

*Circle.* With circular padding the layer is diagonal at the frequencies of its circle, if its window sees no pixel
twice and if the stride divides the sides: `Geometry.is_circle`.

A sequence is a picture of one row. A transposed convolution is the adjoint of the convolution with the same weight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Geometry", "chained"]

Pair = tuple[int, int]
SEQUENCES = (nn.Conv1d, nn.ConvTranspose1d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


class Geometry(NamedTuple):
    """A convolution of pictures without its weight; the first four fields decide its norm on an infinite picture.

    Args:
        kernel: rows and columns of taps.
        stride, dilation, groups: those of the layer.
        mode: of the padding, as torch calls it.
        copied: for each axis the pixels that the padding copies in front and behind; none of them where it is of zeros.
        transposed: whether the layer is the adjoint of the convolution with its weight.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    copied: tuple[Pair, Pair] = ((0, 0), (0, 0))
    transposed: bool = False

    @classmethod
    def of(cls, layer: nn.Module, weight: Tensor | None = None) -> Geometry:
        """That of a layer as it is now, whatever it was when it was made or constrained.

        Args:
            layer: a convolution of one or two axes, transposed or not.
            weight: the one that it uses, where it is at hand; else its `kernel_size` is believed.

        >>> Geometry.of(nn.Conv1d(3, 8, 5, stride=2))[:2]
        ((1, 5), (1, 2))
        """
        kernel = layer.kernel_size if weight is None else weight.shape[2:]
        return cls(
            _two(kernel, layer, 1),
            _two(layer.stride, layer, 1),
            _two(layer.dilation, layer, 1),
            layer.groups,
            layer.padding_mode,
            _copied(layer),
            isinstance(layer, TRANSPOSED),
        )

    @property
    def lattice(self) -> tuple[Pair, Pair, Pair, int]:
        """What decides the norm on an infinite picture: kernel, stride, dilation and groups."""
        return self[:4]

    @property
    def reach(self) -> Pair:
        """Pixels from the first tap to the last one, for each axis.

        >>> Geometry((3, 5), dilation=(2, 1)).reach
        (4, 4)
        """
        rows = self.dilation[0] * (self.kernel[0] - 1)
        columns = self.dilation[1] * (self.kernel[1] - 1)
        return rows, columns

    @property
    def phased_kernel(self) -> Pair:
        """Rows and columns of the kernel of the stride-1 convolution that it is on interleaved pictures.

        >>> Geometry((3, 3), stride=(2, 1)).phased_kernel
        (2, 3)
        """
        rows = math.ceil((self.reach[0] + 1) / self.stride[0])
        columns = math.ceil((self.reach[1] + 1) / self.stride[1])
        return rows, columns

    def polyphase(self, weight: Tensor) -> Tensor:
        """The kernel (groups, outputs, inputs·s², k', k') of the stride-1 convolution on interleaved pictures.

        Taps that a dilation skips are zeros in it. Under `groups` the outputs are those of one group.

        >>> import torch
        >>> Geometry((3, 3), stride=(2, 2)).polyphase(torch.randn(8, 3, 3, 3)).shape
        torch.Size([1, 8, 12, 2, 2])
        """
        outputs, inputs = weight.shape[:2]
        s1, s2 = self.stride
        d1, d2 = self.dilation
        rows, columns = self.phased_kernel
        height, width = self.reach
        spread = weight.new_zeros(outputs, inputs, rows * s1, columns * s2)
        spread[:, :, : height + 1 : d1, : width + 1 : d2] = weight
        if s1 == s2:
            phases = F.pixel_unshuffle(spread, s1)
        else:
            split = spread.reshape(outputs, inputs, rows, s1, columns, s2)
            phases = split.permute(0, 1, 3, 5, 2, 4)
        return phases.reshape(self.groups, outputs // self.groups, -1, rows, columns)

    def merged(self, phases: Tensor) -> Tensor:
        """The weight of which `polyphase` makes these phases.

        >>> import torch
        >>> geometry, weight = Geometry((3, 2), stride=(2, 3)), torch.randn(4, 2, 3, 2)
        >>> bool((geometry.merged(geometry.polyphase(weight)) == weight).all())
        True
        """
        s1, s2 = self.stride
        d1, d2 = self.dilation
        rows, columns = self.phased_kernel
        height, width = self.reach
        outputs = phases.shape[0] * phases.shape[1]  # of all groups
        split = phases.reshape(outputs, -1, s1, s2, rows, columns)
        spread = split.permute(0, 1, 4, 2, 5, 3)  # (outputs, inputs, rows, s₁, columns, s₂)
        spread = spread.flatten(2, 3).flatten(3, 4)
        return spread[:, :, : height + 1 : d1, : width + 1 : d2]

    def undilated(self) -> Geometry:
        """Without the dilation of axes of stride 1, where it only relabels the frequencies.

        >>> Geometry((3, 3), stride=(1, 2), dilation=(4, 4)).undilated().dilation
        (1, 4)
        """
        d1, d2 = self.dilation
        if self.stride[0] == 1:
            d1 = 1
        if self.stride[1] == 1:
            d2 = 1
        return self._replace(dilation=(d1, d2))

    def apart(self, size: Pair) -> Pair:
        """The size of the largest of the pictures that do not meet, into which a dilation splits one at stride 1.

        >>> Geometry((3, 3), dilation=(2, 1)).apart((7, 7))
        (4, 7)
        """
        rows, columns = size
        if self.stride[0] == 1:
            rows = math.ceil(rows / self.dilation[0])
        if self.stride[1] == 1:
            columns = math.ceil(columns / self.dilation[1])
        return rows, columns

    def divides(self, sides: Pair) -> bool:
        """Does the stride divide the sides of a picture?"""
        return sides[0] % self.stride[0] == 0 and sides[1] % self.stride[1] == 0

    def sees_twice(self) -> bool:
        """Does a window on the padded picture reach around the whole circle, whatever its size?"""
        rows, columns = self.copied
        return sum(rows) > self.reach[0] or sum(columns) > self.reach[1]

    def is_circle(self, sides: Pair) -> bool:
        """Is the layer a convolution on the circle of these sides, and so diagonal at the frequencies of it?

        >>> layer = nn.Conv2d(1, 1, 3, stride=2, padding=1, padding_mode="circular")
        >>> Geometry.of(layer).is_circle((8, 8)), Geometry.of(layer).is_circle((7, 8))
        (True, False)
        """
        return self.mode == "circular" and self.divides(sides) and not self.sees_twice()

    def taps_meet(self, sides: Pair) -> bool:
        """Do two taps of one window fall on the same pixel of a circle of these sides?

        Taps d·t and d·t' meet where n divides d(t − t'), that is where n / gcd(n, d) divides t − t'.

        >>> Geometry((3, 3), mode="circular").taps_meet((2, 5))
        True
        """
        if self.mode != "circular":
            return False
        axes = zip(sides, self.kernel, self.dilation, strict=True)
        return any(n // math.gcd(n, d) < k for n, k, d in axes)


def _two(value: int | tuple[int, ...], layer: nn.Module, first: int) -> Pair:
    """A number for both axes, or one an axis; a sequence has `first` for its rows."""
    if isinstance(layer, SEQUENCES):
        return (first, value) if isinstance(value, int) else (first, value[0])
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _copied(layer: nn.Module) -> tuple[Pair, Pair]:
    """What the forward pads with; it does not look at `layer.padding`, which may have been changed since."""
    if layer.padding_mode == "zeros":
        return (0, 0), (0, 0)
    flat = layer._reversed_padding_repeated_twice  # the last axis first, in front and behind
    columns = flat[0], flat[1]
    rows = (flat[2], flat[3]) if len(flat) == 4 else (0, 0)
    return rows, columns


def chained(first: Tensor, then: Tensor) -> Tensor:
    """The taps of one convolution after another, by matrix products alone.

    Args:
        first: taps (groups, k₁, k₂, middle, inputs).
        then: taps (groups, l₁, l₂, outputs, middle).

    Returns: taps (groups, l₁ + k₁ − 1, l₂ + k₂ − 1, outputs, inputs).

    >>> import torch
    >>> shift = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    >>> chained(shift, shift).flatten()
    tensor([0., 0., 1.])
    """
    groups, k1, k2, middle, inputs = first.shape
    l1, l2, outputs = then.shape[1:4]
    left = then.reshape(groups, l1 * l2 * outputs, middle)
    right = first.permute(0, 3, 1, 2, 4).reshape(groups, middle, k1 * k2 * inputs)
    pairs = (left @ right).view(groups, l1, l2, outputs, k1, k2, inputs)  # every tap with every other
    pairs = pairs.permute(0, 1, 4, 2, 5, 3, 6)  # (groups, l₁, k₁, l₂, k₂, outputs, inputs)
    return _overlapping(_overlapping(pairs, 1), 2)


def _overlapping(pairs: Tensor, axis: int) -> Tensor:
    """Σ_{a + b = c} pairs[a, b] for every place c, with a and b on the given axis and the next one."""
    many, width = pairs.shape[axis : axis + 2]
    if many == 1 or width == 1:
        return pairs.flatten(axis, axis + 1)
    # Rows of width + many, read as rows of one number less, move one place further each.
    behind = (0, 0) * (pairs.dim() - axis - 2)
    padded = F.pad(pairs, (*behind, 0, many)).flatten(axis, axis + 1)
    places = width + many - 1
    moved = padded.narrow(axis, 0, many * places).unflatten(axis, (many, places))
    return moved.sum(axis)

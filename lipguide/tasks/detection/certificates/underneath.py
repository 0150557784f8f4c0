"""What lies below the last block of every window: the pairs sorted last, and the layer that these sort.

A window reads a square patch of a map, so of its pairs too. What the layer makes of a patch of its inputs, which is as
much larger as its kernel is, is one matrix for all windows. Beyond the edge of the map there are zeros that nobody
moves: for windows there the matrix allows more than there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lipguide.robustness.certificates.pairs import Sorted

__all__ = ["Underneath", "gram_of_patch", "in_pairs"]


@dataclass(frozen=True)
class Underneath:
    """What is sorted last, of every window.

    Args:
        maps: (N, C, rows, columns) of each level.
        side: of a window's patch, in places.
        apart: two places of a patch are so far apart on the map.
        layer: that makes it, and how it is read.
        below: what that layer is given is so Lipschitz in the picture.
    """

    maps: tuple[Tensor, ...]
    side: int
    apart: int
    layer: Sorted
    below: float

    @classmethod
    def of(
        cls, maps: Sequence[Tensor], sorts: Tensor, reads: Tensor, bias: Tensor, apart: int, below: float
    ) -> Underneath:
        """From the filters that make the pairs, (C, c, k, k), of stride 1, and those that read them, (D, C, side,
        side), with their bias."""
        sorts, reads, bias = (each.detach().double().cpu() for each in (sorts, reads, bias))
        side = reads.shape[-1]
        layer = Sorted(gram_of_patch(sorts, side), in_pairs(reads), bias)
        return cls(tuple(level.cpu() for level in maps), side, apart, layer, below)

    def part(self, where: slice) -> Underneath:
        """For some of the pictures."""
        return replace(self, maps=tuple(level[where] for level in self.maps))

    def patches(self, scene: Tensor, window: Tensor) -> Tensor:
        """(E, H): what some windows of some scenes are given, in sums and differences of pairs, in float64."""
        channels = self.maps[0].shape[1]
        found = torch.empty(len(scene), channels, self.side, self.side, dtype=torch.float64, device="cpu")
        steps, first = self.apart * torch.arange(self.side, device="cpu"), 0
        for level in self.maps:
            rows, columns = (size - self.apart * (self.side - 1) for size in level.shape[2:])
            mine = ((window >= first) & (window < first + rows * columns)).nonzero()[:, 0]
            place = window[mine] - first
            row, column = (place // columns)[:, None] + steps, (place % columns)[:, None] + steps
            patch = level[scene[mine, None, None], :, row[:, :, None], column[:, None]]  # (E, side, side, C)
            found[mine] = patch.permute(0, 3, 1, 2).double()
            first += rows * columns
        return in_pairs(found)


def in_pairs(patches: Tensor) -> Tensor:
    """(N, C, side, side) in sums and differences of each two channels in turn, (N, H): first all sums, then all
    differences.

    >>> in_pairs(torch.tensor([[1.0, 3.0]]).reshape(1, 2, 1, 1))
    tensor([[2.8284, 1.4142]])
    """
    low, high = patches[:, ::2], patches[:, 1::2]
    return torch.cat([(high + low).flatten(1), (high - low).flatten(1)], 1) / 2**0.5


def gram_of_patch(filters: Tensor, side: int) -> Tensor:
    """C Cᵀ (H, H), in sums and differences, of a convolution C by filters (C, c, k, k), of stride 1 and without zeros
    around it, to a patch of side × side places.

    >>> from torch import nn
    >>> gram_of_patch(torch.eye(2).reshape(2, 2, 1, 1).double(), 1).round(decimals=6)
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    channels, reach = len(filters), filters.shape[-1] - 1
    # How two filters overlap that stand so far apart: (C, C, 2k − 1, 2k − 1).
    overlaps = F.conv2d(F.pad(filters, (reach,) * 4), filters)
    places = torch.arange(side, device=filters.device)
    apart = places[:, None] - places
    index = (apart + reach).clamp(0, 2 * reach)
    near = apart.abs() <= reach
    table = overlaps[:, :, index[:, None, :, None], index[None, :, None, :]]  # (C, C, y, x, y', x')
    table = table * (near[:, None, :, None] & near[None, :, None, :])
    # overlaps[o, o', d] is Σ filters[o][x + d − reach] filters[o'][x]: o stands at p, o' at p' with d − reach = p' − p.
    gram = table.permute(1, 2, 3, 0, 4, 5).reshape(channels * side**2, channels * side**2)
    rows = in_pairs(gram.reshape(-1, channels, side, side))
    return in_pairs(rows.mT.reshape(-1, channels, side, side))

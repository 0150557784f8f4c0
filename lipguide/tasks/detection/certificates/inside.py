r"""Between what a score moves, by a look into the last block of its window.

A score is the least of quotients q_cj = (z_c − z_j) / ‖w_c − w_j‖. By constants alone each moves by Lε. If the window's
last layer is an SLL block, a bound of each that holds near the picture is often closer: that of the box of units which
may switch (`lipguide.robustness.certificates.local`), for all that may speak; or the one of the dual (`…dual`), which
is closer still and some thirty times as dear, for those on which an object depends.

*Lemma.* If q_cj stays within [a_j, b_j] then r_c stays within [min_j a_j, min_j b_j], and for the upper end some of the
j are enough. Those with q_cj ≥ r_c + Lε need not be asked: such a q_cj does not fall below r_c, which the lower end of
the least quotient does not exceed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.robustness.certificates.dual import least_gap
from lipguide.robustness.certificates.local import farthest
from lipguide.robustness.certificates.radii import slopes

__all__ = ["Inside"]

PART = 2048  # quotients at a time


class _Asked(NamedTuple):
    """Quotients of some entries, K in all. entry: (K,), whose; q: (K,); w: (K, D), their directions behind the block,
    of norm 1; u: (K, D), before it."""

    entry: Tensor
    q: Tensor
    w: Tensor
    u: Tensor


@dataclass(frozen=True)
class Inside:
    """What the last block of every window is given, with the block and the class head behind it.

    Args:
        features: (N, P, D), u.
        filters, bias: Vᵀ (K, D) and b (K,) of the block, in float64.
        rows, shift: weight (C + 1, D) and bias (C + 1,) of the head, in float64.
        below: u is so Lipschitz in the picture.
    """

    features: Tensor
    filters: Tensor
    bias: Tensor
    rows: Tensor
    shift: Tensor
    below: float

    def part(self, where: slice) -> Inside:
        """For some of the pictures."""
        return replace(self, features=self.features[where])

    def near(self, scene: int, window: Tensor, label: Tensor, eps: float, drift: float) -> tuple[Tensor, Tensor]:
        """Between what the scores of some windows (E,) for some labels (E,) move, (E,) each, by the box.

        Args:
            eps: how far the picture moves.
            drift: how far a score moves at most, by constants.
        """
        asked = self._asked(scene, window, label, drift)
        parts = zip(asked.w.split(PART), asked.u.split(PART), strict=True)
        reach = [farthest(w, u, self.filters, self.bias, self.below * eps) for w, u in parts]
        moves = torch.cat([asked.q[:0], *reach])
        return _least(asked.q - moves, asked.entry, len(window)), _least(asked.q + moves, asked.entry, len(window))

    def nearer(self, scene: int, window: Tensor, label: Tensor, eps: float, drift: float) -> tuple[Tensor, Tensor]:
        """As `near`, by the dual."""
        asked = self._asked(scene, window, label, drift)
        sides = []
        for sign in (1, -1):
            parts = zip(*(part.split(PART) for part in (sign * asked.q, sign * asked.w, asked.u)), strict=True)
            least = [least_gap(*part, self, self.below * eps) for part in parts]
            sides.append(_least(sign * torch.cat([asked.q[:0], *least]), asked.entry, len(window)))
        return sides[0], sides[1]

    def _asked(self, scene: int, window: Tensor, label: Tensor, drift: float) -> _Asked:
        u = self.features[scene, window].double()  # (E, D)
        behind = u - 2 * (u @ self.filters.mT + self.bias).relu() @ self.filters
        z = behind @ self.rows.mT + self.shift  # (E, C + 1)
        apart = slopes(len(self.rows), 1.0, self.rows, self.rows.device).double()  # ‖w_c − w_j‖
        own = z.gather(1, label[:, None])
        q = ((own - z) / apart[label]).scatter(1, label[:, None], torch.inf)
        entry, other = (q < q.amin(1, keepdim=True) + drift).nonzero(as_tuple=True)
        mine = label[entry]
        w = (self.rows[mine] - self.rows[other]) / apart[mine, other][:, None]
        return _Asked(entry, q[entry, other], w, u[entry])


def _least(values: Tensor, entry: Tensor, entries: int) -> Tensor:
    """(E,): the least of the values (K,) of each entry."""
    return values.new_full((entries,), torch.inf).scatter_reduce(0, entry, values, "amin")

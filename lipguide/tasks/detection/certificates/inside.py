r"""Between what a score moves, by a look into the last block of its window.

A score is the least of quotients q_cj = (z_c − z_j) / ‖w_c − w_j‖. By constants alone each moves by Lε. If the window's
last layer is an SLL block, a bound of each that holds near the picture is often closer: that of the box of units which
may switch (`lipguide.robustness.certificates.local`), for all that may speak; or the one of the dual (`…dual`), which
is closer still and dearer, for those on which an object or an alarm depends (`…scene`); or, for those of them that are
still in doubt, one that looks into the sorted pairs below the block as well (`lipguide.robustness.certificates.pairs`).

*Lemma.* If q_cj stays within [a_j, b_j] then r_c stays within [min_j a_j, min_j b_j], and for the upper end some of the
j are enough. Those with q_cj ≥ r_c + Lε need not be asked: such a q_cj does not fall below r_c, which the lower end of
the least quotient does not exceed.

The four sides of a window's box are read from the same block, so how far the box goes in a direction is the fall of
one more such quotient: see `lipguide.tasks.detection.certificates.shifts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lipguide.robustness.certificates.block import Block
from lipguide.robustness.certificates.dual import least_gap
from lipguide.robustness.certificates.local import farthest
from lipguide.robustness.certificates.pairs import least_gap_below
from lipguide.robustness.certificates.radii import SMALLEST, slopes
from lipguide.tasks.detection.certificates.underneath import Underneath

__all__ = ["BoxHead", "Entries", "Inside", "Look"]

Entries = tuple[Tensor, ...]  # scenes, windows and labels, (E,) each
Look = Literal["box", "dual", "pairs"]  # each closer than the one before, and dearer
PART = 2048  # quotients at a time
USED = 0.85  # of its budget, as a window's features may move; any number will do
DEAREST = 3.0  # price of a rise


class _Asked(NamedTuple):
    """Quotients of some entries, K in all. entry: (K,), whose; q: (K,); w: (K, D), their directions behind the block,
    of norm 1; u: (K, D), before it; scene, window: (K,), where."""

    entry: Tensor
    q: Tensor
    w: Tensor
    u: Tensor
    scene: Tensor
    window: Tensor

    def part(self, some: Tensor) -> _Asked:
        """Those of a mask (K,)."""
        return _Asked(*(column[some] for column in self))


class BoxHead(NamedTuple):
    """rows: (4, D), what reads the sides, in float64; scale: (P,), by which a window's sides are multiplied."""

    rows: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Inside:
    """What the last block of every window is given, with the block and the class head behind it.

    Args:
        features: (N, P, D), u.
        block: in float64.
        rows, shift: weight (C + 1, D) and bias (C + 1,) of the head, in float64.
        below: u is so Lipschitz in the picture.
        underneath: what the features are read from; None where that is not known.
        boxes: what reads the boxes; None where that is not known.
    """

    features: Tensor
    block: Block
    rows: Tensor
    shift: Tensor
    below: float
    underneath: Underneath | None = None
    boxes: BoxHead | None = None

    @property
    def looks(self) -> tuple[Look, ...]:
        """The closer looks that can be taken."""
        return ("dual",) if self.underneath is None else ("dual", "pairs")

    def part(self, where: slice) -> Inside:
        """For some of the pictures."""
        underneath = None if self.underneath is None else self.underneath.part(where)
        return replace(self, features=self.features[where], underneath=underneath)

    def falls(self, entries: Entries, eps: float, drift: float, look: Look) -> Tensor:
        """Below which some scores do not fall, (E,).

        Args:
            entries: scenes, windows and labels, (E,) each.
            eps: how far the picture moves.
            drift: how far a score moves at most, by constants.
            look: how closely.
        """
        asked, many = self._asked(entries, drift), len(entries[0])
        if look != "pairs":
            return _least(self._sunk(asked, eps, look), asked.entry, many)
        # What falls lowest by the cheaper look is asked first; of the others only what may fall lower.
        sunk = self._sunk(asked, eps, "dual")
        first = sunk <= _least(sunk, asked.entry, many)[asked.entry]
        sunk[first] = torch.fmax(sunk[first], self._sunk(asked.part(first), eps, look))
        others = ~first & (sunk < _least(sunk[first], asked.entry[first], many)[asked.entry])
        sunk[others] = torch.fmax(sunk[others], self._sunk(asked.part(others), eps, look))
        return _least(sunk, asked.entry, many)

    def rises(self, entries: Entries, eps: float, look: Look) -> Tensor:
        """Above which they do not rise, (E,): nor does the least of the quotients."""
        asked = self._asked(entries, 0.0)
        risen = -self._sunk(asked._replace(q=-asked.q, w=-asked.w), eps, look)
        return _least(risen, asked.entry, len(entries[0]))

    def goes(self, entries: Entries, toward: Tensor, rise: Tensor, eps: float, look: Look) -> Tensor:
        """How far at most the boxes of some windows go in directions (E, 4), as multiples of these, in pictures: (E,).

        Args:
            entries: scenes, windows and labels, (E,) each.
            toward: of norm 1.
            rise: (E,), where the window's score for the label has risen by this; −∞: wherever it is.
            eps, look: as in `falls`.
        """
        near, asked = self._asked(entries, None), rise.clamp(min=0)
        # See `lipguide.tasks.detection.certificates.shifts`.
        price = asked / ((USED * self.below * eps) ** 2 - asked.square()).clamp(min=SMALLEST).sqrt()
        price = price.clamp(max=DEAREST)
        there = toward.double() @ self.boxes.rows + price[:, None] * near.w  # (E, D)
        length = there.norm(dim=1)
        back = near._replace(q=torch.zeros_like(length), w=-there / length.clamp(min=SMALLEST)[:, None])
        return (-self._sunk(back, eps, look) * length - price * asked) * self.boxes.scale[near.window]

    def _sunk(self, asked: _Asked, eps: float, look: Look) -> Tensor:
        """Below which the quotients (K,) do not fall."""
        sunk = [asked.q[:0]]
        for part in zip(*(column.split(PART) for column in asked), strict=True):
            sunk.append(self._sunk_by(_Asked(*part), eps, look))
        return torch.cat(sunk).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # what is no number bounds nothing

    def _sunk_by(self, asked: _Asked, eps: float, look: Look) -> Tensor:
        _, q, w, u, scene, window = asked
        reach = self.below * eps
        if look == "box":
            return q - farthest(w, u, self.block, reach)
        if look == "dual":
            return least_gap(q, w, u, self.block, reach)
        if self.underneath is None:
            raise ValueError("what lies below the last block is not known: look by box or dual")
        h, moved = self.underneath.patches(scene, window), self.underneath.below * eps
        return least_gap_below(q, w, h, self.block, self.underneath.layer, moved, reach)

    def _asked(self, entries: Entries, drift: float | None) -> _Asked:
        """The quotients that are no more than `drift` above the least; None: one of the least of each entry."""
        scene, window, label = entries
        u = self.features[scene, window].double()  # (E, D)
        z = self.block(u) @ self.rows.mT + self.shift  # (E, C + 1)
        apart = slopes(len(self.rows), 1.0, self.rows, self.rows.device).double()  # ‖w_c − w_j‖
        own = z.gather(1, label[:, None])
        q = ((own - z) / apart[label]).scatter(1, label[:, None], torch.inf)
        if drift is None:
            near = torch.zeros_like(q, dtype=torch.bool).scatter(1, q.argmin(1, keepdim=True), True)
        else:
            near = ~(q > q.amin(1, keepdim=True) + drift)  # what is no number is asked, and bounds nothing
        entry, other = near.nonzero(as_tuple=True)
        mine = label[entry]
        w = (self.rows[mine] - self.rows[other]) / apart[mine, other][:, None]
        return _Asked(entry, q[entry, other], w, u[entry], scene[entry], window[entry])


def _least(values: Tensor, entry: Tensor, entries: int) -> Tensor:
    """(E,): the least of the values (K,) of each entry."""
    return values.new_full((entries,), torch.inf).scatter_reduce(0, entry, values, "amin")

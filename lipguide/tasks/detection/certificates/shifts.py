r"""Whether a box stays right, by a look into the last layers of its window.

A box is right while 16 functions F are not negative (`lipguide.tasks.detection.certificates.overlap`), and along a move
d of the box each is F(b + d) ≥ F(b) + vᵀd − ‖M‖ ‖d‖² / 2. By constants ‖d‖ ≤ ρ, whatever the direction. How far the
box goes against v alone, −vᵀd, is the fall of one linear function of the window's last features, so a look that bounds
scores bounds it too, and closer; what bends is left to the constants, for it is small. The face that is nearest is
asked first: most boxes that fail do so there. Faces that are not negative within ρ anyway are not asked.

A rival matters only where it comes before another window, and so has risen by a > 0. A move that spends itself on that
has less left for the box. Let q be the least quotient of the rival's score; that has risen by a or more, too, so for
every price μ ≥ 0

    −vᵀd ≤ max { −vᵀd' + μ (q' − q − a) },

the largest over all moves. On the right there is one linear function of the last features again. By constants alone,
were rows of the two heads orthogonal, the best price would be a / √(ρ² − a²) in their units; with a ρ a little smaller
it serves the looks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.tasks.detection.certificates.answers import ROUNDING, Answers
from lipguide.tasks.detection.certificates.inside import Look
from lipguide.tasks.detection.certificates.overlap import faces

__all__ = ["Asked", "stay"]


class Asked(NamedTuple):
    """Boxes of which it is asked whether they stay right. scene, window, label: (E,); truth: (E, 4), the objects'
    boxes; least: (E,), by how much they have to be overlapped; rise: (E,), where the window's score has risen by this,
    −∞: in any case."""

    scene: Tensor
    window: Tensor
    label: Tensor
    truth: Tensor
    least: Tensor
    rise: Tensor


def stay(given: Answers, asked: Asked, eps: float, look: Look) -> Tensor:
    """(E,): which of these surely do, while the pictures move by `eps`. `inside` has to know how boxes are read."""
    scene, window, label, truth, least, rise = asked
    value, slope, bend, bears, stays = faces(given.boxes[scene, window].double(), truth.double(), least.double())
    radius = given.moves(eps)[1][window].double()
    spare = (value - bend * radius[:, None].square() / 2) / slope.norm(dim=2).clamp(min=1e-12)  # against v, (E, 16)
    doubt = ~(bears >= radius[:, None])
    hope = (stays >= radius) & ((spare >= 0) | ~doubt).all(1)
    nearest = spare.masked_fill(~doubt, torch.inf).argmin(1, keepdim=True)
    for some in (torch.zeros_like(doubt).scatter(1, nearest, True), torch.ones_like(doubt)):
        box, face = (doubt & some & hope[:, None]).nonzero(as_tuple=True)
        for closer in given.inside.looks[: given.inside.looks.index(look) + 1]:  # what the cheaper one proves is proved
            against = -torch.nn.functional.normalize(slope[box, face], dim=1)
            risen = rise[box].double() - ROUNDING
            gone = given.inside.goes((scene[box], window[box], label[box]), against, risen, eps, closer)
            fails = ~(gone + ROUNDING / 10 <= spare[box, face])
            doubt[box, face] = fails
            box, face = box[fails], face[fails]
        hope[box] = False
    return hope

r"""Which objects are surely found: whoever wins is right.

Fix a picture, an object with class c, and ε. The score of window i stays between low_i and up_i, which are r_i ∓ Lε or
nearer (`lipguide.tasks.detection.certificates.inside`), and its box within a ball of radius ρ_i. Window i is *right*
for the object if every box of its ball overlaps it by more than

.. math:: \theta = \tfrac12 \bigl(1 + \text{the largest overlap of the object with another one of its class}\bigr).

*Lemma (whoever wins is right).* Let s be a right window with low_s > t. If every rival j of s either cannot come
before s, for up_j < low_s, or is right where it does, then on every picture within ε the decision above t reports
c with a box that overlaps the object by more than θ.

*Proof.* On the moved picture s scores low_s or more, which is above t. If s is reported, it is right. If not, a rival
j is reported that came before s (`lipguide.tasks.detection.decision`): it is right there. ∎

Which window wins may change from picture to picture; nothing depends on it, and nothing on who silences whom: one right
window is enough, whose own rivals are asked.

*Lemma (a rise is paid for).* Let a score over L and the box over its reach, as one vector, move by no more than κε.
Then window j is right on every picture on which its score is a or more above r_j, for every a ≥ 0 with

.. math:: \rho_j(a) = \mathrm{reach}_j \sqrt{\kappa^2 \varepsilon^2 - (a / L)^2} \le \mathrm{room}_j,

where room_j is a radius within which every box overlaps the object by more than θ. *Proof.* (a / L)² and the square of
how far the box moved over its reach add up to no more than κ²ε². ∎

A rival that comes before s has a score of low_s or more. So it is right if low_s ≥ r_j + a for such an a.

*Lemma (distinct matches).* One detection is not right for two objects of one class, so objects that are surely found
are matched with distinct detections, also by an evaluator that gives each detection the free object that it overlaps
most.

*Proof.* 1 − IoU is a metric. If the box b overlaps g by more than θ, then IoU(b, g') ≤ 1 − IoU(b, g) + IoU(g, g') <
1 − θ + 2θ − 1 = θ < IoU(b, g). So b overlaps g more than any other object of the class. It is either given g, or g was
given to another detection of its class with an overlap of a half or more; g is found in both cases. ∎
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from lipguide.tasks.detection.certificates.overlap import overlap, room

__all__ = ["heights", "needed", "right", "rooms"]

MARGIN = 1e-6  # above θ, for the rounding of overlaps


def needed(truth: Tensor, labels: Tensor) -> Tensor:
    """(n,): the overlap θ at which a box is right for each object of a scene and for no other of its class.

    >>> needed(torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]), torch.tensor([1, 1]))
    tensor([0.5000, 0.5000])
    """
    if not len(labels):
        return truth.new_zeros(0)
    others = box_iou(truth, truth).fill_diagonal_(0)
    return (1 + torch.where(labels[:, None] == labels, others, 0.0).amax(1)) / 2


def right(boxes: Tensor, radius: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """(n, P): which windows are right for which object, wherever their boxes (P, 4) move within `radius` (P,)."""
    return rooms(boxes, truth, labels) >= radius


def rooms(boxes: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """(n, P): the radius within which each window's box (P, 4) is right for each object; −∞ where it is not at all."""
    boxes, truth = boxes.double(), truth.double()
    least = needed(truth, labels)
    result = boxes.new_full((len(truth), len(boxes)), -torch.inf)
    now = overlap(boxes, truth[:, None]) > least[:, None]
    thing, window = now.nonzero(as_tuple=True)
    result[thing, window] = room(boxes[window], truth[thing], least[thing] + MARGIN)
    return result


def heights(
    scores: Tensor, low: Tensor, up: Tensor, rise: Tensor, labels: Tensor, graph: Tensor
) -> tuple[Tensor, Tensor]:
    """For each object of a scene, the threshold below which it is surely found, before and after suppression: (n,)
    each, −∞ for an object that is not.

    Args:
        scores: (P, C) of the windows.
        low, up: (P, C), between which they move.
        rise: (n, P), by how much each window's score must have risen for it to be right for each object: −∞ where it is
            right in any case, ∞ where it need not be.
        labels: (n,) of the objects.
        graph: (P, P), the rivals.

    >>> right, wrong = -torch.inf, torch.inf
    >>> rise = torch.tensor([[right, right, wrong]])
    >>> scores = torch.tensor([[0.5], [0.9], [0.4]])
    >>> one, everyone = torch.tensor([0]), torch.ones(3, 3).bool()
    >>> heights(scores, scores - 0.2, scores + 0.2, rise, one, everyone)[1]  # 0.9 − 0.2; the wrong one reaches 0.6
    tensor([0.7000])
    >>> heights(scores, scores - 0.3, scores + 0.3, rise, one, everyone)[1]  # now it may win
    tensor([-inf])
    >>> rise = torch.tensor([[right, right, 0.1]])
    >>> heights(scores, scores - 0.3, scores + 0.3, rise, one, everyone)[1]  # but if it does, it is right
    tensor([0.6000])
    """
    own, falls, rises = (part[:, labels].mT for part in (scores, low, up))  # (n, P)
    if not own.numel():
        return own.new_full((2, len(labels)), -torch.inf).unbind()
    before = falls.masked_fill(rise > -torch.inf, -torch.inf)
    wrong = torch.minimum(own + rise, rises)  # no window has a score above this without being right
    barrier = wrong[:, None].masked_fill(~graph, -torch.inf).amax(2)  # over the rivals of each window
    after = before.masked_fill(falls <= barrier, -torch.inf)
    return before.amax(1), after.amax(1)

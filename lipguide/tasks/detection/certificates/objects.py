r"""Which objects are surely found: whoever wins is right.

Fix a picture, an object with class c, and ε. Scores move by at most d = Lε, the box of window i within a ball of radius
ρ_i. Window i is *right* for the object if every box of its ball overlaps it by more than

.. math:: \theta = \tfrac12 \bigl(1 + \text{the largest overlap of the object with another one of its class}\bigr).

*Lemma (whoever wins is right).* Let S be the right windows and M the best score for c among them. If M − d > t, and no
window j outside S that is a rival of an s in S has both r_s ≥ M − 2d and r_j ≥ M − 2d, then on every picture within ε
the decision above t reports c with a box that overlaps the object by more than θ.

*Proof.* On the moved picture let s be the peak of S: the best score for c, the first in order of equal ones. The window
that had M has M − d or more there, hence so has s, which is above t; and r_s ≥ M − 2d. If s is not reported, a rival j
scores as well as s or better, M − d or more, so r_j ≥ M − 2d. By the choice of s, j is not in S (of two equal scores in
S the first one is the peak). That is the excluded pair. So s is reported, and it is right. ∎

Which window wins may change from picture to picture; nothing depends on it. It needs no chain of suppressions, and it
holds for greedy suppression on the same graph as well.

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

from lipguide.tasks.detection.certificates.overlap import least_in_cube, overlap, surely_overlaps

__all__ = ["heights", "needed", "right"]

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
    least = needed(truth, labels)
    result = torch.zeros(len(truth), len(boxes), dtype=torch.bool, device=boxes.device)
    now = overlap(boxes, truth[:, None]) > least[:, None]
    thing, window = now.nonzero(as_tuple=True)
    ball = boxes[window], radius[window], truth[thing]
    wanted = least[thing] + MARGIN
    result[thing, window] = surely_overlaps(*ball, wanted) | (least_in_cube(*ball) >= wanted)
    return result


def heights(scores: Tensor, good: Tensor, labels: Tensor, graph: Tensor, drift: float) -> tuple[Tensor, Tensor]:
    """For each object of a scene, the threshold below which it is surely found, before and after suppression: (n,)
    each, −∞ for an object that is not.

    Args:
        scores: (P, C) of the windows.
        good: (n, P), as `right` gives it.
        labels: (n,) of the objects.
        graph: (P, P), the rivals.
        drift: how far a score may move.

    >>> good = torch.tensor([[True, True, False]])
    >>> scores = torch.tensor([[0.5], [0.9], [0.4]])
    >>> everyone = torch.ones(3, 3).bool()
    >>> heights(scores, good, torch.tensor([0]), everyone, 0.2)[1]  # 0.9 − 0.2; the wrong one reaches 0.6
    tensor([0.7000])
    >>> heights(scores, good, torch.tensor([0]), everyone, 0.3)[1]  # now it may win
    tensor([-inf])
    """
    own = scores[:, labels].mT  # (n, P)
    best = own.masked_fill(~good, -torch.inf).amax(1) if own.numel() else own.new_full((len(labels),), -torch.inf)
    before = best - drift
    reaches = own >= (best - 2 * drift)[:, None]
    # A rival of a window that may be the peak of S, and itself not in S.
    beside = (good & reaches).to(scores) @ graph.to(scores) > 0
    spoilt = (beside & ~good & reaches).any(1)
    return before, before.masked_fill(spoilt, -torch.inf)

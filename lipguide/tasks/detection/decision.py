r"""A decision made to be certified: a window speaks by its radius, and who is heard silences its rivals.

*Score.* A window's score for class c is its signed distance, in features, from where c stops being its answer:

.. math:: r_c = \min_{j \ne c} \frac{z_c - z_j}{\lVert w_c - w_j \rVert}

Each quotient is 1-Lipschitz in the features and so is their least: where the features move by at most ε, every score
moves by at most ε. At most one class of a window has a score above 0. No temperature, no softmax: the score of a
detection *is* a certified radius.

*Rivals.* Two windows are rivals if they could look at one and the same digit: near in place and height, by their fixed
geometry. The graph does not depend on the picture, so nothing can be attacked but the scores on it; overlap of boxes,
which plain suppression asks for, moves with them.

*Suppression.* Of each class, the windows above the threshold have their turn by falling score, of equal ones the first
in order; who has not been silenced is reported, and silences its rivals. Two things follow, and the certificates need
nothing else: what is reported for one class is an independent set of the graph, and a window that speaks and is not
reported has a rival that is reported and came before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipguide.robustness.certificates.radii import slopes
from lipguide.tasks.detection.boxes import check_finite, check_number

__all__ = ["heard", "radii", "reported", "rivals", "together"]


def radii(logits: Tensor, rows: Tensor) -> Tensor:
    """(N, P, C): the score of each class, the last one, background, left out, from logits (N, P, C + 1).

    Args:
        rows: (C + 1, features), of the class head.

    >>> radii(torch.tensor([[[3.0, 1.0, 0.0]]]), torch.eye(3))  # rows √2 apart
    tensor([[[ 1.4142, -1.4142]]])
    """
    apart = slopes(len(rows), 1.0, rows, logits.device).to(logits)  # ‖w_c − w_j‖
    scores = []
    for label in range(logits.shape[-1] - 1):
        others = [other for other in range(logits.shape[-1]) if other != label]
        gaps = logits[..., label, None] - logits[..., others]
        scores.append((gaps / apart[label, others]).amin(-1))
    return torch.stack(scores, -1)


def together(rows: Tensor, sides: Tensor) -> Tensor:
    """(C,): how fast in the features the score of a class and `sides` move, as one vector: √2 at most for sides of
    norm 1, and 1 if no direction in which a score grows is one in which they move.

    A score that rises is the least of quotients, and rises by no more than the one that was the least; one that falls,
    by no more than the one that is. So it is enough to bound each quotient together with the sides.

    Args:
        rows: (C + 1, features), of the class head.
        sides: (4, features), of the box head.

    >>> together(torch.eye(3, 8), torch.eye(8)[4:])
    tensor([1., 1.])
    """
    classes = len(rows) - 1
    apart = slopes(len(rows), 1.0, rows, rows.device).to(rows)
    worst = []
    for label in range(classes):
        others = [other for other in range(classes + 1) if other != label]
        directions = (rows[label] - rows[others]) / apart[label, others, None]
        both = torch.cat([directions[:, None], sides.expand(classes, -1, -1)], 1)  # (C, 1 + 4, features)
        worst.append(torch.linalg.matrix_norm(both, 2).amax())
    return torch.stack(worst)


def rivals(centres: Tensor, heights: Tensor, across: float, along: float, octaves: float) -> Tensor:
    """(P, P): which windows could look at the same digit, each one its own rival.

    Args:
        centres: (P, 2), x and y.
        heights: (P,), of the digit that a window expects, in the same unit.
        across, along: largest distance in x and in y, in heights (the mean of both windows').
        octaves: largest ratio of the heights.

    >>> centres = torch.tensor([[0.5, 0.5], [0.6, 0.5], [0.9, 0.5]])
    >>> rivals(centres, torch.full((3,), 0.5), 0.4, 0.4, 0.6).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    apart = (centres[:, None] - centres).abs() / ((heights[:, None] + heights) / 2)[..., None]
    ratio = (heights[:, None] / heights).log2().abs()
    return (apart[..., 0] <= across) & (apart[..., 1] <= along) & (ratio <= octaves)


def heard(scores: Tensor, graph: Tensor, least: float) -> Tensor:
    """(P, C) bool: which windows of scores (P, C) above `least` are reported for which class.

    In each turn the peaks are heard, of all classes at once: who has no better rival left. The best one left is among
    them, and nobody who comes later can silence them, so this is suppression by falling score.

    >>> line = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    >>> heard(torch.tensor([[0.3], [0.5], [0.4]]), line, 0.0).squeeze(1)
    tensor([False,  True, False])
    >>> heard(torch.tensor([[0.3], [0.4], [0.5]]), line, 0.0).squeeze(1)  # the silenced one silences nobody
    tensor([ True, False,  True])
    """
    speaks = scores > least
    which = speaks.any(1).nonzero().squeeze(1)
    some, left = scores[which], speaks[which]
    near = graph[which[:, None], which]
    earlier = torch.ones_like(near).tril(-1)
    before = some[None] > some[:, None]  # (one, its rival, C)
    before |= (some[None] == some[:, None]) & earlier[..., None]
    before &= near[..., None]
    spoken = torch.zeros_like(left)
    while left.any():
        peaks = left & ~(before & left).any(1)
        silenced = near.float() @ peaks.float() > 0
        spoken |= peaks
        left = left & ~peaks & ~silenced
    result = torch.zeros_like(speaks)
    result[which] = spoken
    return result


@torch.no_grad()
def reported(
    scores: Tensor, boxes: Tensor, graph: Tensor, least: float = 0.0, first: int = 0
) -> list[dict[str, Tensor]]:
    """Detections of every scene, as torchmetrics takes them, by falling score.

    Args:
        scores: (N, P, C), such as `radii` gives them.
        boxes: (N, P, 4) xyxy.
        graph: (P, P), such as `rivals` gives it.
        least: a window speaks above it.
        first: the number of the first scene, for errors.

    >>> boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.1, 0.0, 0.6, 0.5]]])
    >>> found = reported(torch.tensor([[[0.9, 0.0], [0.8, 0.3]]]), boxes, torch.ones(2, 2).bool())
    >>> found[0]["labels"].tolist(), found[0]["scores"].tolist()
    ([0, 1], [0.8999999761581421, 0.30000001192092896])
    """
    check_number("least", least)
    check_finite(scores, boxes, first)
    found = []
    for own_scores, own_boxes in zip(scores, boxes, strict=True):
        window, label = heard(own_scores, graph, least).nonzero(as_tuple=True)
        values = own_scores[window, label]
        order = values.argsort(descending=True, stable=True)
        place = own_boxes[window[order]].clamp(0, 1)
        found.append({"boxes": place, "scores": values[order], "labels": label[order]})
    return found

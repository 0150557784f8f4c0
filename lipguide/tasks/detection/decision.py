r"""A decision made to be certified: a window speaks by its radius, and only the peak of its rivals is heard.

*Score.* A window's score for class c is its signed distance, in features, from where c stops being its answer:

.. math:: r_c = \min_{j \ne c} \frac{z_c - z_j}{\lVert w_c - w_j \rVert}

Each quotient is 1-Lipschitz in the features and so is their least: where the features move by at most ε, every score
moves by at most ε. At most one class of a window has a score above 0. No temperature, no softmax: the score of a
detection *is* a certified radius.

*Rivals.* Two windows are rivals if they could look at one and the same digit: near in place and height, by their fixed
geometry. The graph does not depend on the picture, so nothing can be attacked but the scores on it; overlap of boxes,
which plain suppression asks for, moves with them.

*Peaks.* A class is reported at a window if its score is above the threshold and no rival has a better score for this
class; of equal ones the first in order. What is reported for one class is therefore an independent set of the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipguide.robustness.certificates.radii import slopes
from lipguide.tasks.detection.boxes import check_finite, check_number

__all__ = ["heard", "peaks", "radii", "rivals"]


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
    """(P, C) bool: the peaks among scores (P, C) that lie above `least`.

    >>> line = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    >>> heard(torch.tensor([[0.3], [0.5], [0.4]]), line, 0.0).squeeze(1)
    tensor([False,  True, False])
    """
    speaks = scores > least
    which = speaks.any(1).nonzero().squeeze(1)
    some = scores[which]
    near = graph[which[:, None], which]
    earlier = torch.ones_like(near).tril(-1)
    better = some[None] > some[:, None]  # (one, its rival, C)
    better |= (some[None] == some[:, None]) & earlier[..., None]
    beaten = (better & near[..., None]).any(1)
    result = torch.zeros_like(speaks)
    result[which] = speaks[which] & ~beaten
    return result


@torch.no_grad()
def peaks(scores: Tensor, boxes: Tensor, graph: Tensor, least: float = 0.0, first: int = 0) -> list[dict[str, Tensor]]:
    """Detections of every scene, as torchmetrics takes them, by falling score.

    Args:
        scores: (N, P, C), such as `radii` gives them.
        boxes: (N, P, 4) xyxy.
        graph: (P, P), such as `rivals` gives it.
        least: a window speaks above it.
        first: the number of the first scene, for errors.

    >>> boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.1, 0.0, 0.6, 0.5]]])
    >>> found = peaks(torch.tensor([[[0.9, 0.0], [0.8, 0.3]]]), boxes, torch.ones(2, 2).bool())
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

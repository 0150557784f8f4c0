r"""How many detections there can be at most: a bound on false alarms.

*Lemma (beaten).* If a rival of window i scores more than 2d above it, i is not reported on any picture within ε: the
rival still scores more there.

*Lemma (cliques).* The windows that may be reported for a class above t are those with r_i + d > t that are not
beaten. Cover them with cliques of rivals. What is reported is an independent set of the graph, so it takes at most one
window of each clique. Hence there are at most as many detections as cliques.

The cover is greedy: the highest window that is left opens a clique, and takes in, by falling score, what is a rival of
all its members. Whatever the threshold, the windows above it are covered by the cliques whose openers are above it: a
clique's opener is its highest member. So one cover bounds the detections above every threshold.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["births"]


def births(scores: Tensor, graph: Tensor, drift: float, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Thresholds below which one more detection of a scene is possible, (K,), and the class of each, (K,).

    Above `t` ≥ `least` there are, for class c, at most as many detections as there are entries of class c above t.

    Args:
        scores: (P, C) of the windows.
        graph: (P, P), the rivals.
        drift: how far a score may move.

    >>> graph = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    >>> births(torch.tensor([[0.5], [0.4], [-0.1]]), graph, 0.2)  # two rivals, and one that may be woken
    (tensor([0.7000, 0.1000]), tensor([0, 0]))
    """
    window, label = (scores + drift > least).nonzero(as_tuple=True)
    values, near = scores.cpu().numpy(), graph.cpu().numpy()
    window, label = window.cpu().numpy(), label.cpu().numpy()
    found: list[float] = []
    classes: list[int] = []
    for c in np.unique(label):
        some = window[label == c]
        own = values[some, c]
        order = np.argsort(-own, kind="stable")
        some, own = some[order], own[order]
        link = near[some[:, None], some]
        beaten = (link & (own[None] - own[:, None] > 2 * drift)).any(1)
        openers = _openers(link[~beaten][:, ~beaten])
        found += (own[~beaten][openers] + drift).tolist()
        classes += [int(c)] * len(openers)
    return torch.tensor(found, device="cpu"), torch.tensor(classes, dtype=torch.long, device="cpu")


def _openers(link: np.ndarray) -> list[int]:
    """The first members of the cliques of a greedy cover, from a graph (K, K) whose nodes are in order."""
    left = np.ones(len(link), dtype=bool)
    openers = []
    while left.any():
        first = int(left.argmax())
        openers.append(first)
        allowed = left & link[first]
        while allowed.any():
            member = int(allowed.argmax())
            left[member] = allowed[member] = False
            allowed &= link[member]
        left[first] = False
    return openers

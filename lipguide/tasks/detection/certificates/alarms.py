r"""How many detections there can be at most: a bound on false alarms.

Scores move between low and up. Window j *may precede* window i if up_j ≥ low_i, and *surely precedes* it if
low_j > up_i.

*Lemma (silent).* Window i is reported on no picture within ε if a rival j surely precedes it, and every rival of j that
may precede j, and may itself be reported, is a rival of i as well.

*Proof.* Let i speak on some picture; then so does j, before it. If j is reported, it silences i. If not, a reported
rival k of j came before j (`lipguide.tasks.detection.decision`); so k may precede j, is a rival of i, comes before i,
and silences it. ∎

That some rival scores surely higher is not enough: whoever silences the rival may stand too far off to silence i.
Windows known to be silent are no such k, so the lemma is applied until it finds no more.

*Lemma (cliques).* The windows that may be reported for a class above t are those with up_i > t that are not silent.
Cover them with cliques of rivals. What is reported is an independent set of the graph, so it takes at most one window
of each clique. Hence there are at most as many detections as cliques.

The cover is greedy: the highest window that is left, by up, opens a clique, and takes in, by falling up, what is
a rival of all its members. Whatever the threshold, the windows above it are covered by the cliques whose openers are
above it: a clique's opener is its highest member. So one cover bounds the detections above every threshold.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["births", "openers"]


def births(low: Tensor, up: Tensor, graph: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Thresholds below which one more detection of a scene is possible, (K,), and the class of each, (K,).

    Above `t` ≥ `least` there are, for class c, at most as many detections as there are entries of class c above t.

    Args:
        low, up: (P, C), between which the scores of the windows move.
        graph: (P, P), the rivals.

    >>> graph = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    >>> scores = torch.tensor([[0.5], [0.4], [-0.1]])
    >>> births(scores - 0.2, scores + 0.2, graph)  # two rivals, and one that may be woken
    (tensor([0.7000, 0.1000]), tensor([0, 0]))
    """
    window, label = openers(low, up, graph, least)
    return up.cpu()[window, label], label


def openers(low: Tensor, up: Tensor, graph: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """The windows whose highest scores these are, and the classes, (K,) each."""
    window, label = (up > least).nonzero(as_tuple=True)
    lows, ups, near = low.cpu().numpy(), up.cpu().numpy(), graph.cpu().numpy()
    window, label = window.cpu().numpy(), label.cpu().numpy()
    found: list[int] = []
    classes: list[int] = []
    for c in np.unique(label):
        some = window[label == c]
        some = some[np.argsort(-ups[some, c], kind="stable")]
        link = near[some[:, None], some]
        awake = ~_silent(lows[some, c], ups[some, c], link)
        first = _openers(link[awake][:, awake])
        found += some[awake][first].tolist()
        classes += [int(c)] * len(first)
    return tuple(torch.tensor(part, dtype=torch.long, device="cpu") for part in (found, classes))


def _silent(low: np.ndarray, up: np.ndarray, link: np.ndarray) -> np.ndarray:
    """(K,): which windows are reported on no picture, from between what their scores move (K,) and rivals (K, K)."""
    surely = link & (low[None] > up[:, None])  # [i, j]: j comes before i
    perhaps = link & (up[None] >= low[:, None])
    strangers = (~link).astype(np.float32)
    silent = np.zeros(len(low), dtype=bool)
    while surely.any():
        silencers = perhaps & ~silent[None]  # [j, k]: k may silence j
        escapes = silencers.astype(np.float32) @ strangers > 0  # [j, i]: one of them is no rival of i
        found = (surely & ~escapes.T).any(1)
        if (found == silent).all():
            break
        silent = found
    return silent


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

r"""How many detections there can be at most: a bound on false alarms.

Scores move by at most d. Window j *may precede* window i if r_j + d ≥ r_i − d, and *surely precedes* it if
r_j − d > r_i + d.

*Lemma (silent).* Window i is reported on no picture within ε if a rival j surely precedes it, and every rival of j that
may precede j, and may itself be reported, is a rival of i as well.

*Proof.* Let i speak on some picture; then so does j, before it. If j is reported, it silences i. If not, a reported
rival k of j came before j (`lipguide.tasks.detection.decision`); so k may precede j, is a rival of i, comes before i,
and silences it. ∎

That some rival scores surely higher is not enough: whoever silences the rival may stand too far off to silence i.
Windows known to be silent are no such k, so the lemma is applied until it finds no more.

*Lemma (cliques).* The windows that may be reported for a class above t are those with r_i + d > t that are not silent.
Cover them with cliques of rivals. What is reported is an independent set of the graph, so it takes at most one window
of each clique. Hence there are at most as many detections as cliques.

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
        awake = ~_silent(own, link, drift)
        openers = _openers(link[awake][:, awake])
        found += (own[awake][openers] + drift).tolist()
        classes += [int(c)] * len(openers)
    return torch.tensor(found, device="cpu"), torch.tensor(classes, dtype=torch.long, device="cpu")


def _silent(own: np.ndarray, link: np.ndarray, drift: float) -> np.ndarray:
    """(K,): which windows are reported on no picture, from their scores (K,) and rivals (K, K)."""
    ahead = own[None] - own[:, None]  # [i, j]: how far j is ahead of i
    surely = link & (ahead > 2 * drift)
    perhaps = link & (ahead >= -2 * drift)
    strangers = (~link).astype(np.float32)
    silent = np.zeros(len(own), dtype=bool)
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

r"""How many detections there can be at most, and how many of them can be false.

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

*Lemma (what is right is no alarm).* Choose for each object a clique of rivals, and let window i of it be right for the
object wherever its score is a_i or more (`…objects`). Let f_i be the least of up_i and of the a_i of all objects whose
clique i is in. Then above t at most as many detections are false as there are cliques of the cover with a member of
f_i > t.

*Proof.* Call what is reported above t *good* if it belongs to an object's clique and is right for the object. An object
has one good detection at most, for its windows are rivals. It is then matched, with that one or with an earlier one
that is above t as well (*distinct matches*, `…objects`). So there are as many true detections as good ones, or more,
and no more false ones than others. Each of these stands in a clique of the cover by itself, and scores up_i or less,
and a_i or less for each object whose clique it is in; so its f_i is above t. ∎

An object may be lost to an attack; that it may still be found is no alarm. That it may be found twice is one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cover", "cover", "falsely"]


class Cover(NamedTuple):
    """Cliques of windows of which no two are reported for one class, whatever happens within ε.

    Args:
        label: (K,), the class of each clique.
        clique, window: (M,), of each member; those of the first clique come first, and of each clique its highest one.
    """

    label: Tensor
    clique: Tensor
    window: Tensor

    def highest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(K,): the largest of values (P, C) in each clique, and its window."""
        own = values.cpu()[self.window, self.label[self.clique]]
        largest = own.new_full((len(self.label),), -torch.inf).scatter_reduce(0, self.clique, own, "amax")
        there = (own == largest[self.clique]).nonzero().squeeze(1).flip(0)  # of equals the first stays
        return largest, self.window.new_zeros(len(self.label)).scatter(0, self.clique[there], self.window[there])


def cover(low: Tensor, up: Tensor, graph: Tensor, least: float = 0.0) -> Cover:
    """The windows of a scene that may be reported above `least`, in cliques.

    Above `t` ≥ `least` there are, for class c, at most as many detections as there are cliques of class c with a window
    whose `up` is above t.

    Args:
        low, up: (P, C), between which the scores of the windows move.
        graph: (P, P), the rivals.

    >>> graph = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    >>> scores = torch.tensor([[0.5], [0.4], [-0.1]])
    >>> cover(scores - 0.2, scores + 0.2, graph).highest(scores + 0.2)  # two rivals, and one that may be woken
    (tensor([0.7000, 0.1000]), tensor([0, 2]))
    """
    window, label = (up > least).nonzero(as_tuple=True)
    lows, ups, near = low.cpu().numpy(), up.cpu().numpy(), graph.cpu().numpy()
    window, label = window.cpu().numpy(), label.cpu().numpy()
    labels: list[int] = []
    cliques: list[np.ndarray] = []
    for c in np.unique(label):
        some = window[label == c]
        some = some[np.argsort(-ups[some, c], kind="stable")]
        link = near[some[:, None], some]
        some = some[~_silent(lows[some, c], ups[some, c], link)]
        found = _cliques(near[some[:, None], some])
        cliques += [some[members] for members in found]
        labels += [int(c)] * len(found)
    sizes = torch.tensor([len(members) for members in cliques], dtype=torch.long, device="cpu")
    windows = torch.from_numpy(np.concatenate([*cliques, window[:0]]))
    numbers = torch.arange(len(cliques), device="cpu").repeat_interleave(sizes)
    return Cover(torch.tensor(labels, dtype=torch.long, device="cpu"), numbers, windows)


def falsely(scores: Tensor, up: Tensor, rise: Tensor, labels: Tensor, graph: Tensor) -> Tensor:
    """(P, C): how high each window may be reported without being the good detection of an object, f of the lemma. The
    clique of an object takes, by falling up, what is a rival of all before it.

    Args:
        scores, up: (P, C) of the windows, and how high they rise.
        rise, labels, graph: as `lipguide.tasks.detection.certificates.objects.heights` takes them.

    >>> scores = torch.tensor([[0.5], [0.4], [0.3]])
    >>> rise = torch.tensor([[-torch.inf, torch.inf, 0.1]])  # right, never, and only if it rises
    >>> falsely(scores, scores + 0.2, rise, torch.tensor([0]), torch.ones(3, 3).bool()).squeeze(1)
    tensor([  -inf, 0.6000, 0.4000])
    """
    false, near = up.cpu().clone(), graph.cpu().numpy()
    for label, risen in zip(labels.tolist(), rise.cpu(), strict=True):
        right = scores[:, label].cpu() + risen
        window = (right < up[:, label].cpu()).nonzero().squeeze(1)
        window = window[up[window, label].cpu().argsort(descending=True, stable=True)].numpy()
        own = torch.from_numpy(window[_clique(near[window[:, None], window], np.ones(len(window), dtype=bool))])
        false[own, label] = torch.minimum(false[own, label], right[own].to(false))
    return false


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


def _cliques(link: np.ndarray) -> list[np.ndarray]:
    """The cliques of a greedy cover, from a graph (K, K) whose nodes are in order."""
    left = np.ones(len(link), dtype=bool)
    cliques = []
    while left.any():
        cliques.append(_clique(link, left))
        left[cliques[-1]] = False
    return cliques


def _clique(link: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The first of some nodes (K,), and each further one that is linked to all before it."""
    allowed, members = among.copy(), []
    while allowed.any():
        member = int(allowed.argmax())
        members.append(member)
        allowed[member] = False
        allowed &= link[member]
    return np.array(members, dtype=np.int64)

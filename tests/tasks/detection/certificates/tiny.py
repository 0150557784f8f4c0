"""Tiny cases whose moves can all be tried."""

import itertools

import torch


def corners(count, drift, extra=60):
    """Moves of scores by up to drift: all corners, and some between."""
    edges = torch.tensor(list(itertools.product((-drift, drift), repeat=count)))
    return torch.cat([edges, drift * (2 * torch.rand(extra, count) - 1)])


def around(scores, drift):
    """Between what they move, where all may move as far."""
    return scores - drift, scores + drift


def tiny(seed):
    torch.manual_seed(seed)
    graph = torch.rand(6, 6) < 0.4
    graph = graph | graph.mT | torch.eye(6).bool()
    return torch.rand(6, 1) * 1.5 - 0.4, graph, torch.rand(1, 6) < 0.4

r"""Median smoothing of a detector (Chiang et al., 2020), for comparison: certain with a probability, by sampling.

Any detector, suppression included, is a function f of the picture. Sort what it finds into slots, and let h_p(x) be the
p-th percentile of one coordinate of one slot of f(x + N(0, σ²)). Then for every perturbation δ of norm ε or less

.. math:: h_{\Phi(\Phi^{-1}(p) - \varepsilon/\sigma)}(x) \le h_p(x + \delta)
   \le h_{\Phi(\Phi^{-1}(p) + \varepsilon/\sigma)}(x).

The smoothed detector reports medians, p = 1/2. The two outer percentiles are not known: order statistics of n draws
bound them, each with probability 1 − α: of one coordinate of one slot, from one side. That all bounds of a picture hold
together is less probable; so is that the eight hold on which the box of one slot rests, of which one may be wrong with
probability 8 α. The certificate is of the smoothed detector, not of the one that it asks.

A slot belongs to one class and one part of the picture; in it boxes stand from left to right. Where a copy has no box
in a slot its coordinates are infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.arguments import whole
from lipguide.robustness.smoothing import noisy_copies
from lipguide.tasks.detection.boxes import check_number
from lipguide.tasks.detection.certificates.overlap import overlap

__all__ = ["Smoothed", "order_statistics", "smoothed", "surely_found"]

Detections = list[dict[str, Tensor]]
PARTS, DEEP = 3, 2  # parts of the picture from left to right, and boxes of one class in each


class Smoothed(NamedTuple):
    """Boxes of one picture's slots: (classes, slots, 4) each, infinite where there is none. middle: the medians, which
    the smoothed detector reports; low, high: between them it stays within ε. Each number of low and high bounds with
    probability 1 − α by itself, not all of them together."""

    low: Tensor
    middle: Tensor
    high: Tensor


def order_statistics(draws: int, eps: float, sigma: float, alpha: float = 1e-3) -> tuple[int, int] | None:
    """Which of n sorted draws, from 0, bound the two outer percentiles from below and above, or None: too few draws.

    Each holds with probability 1 − alpha, by itself: both of them do with 1 − 2 alpha at least.

    >>> order_statistics(1000, eps=0.1, sigma=0.25)
    (298, 701)
    """
    whole("draws", draws, "a percentile needs draws")
    check_number("eps", eps, 0)
    check_number("sigma", sigma, 1e-9)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is a probability between 0 and 1, not {alpha}")
    share = NormalDist().cdf(-eps / sigma)
    if not share:  # less than there are numbers for
        return None
    # The k-th smallest is above the percentile if at most k − 1 draws are below: it is a bound while that is unlikely.
    below, low = 0.0, -1
    for k in range(draws):
        log_ways = math.lgamma(draws + 1) - math.lgamma(k + 1) - math.lgamma(draws - k + 1)
        below += math.exp(log_ways + k * math.log(share) + (draws - k) * math.log1p(-share))
        if below > alpha:
            break
        low = k
    return None if low < 0 else (low, draws - 1 - low)


@torch.no_grad()
def smoothed(
    detect: Callable[[Tensor], Detections],
    image: Tensor,
    eps: float,
    sigma: float = 0.25,
    draws: int = 1000,
    classes: int = 10,
    alpha: float = 1e-3,
    batch_size: int = 100,
    generator: torch.Generator | None = None,
) -> Smoothed:
    """Ask a detector about noisy copies of a picture (3, H, W), and bound the medians of what it finds.

    Args:
        detect: pictures (N, 3, H, W) to detections, suppression included; noisy pixels leave [0, 1].
        eps: L2 norm within which the medians stay between `low` and `high`.
        sigma: standard deviation of the noise a pixel.
        alpha: probability that one bound of one coordinate is wrong. That any of a picture's is wrong may be as many
            times as probable as there are bounds.
    """
    between = order_statistics(draws, eps, sigma, alpha)
    if between is None:
        raise ValueError(
            f"{draws} draws bound no percentile at eps = {eps} and sigma = {sigma}: take more draws, or a larger sigma"
        )
    generator = generator or torch.Generator(image.device).manual_seed(0)
    batches = noisy_copies(image, draws, sigma, batch_size, generator)
    slots = [_slots(found, classes) for batch in batches for found in detect(batch)]
    ordered = torch.stack(slots).sort(0).values  # (draws, classes, slots, 4)
    return Smoothed(ordered[between[0]], ordered[draws // 2], ordered[between[1]])


def _slots(found: dict[str, Tensor], classes: int) -> Tensor:
    """(classes, slots, 4): the boxes of a picture by class and part of the picture, from left to right."""
    slots = torch.full((classes, PARTS, DEEP, 4), torch.inf, device="cpu")
    middle = (found["boxes"][:, 0] + found["boxes"][:, 2]) / 2
    part = (middle * PARTS).long().clamp(0, PARTS - 1)
    taken = torch.zeros(classes, PARTS, dtype=torch.long, device="cpu")
    for row in middle.argsort(stable=True).tolist():
        label, place = int(found["labels"][row]), int(part[row])
        if taken[label, place] < DEEP:
            slots[label, place, taken[label, place]] = found["boxes"][row].cpu()
            taken[label, place] += 1
    return slots.flatten(1, 2)


def surely_found(bounds: Smoothed, truth: Tensor, labels: Tensor, least: float = 0.5) -> Tensor:
    """(n,): which objects a slot of their class surely overlaps by `least`, wherever its box is between low and high.

    "Surely" holds where the bounds do, and each of them does with probability 1 − α by itself: an object rests on the
    eight of a slot, and all objects together on more. No correction is made for that.

    Each slot serves one object, the first that it suits.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> still = Smoothed(*[box.expand(1, 1, 4)] * 3)
    >>> surely_found(still, box[None], torch.tensor([0]))
    tensor([True])
    """
    corners = torch.cartesian_prod(*[torch.tensor([0, 1], device="cpu")] * 4).bool()  # (16, 4)
    used = torch.zeros_like(bounds.low[..., 0], dtype=torch.bool)
    found = []
    for box, label in zip(truth.cpu(), labels.tolist(), strict=True):
        low, high = bounds.low[label], bounds.high[label]  # (slots, 4)
        there = low.isfinite().all(1) & high.isfinite().all(1) & ~used[label]
        boxes = torch.where(corners, high[:, None], low[:, None]).nan_to_num(posinf=0.0)
        good = there & (overlap(boxes, box).amin(1) >= least)
        found.append(bool(good.any()))
        if found[-1]:
            used[label, int(good.int().argmax())] = True
    return torch.tensor(found, dtype=torch.bool, device="cpu")

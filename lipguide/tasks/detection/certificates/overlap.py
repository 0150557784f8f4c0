r"""The least overlap of a moving box with a box that stands: over a cube of coordinates, and over a ball.

A box b = (x₀, y₀, x₁, y₁) moves within ‖b' − b‖ ≤ ρ; g stands. IoU is I / (A + A_g − I), with the intersection I.

*Cube.* IoU rises towards g's own coordinate and falls beyond it, in each coordinate, so its least value over a cube is
at one of the 16 corners. The cube of half side ρ holds the ball.

*Ball.* IoU ≥ t is F = (1 + t) I − t A − t A_g ≥ 0. Each side of the intersection is the least of four linear functions,
α = (x₁ or g's) − (x₀ or g's), β alike, so where none is negative F is the least of 16 functions

.. math:: F_{\alpha\beta} = (1 + t)\,\alpha\beta - t\,w h - t A_g .

Each is bilinear in the moves (d_x, d_y) of the columns and rows, so with ‖d_x‖ ‖d_y‖ ≤ ρ² / 2

.. math:: F_{\alpha\beta}(b + d) \ge
   F_{\alpha\beta}(b) - \rho\,\lVert\nabla F_{\alpha\beta}\rVert - \tfrac{\rho^2}{2} \lVert M\rVert,
   \qquad \lVert M\rVert_F^2 = (1 - t^2)\,n_a n_b + 4t^2,

where n_a is how many of the box's own columns α holds, and n_b of its rows β. If all 16 are ≥ 0, and α and β stay ≥ 0,
no box of the ball overlaps g by less than t. For a square box on its object the ball bound stands 1.5 times the drift
that the cube bound does.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["least_in_ball", "least_in_cube", "least_overlap", "overlap", "surely_overlaps"]

HALVINGS = 12  # of the interval in which the least overlap is sought: to 1/4096, downwards


class _Length(NamedTuple):
    """One of the four lengths whose least is a side of the intersection, and how it moves with the box."""

    value: Tensor  # (…)
    slope: Tensor  # (2,), in (low, high) of the box: of entries −1, 0 and 1


def overlap(boxes: Tensor, truth: Tensor) -> Tensor:
    """IoU of boxes (…, 4) and (…, 4), which broadcast; 0 where a box is turned inside out.

    >>> overlap(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0]))
    tensor(0.3333)
    """
    low = torch.maximum(boxes[..., :2], truth[..., :2])
    high = torch.minimum(boxes[..., 2:], truth[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    sides = boxes[..., 2:] - boxes[..., :2]
    area = torch.where((sides > 0).all(-1), sides.prod(-1), torch.inf)
    theirs = _area(truth)
    return both / (area + theirs - both)


def _area(boxes: Tensor) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides.prod(-1)


def least_in_cube(boxes: Tensor, radius: Tensor, truth: Tensor) -> Tensor:
    """The least IoU with `truth` where each coordinate moves by up to `radius` (…), by itself.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> least_in_cube(box, torch.tensor(0.1), box)  # 0.8² of 1
    tensor(0.6400)
    """
    signs = boxes.new_tensor(list(itertools.product((-1, 1), repeat=4)))  # (16, 4)
    corners = boxes[..., None, :] + radius[..., None, None] * signs  # (…, 16, 4)
    overlaps = overlap(corners, truth[..., None, :])  # (…, 16)
    return overlaps.amin(-1)


def surely_overlaps(boxes: Tensor, radius: Tensor, truth: Tensor, least: Tensor) -> Tensor:
    """Whether every box within the ball of `radius` (…) overlaps `truth` by `least` (…) or more.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> surely_overlaps(box, torch.tensor([0.2, 0.3]), box, torch.tensor(0.5))
    tensor([ True, False])
    """
    w = boxes[..., 2] - boxes[..., 0]
    h = boxes[..., 3] - boxes[..., 1]
    alphas = _lengths(boxes, truth, 0)
    betas = _lengths(boxes, truth, 1)

    # The box is not turned inside out, and α and β stay ≥ 0.
    shrinks = radius * 2**0.5
    good = (w > shrinks) & (h > shrinks)
    for length in (*alphas, *betas):
        good = good & (length.value >= radius * length.slope.norm())

    # All 16 F are ≥ 0.
    areas = w * h + _area(truth)
    for alpha in alphas:
        for beta in betas:
            value = (1 + least) * alpha.value * beta.value - least * areas
            good = good & (value >= _fall(alpha, beta, w, h, radius, least))
    return good


def _lengths(boxes: Tensor, truth: Tensor, axis: int) -> list[_Length]:
    """The four lengths of an axis, whose least is the intersection's: from box or truth to box or truth."""
    low = boxes[..., axis]
    high = boxes[..., axis + 2]
    their_low = truth[..., axis]
    their_high = truth[..., axis + 2]
    return [
        _Length(their_high - their_low + 0 * low, boxes.new_tensor([0.0, 0.0])),
        _Length(their_high - low, boxes.new_tensor([-1.0, 0.0])),
        _Length(high - their_low, boxes.new_tensor([0.0, 1.0])),
        _Length(high - low + 0 * their_low, boxes.new_tensor([-1.0, 1.0])),
    ]


def _fall(alpha: _Length, beta: _Length, w: Tensor, h: Tensor, radius: Tensor, least: Tensor) -> Tensor:
    """ρ ‖∇F‖ + ρ² ‖M‖ / 2: by how much F may fall within the ball."""
    in_columns = _squares((1 + least) * beta.value, alpha.slope, least * h)
    in_rows = _squares((1 + least) * alpha.value, beta.slope, least * w)
    gradient = (in_columns + in_rows).sqrt()
    own = float(alpha.slope.square().sum() * beta.slope.square().sum())  # n_a n_b
    twist = ((1 - least**2) * own + 4 * least**2).sqrt()  # ‖M‖
    return radius * gradient + radius**2 / 2 * twist


def _squares(of_length: Tensor, slope: Tensor, of_area: Tensor) -> Tensor:
    """‖of_length · slope − of_area · (−1, 1)‖²."""
    low = of_length * slope[0] + of_area
    high = of_length * slope[1] - of_area
    return low**2 + high**2


def least_in_ball(boxes: Tensor, radius: Tensor, truth: Tensor) -> Tensor:
    """A lower bound of the least IoU with `truth` where the box moves by up to `radius` (…) in the L2 norm.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> float(least_in_ball(box, torch.tensor(0.2), box)) > float(least_in_cube(box, torch.tensor(0.2), box))
    True
    """
    low = torch.zeros_like(boxes[..., 0] + radius + truth[..., 0])
    high = torch.ones_like(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        good = surely_overlaps(boxes, radius, truth, middle)
        low = torch.where(good, middle, low)
        high = torch.where(good, high, middle)
    return low


def least_overlap(boxes: Tensor, radius: Tensor, truth: Tensor) -> Tensor:
    """The least IoU with `truth` over the ball: the better one of both bounds."""
    return torch.maximum(least_in_cube(boxes, radius, truth), least_in_ball(boxes, radius, truth))

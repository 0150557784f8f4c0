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

import torch
from torch import Tensor

__all__ = ["least_in_ball", "least_in_cube", "least_overlap", "overlap", "surely_overlaps"]

HALVINGS = 12  # of the interval in which the least overlap is sought: to 1/4096, downwards


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
    return both / (area + (truth[..., 2:] - truth[..., :2]).prod(-1) - both)


def least_in_cube(boxes: Tensor, radius: Tensor, truth: Tensor) -> Tensor:
    """The least IoU with `truth` where each coordinate moves by up to `radius` (…), by itself.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> least_in_cube(box, torch.tensor(0.1), box)  # 0.8² of 1
    tensor(0.6400)
    """
    signs = boxes.new_tensor(list(itertools.product((-1, 1), repeat=4)))  # (16, 4)
    corners = boxes[..., None, :] + radius[..., None, None] * signs
    return overlap(corners, truth[..., None, :]).amin(-1)


def surely_overlaps(boxes: Tensor, radius: Tensor, truth: Tensor, least: Tensor) -> Tensor:
    """Whether every box within the ball of `radius` (…) overlaps `truth` by `least` (…) or more.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> surely_overlaps(box, torch.tensor([0.2, 0.3]), box, torch.tensor(0.5))
    tensor([ True, False])
    """
    (w, alphas), (h, betas) = _sides(boxes, truth, 0), _sides(boxes, truth, 1)
    area = (truth[..., 2:] - truth[..., :2]).prod(-1)
    good = torch.ones((), dtype=torch.bool, device=boxes.device)
    for alpha, a in alphas:
        good = good & (alpha >= radius * a.norm()) & (w > radius * 2**0.5)
        for beta, b in betas:
            good = good & (beta >= radius * b.norm()) & (h > radius * 2**0.5)
            value = (1 + least) * alpha * beta - least * (w * h + area)
            slope = _squares((1 + least) * beta, a, least * h) + _squares((1 + least) * alpha, b, least * w)
            twist = ((1 - least**2) * float(a.square().sum() * b.square().sum()) + 4 * least**2).sqrt()
            good = good & (value >= radius * slope.sqrt() + radius**2 / 2 * twist)
    return good


def _sides(boxes: Tensor, truth: Tensor, axis: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The box's own length along an axis; and the four lengths whose least is the intersection's, each with its slope
    in (low, high) of the box."""
    low, high = boxes[..., axis], boxes[..., axis + 2]
    their_low, their_high = truth[..., axis], truth[..., axis + 2]
    lengths = [
        (their_high - their_low + 0 * low, boxes.new_tensor([0.0, 0.0])),
        (their_high - low, boxes.new_tensor([-1.0, 0.0])),
        (high - their_low, boxes.new_tensor([0.0, 1.0])),
        (high - low + 0 * their_low, boxes.new_tensor([-1.0, 1.0])),
    ]
    return high - low, lengths


def _squares(of_length: Tensor, slope: Tensor, of_area: Tensor) -> Tensor:
    """‖of_length · slope − of_area · (−1, 1)‖²."""
    return (of_length * slope[0] + of_area) ** 2 + (of_length * slope[1] - of_area) ** 2


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
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low


def least_overlap(boxes: Tensor, radius: Tensor, truth: Tensor) -> Tensor:
    """The least IoU with `truth` over the ball: the better one of both bounds."""
    return torch.maximum(least_in_cube(boxes, radius, truth), least_in_ball(boxes, radius, truth))

r"""How far a box may move until it overlaps a box that stands by less than t.

A box b = (x₀, y₀, x₁, y₁) moves within ‖b' − b‖ ≤ ρ; g stands. IoU is I / (A + A_g − I), with the intersection I.

IoU ≥ t is F = (1 + t) I − t A − t A_g ≥ 0. Each side of the intersection is the least of four linear functions,
α = (x₁ or g's) − (x₀ or g's), β alike, so where none is negative F is the least of 16 functions

.. math:: F_{\alpha\beta} = (1 + t)\,\alpha\beta - t\,w h - t A_g .

With the gradient v and the moves d = (d_x, d_y) of the columns and rows, each of them is exactly

.. math:: F_{\alpha\beta}(b + d) = F_{\alpha\beta}(b) + v^\top d + \tfrac12 d^\top H d, \qquad
   H = \begin{pmatrix} 0 & M \\ M^\top & 0 \end{pmatrix},

for it is bilinear, with a matrix M of 2×2 that depends on t alone. Take a λ > ‖M‖, for which H + λ is positive.
Completed to a square,

.. math:: v^\top d + \tfrac12 d^\top H d = \tfrac12 \lVert d + (H + \lambda)^{-1} v \rVert_{H + \lambda}^2
   - \tfrac12 v^\top (H + \lambda)^{-1} v - \tfrac{\lambda}{2} \lVert d \rVert^2,

and the square is no less than 0. So F stays ≥ 0 where λ ‖d‖² ≤ 2 F(b) − vᵀ(H + λ)⁻¹ v, for any such λ: one radius each,
and the largest of some is taken. If all 16 are ≥ 0, and α and β stay ≥ 0, no box of the ball overlaps g by less than t.
That largest radius is the `room` of the box. The best λ is optimal (a quadratic function on a ball has no gap to its
dual), so nothing is lost but between the λ that are tried. For a square box on its object the room is twice that of the
16 corners of a cube of coordinates, which is the bound for sides that move by themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Faces", "faces", "overlap", "room"]

TRIED = 12  # values of λ
# The four lengths whose least is a side of the intersection run from the object's or the box's own end to the object's
# or the box's own end. These are their slopes in the two ends of the box, (low, high).
SLOPES = ((0.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (-1.0, 1.0))


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


class Faces(NamedTuple):
    """The 16 functions F(b + d) ≥ value + slope · d − bend ‖d‖² / 2, of which none may be negative.

    Args:
        value, bend: (…, 16).
        slope: (…, 16, 4), in the order of a box.
        bears: (…, 16), the radius within which each stays ≥ 0; −∞ where it is not.
        stays: (…), the radius within which α and β do.
    """

    value: Tensor
    slope: Tensor
    bend: Tensor
    bears: Tensor
    stays: Tensor


def faces(boxes: Tensor, truth: Tensor, least: Tensor) -> Faces:
    """Of boxes (…, 4) that have to overlap `truth` by `least` (…).

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> given = faces(box, box, torch.tensor(0.5))
    >>> given.value.unique(), given.slope[15]  # 1.5 − 0.5 − 0.5, and what shrinks loses as much at each side
    (tensor([0.5000]), tensor([-1., -1.,  1.,  1.]))
    """
    alphas, betas = _lengths(boxes, truth, 0), _lengths(boxes, truth, 1)  # (…, 4) each
    value, (x, y), matrix = _quadratics(boxes, truth, least, alphas, betas)
    bears = _borne(value, (x, y), matrix)
    x, y = torch.broadcast_tensors(x, y)
    slope = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
    bend = torch.linalg.matrix_norm(matrix).expand_as(value)  # no less than ‖M‖
    each = (part.flatten(-2) for part in (bend, bears))
    return Faces(value.flatten(-2), slope.flatten(-3, -2), *each, _stays(alphas, betas))


def room(boxes: Tensor, truth: Tensor, least: Tensor) -> Tensor:
    """(…): a radius such that every box of the ball surely overlaps `truth` by `least` (…) > 0 or more; −∞ where the
    box itself does not.

    >>> box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> room(box, box, torch.tensor([0.25, 0.5]))  # 1 − √least, nearly: all sides move inwards
    tensor([0.4955, 0.2927])
    """
    given = faces(boxes, truth, least)
    largest = torch.minimum(given.stays, given.bears.amin(-1))
    return torch.where(largest >= 0, largest, -torch.inf)


def _lengths(boxes: Tensor, truth: Tensor, axis: int) -> Tensor:
    """(…, 4): the lengths of an axis, in the order of `SLOPES`."""
    low, high, their_low, their_high = torch.broadcast_tensors(
        boxes[..., axis], boxes[..., axis + 2], truth[..., axis], truth[..., axis + 2]
    )
    return torch.stack([their_high - their_low, their_high - low, high - their_low, high - low], -1)


def _stays(alphas: Tensor, betas: Tensor) -> Tensor:
    """(…): the radius within which α and β stay ≥ 0; so do the box's own sides, which are among them."""
    far = torch.cat([alphas, betas], -1)
    ends = alphas.new_tensor(SLOPES).norm(dim=1).repeat(2)
    return torch.where(ends > 0, far / ends, torch.inf).amin(-1)


def _quadratics(
    boxes: Tensor, truth: Tensor, least: Tensor, alphas: Tensor, betas: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """F (…, 4, 4), its gradient in columns and in rows (…, 4, 4, 2), and M (…, 4, 4, 2, 2) of the 16 functions."""
    t = least[..., None, None]
    a, b = alphas[..., :, None], betas[..., None, :]
    w = (boxes[..., 2] - boxes[..., 0])[..., None, None]
    h = (boxes[..., 3] - boxes[..., 1])[..., None, None]
    slopes = boxes.new_tensor(SLOPES)  # (4, 2)
    of_alpha, of_beta, of_side = slopes[:, None], slopes[None], slopes[-1]

    value = (1 + t) * a * b - t * (w * h + _area(truth)[..., None, None])
    in_columns = ((1 + t) * b)[..., None] * of_alpha - (t * h)[..., None] * of_side
    in_rows = ((1 + t) * a)[..., None] * of_beta - (t * w)[..., None] * of_side
    both = of_alpha[..., :, None] * of_beta[..., None, :]  # (4, 4, 2, 2)
    sides = of_side[:, None] * of_side
    t = t[..., None, None]
    return value, (in_columns, in_rows), (1 + t) * both - t * sides


def _borne(value: Tensor, gradient: tuple[Tensor, Tensor], matrix: Tensor) -> Tensor:
    """(…): the radius within which F stays ≥ 0; −∞ where it is not."""
    x, y = gradient
    size = torch.linalg.matrix_norm(matrix)  # no less than ‖M‖
    scale = (x.square().sum(-1) + y.square().sum(-1)) / value.clamp(min=1e-12)  # λ where M is 0
    tried = torch.linspace(-2.5, 0.3, TRIED, dtype=value.dtype, device=value.device).exp()
    lam = 1.001 * size[..., None] + tried * scale[..., None]  # (…, TRIED)

    # vᵀ(H + λ)⁻¹ v = (‖y‖² + cᵀ N⁻¹ c) / λ with c = λ x − M y and N = λ² − M Mᵀ.
    c = lam[..., None] * x[..., None, :] - (matrix @ y[..., None]).mT
    square = matrix @ matrix.mT
    n0 = lam.square() - square[..., 0, 0, None]
    n1 = lam.square() - square[..., 1, 1, None]
    cross = -square[..., 0, 1, None]
    within = n1 * c[..., 0].square() - 2 * cross * c[..., 0] * c[..., 1] + n0 * c[..., 1].square()
    spent = (y.square().sum(-1, keepdim=True) + within / (n0 * n1 - cross.square())) / lam

    largest = ((2 * value[..., None] - spent) / lam).amax(-1)
    return torch.where((value >= 0) & (largest >= 0), largest.clamp(min=0).sqrt(), -torch.inf)

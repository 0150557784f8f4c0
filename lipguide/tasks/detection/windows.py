"""The windows of a pyramid: where they stand, which digit each expects, and of which it is to speak."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lipguide.tasks.detection.boxes import NOTHING, Targets, check_targets
from lipguide.tasks.detection.pyramid import Canvas

__all__ = [
    "BOXED",
    "CELL",
    "HEIGHT",
    "PATCH",
    "RATIO",
    "RIGHT",
    "RING",
    "WIDTH",
    "WINDOW",
    "Assigned",
    "Moved",
    "assign",
    "expected",
    "places",
]

WINDOW, CELL, PATCH = 32, 8, 4  # pixels of a level that a window sees, pixels of a cell, cells of a window
HEIGHT, WIDTH = 28.0, 13.0  # of the digit that a window expects, in pixels of the level

Moved = Sequence[int] | Tensor  # how many pixels down and right


def places(
    canvas: Canvas, step: int, moved: Moved = (0, 0), device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Centres (P, 2) of the windows of one level, and (P,) its side; see `Detector.places`."""
    down, right = moved
    y = torch.arange(0, canvas.height - WINDOW + 1, step, device=device) + WINDOW / 2 - canvas.above - down
    x = torch.arange(0, canvas.width - WINDOW + 1, step, device=device) + WINDOW / 2 - canvas.before - right
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y], -1).flatten(0, 1) / canvas.side
    return centres, torch.full((len(centres),), float(canvas.side), device=device)


def expected(like: Tensor) -> Tensor:
    """The four sides, from the middle of a window, of the digit that it expects, where and of the type that `like` is.

    >>> expected(torch.zeros(1))
    tensor([ -6.5000, -14.0000,   6.5000,  14.0000])
    """
    return _expected_on(like.device, like.dtype)


@lru_cache
def _expected_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept: who brings numbers to a GPU waits for it."""
    with torch.inference_mode(False):  # else no gradient would go past it
        return torch.tensor([-WIDTH / 2, -HEIGHT / 2, WIDTH / 2, HEIGHT / 2], device=device, dtype=dtype)


class Assigned(NamedTuple):
    """What each window is to say. labels: (N, P), of the nearest object, -1 without one; distance: (N, P), at most 1
    where a window speaks of it; sides: (N, P, 4), that object's, in units of `reach`."""

    labels: Tensor
    distance: Tensor
    sides: Tensor


SHIFT, RATIO = 3.0, 0.265  # pixels off the middle, and octaves off the height, at which a window still speaks
# Times that is where it may not speak any more. Between, it may say the digit or nothing if its box overlaps the digit
# by `RIGHT`: whoever could win is to be right.
RING, RIGHT = 2.0, 0.6
BOXED = 3.6  # times that is where it still learns the digit's box


def assign(targets: Targets, centres: Tensor, sides: Tensor, reach: float) -> Assigned:
    """Which object each window is nearest to, and how far off it is. The nearest one to an object speaks, if it is as
    near as the ring."""
    boxes, labels = check_targets(targets)
    if labels.shape[1] == 0:
        nothing = labels.new_full((len(labels), len(sides)), NOTHING)
        return Assigned(nothing, boxes.new_full(nothing.shape, torch.inf), boxes.new_zeros(*nothing.shape, 4))
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2  # (N, M, 2)
    height = (boxes[..., 3] - boxes[..., 1]).clamp(min=1e-6)
    shift = ((middle[:, None] - centres[:, None]) * sides[:, None, None]).abs().amax(-1)  # (N, P, M)
    octaves = (height[:, None] * sides[:, None] / HEIGHT).log2().abs()
    far = torch.maximum(shift / SHIFT, octaves / RATIO).masked_fill((labels == NOTHING)[:, None], torch.inf)
    nearest = (far == far.amin(1, keepdim=True)) & (far <= RING)
    far = torch.where(nearest, far.clamp(max=1.0), far)
    distance, owner = far.min(2)
    own = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    wanted = (own - centres.repeat(1, 2)) * sides[:, None]
    return Assigned(labels.gather(1, owner), distance, (wanted - expected(wanted)) / reach)

"""The hunt: an attack on every certified picture inside its own radius. One success refutes the certificate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipguide.arguments import whole
from lipguide.checks import check_eval, check_numbers, class_indices, decisions
from lipguide.layers.export import uncached
from lipguide.robustness.attacks.pgd import pgd_l2
from lipguide.robustness.certificates.conditions import in_float64

__all__ = ["Hunt", "hunt"]

INSIDE = 1 - 1e-9  # of the radius: as near as float64 lets an attack come
OUTSIDE = 1.5  # of the radius: an attack that breaks nothing here either has shown nothing


@dataclass(frozen=True)
class Hunt:
    """How many pictures had a radius above zero, and which fell to the attack.

    Args:
        broken: indices of the pictures whose answer changed inside their radius; there must be none.
        outside: how many answers the same attack changes within one and a half times the radius.
    """

    hunted: int
    broken: list[int]
    outside: int


def hunt(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    steps: int = 20,
    restarts: int = 1,
    batch_size: int = 500,
) -> Hunt:
    """Attack every certified picture inside its own radius, in float64.

    That nothing is broken is evidence only if the attack breaks plenty a little further out: see `Hunt.outside`.

    Args:
        radius: (N,), of these labels, as `radius` gives it; pictures whose radius is not above zero are left alone.
        steps, restarts: as for `lip.attacks.pgd_l2`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x, y = torch.tensor([0.6, 0.6, 0.4, 0.4]).reshape(1, 1, 2, 2), torch.tensor([0])
    >>> hunt(model, x, y, torch.tensor([0.19]))  # the exact one is 0.2
    Hunt(hunted=1, broken=[], outside=1)
    >>> hunt(model, x, y, torch.tensor([0.21])).broken
    [0]
    """
    check_eval(model, "its certificates are hunted")
    if not len(x) == len(y) == len(radius) or y.ndim != 1 or radius.ndim != 1:
        raise ValueError(
            f"one label and one radius a picture, not {tuple(y.shape)} and {tuple(radius.shape)} for {len(x)} pictures"
        )
    label, _ = class_indices(y, None)
    check_numbers(radius, "a radius", infinite=False)
    whole("batch_size", batch_size)
    with uncached():  # what is remembered may be of another mode
        exact = in_float64(model)
        broken: list[int] = []
        outside = 0
        for part in (radius > 0).nonzero().squeeze(1).split(batch_size):
            game = (exact, x[part].double(), label[part], radius[part].double())
            broken += part[_fallen(*game, INSIDE, steps, restarts)].tolist()
            outside += int(_fallen(*game, OUTSIDE, steps, restarts).sum())
    return Hunt(int((radius > 0).sum()), broken, outside)


def _fallen(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, share: float, steps: int, restarts: int) -> Tensor:
    """Which labels the attack changes within this share of the radius, measured on the picture that it returns."""
    if not len(x):
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    moved = pgd_l2(model, x, y, share * radius, steps=steps, restarts=restarts)
    length = (moved - x).flatten(1).norm(dim=1)
    with torch.no_grad():
        return (decisions(model(moved)) != y) & (length < share * radius * (1 + 1e-12))

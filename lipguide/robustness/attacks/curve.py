"""What attacks measure: the robust accuracy for a list of strengths, and the distance to the nearest mistake."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipguide.arguments import whole
from lipguide.checks import check_eval
from lipguide.robustness.attacks.objectives import Model, like, misclassified
from lipguide.robustness.attacks.pgd import pgd_l2

__all__ = ["least_norm_l2", "robust_accuracy_curve"]


def least_norm_l2(
    model: Model, x: Tensor, y: Tensor, max_eps: float, halvings: int = 10, **options: Any
) -> tuple[Tensor, Tensor]:
    """The nearest misclassified picture that bisection over `pgd_l2` finds, and its L2 distance in float64.

    The distance is 0 for a sample that is misclassified as it is, and infinite, with x returned, where nothing was
    found up to `max_eps`. It bounds the true distance to the decision boundary from above.

    Args:
        halvings: how often the interval that holds the distance is halved.
        options: of `pgd_l2`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x, y = torch.tensor([0.6, 0.6, 0.4, 0.4]).reshape(1, 1, 2, 2), torch.tensor([0])
    >>> round(least_norm_l2(model, x, y, max_eps=1.0)[1].item(), 2)
    0.2
    """
    whole("halvings", halvings, least=0)
    if not max_eps >= 0:
        raise ValueError(f"max_eps must be 0 or more, not {max_eps}")
    furthest = min(float(max_eps), math.sqrt(x[:1].numel()))  # no picture is further from another
    nearest = x.clone()
    distance = torch.where(misclassified(model, x, y), 0.0, math.inf).double()
    low = torch.zeros_like(distance)
    eps = torch.full_like(distance, furthest)
    for _ in range(halvings + 1):
        moved = pgd_l2(model, x, y, eps, **options)
        length = (moved.double() - x.double()).flatten(1).norm(dim=1)
        found = misclassified(model, moved, y)
        nearer = found & (length < distance)
        nearest = torch.where(like(nearer, x), moved, nearest)
        distance = torch.where(nearer, length, distance)
        low = torch.where(found, low, eps)
        eps = (low + distance.clamp(max=furthest)) / 2
    return nearest, distance


def robust_accuracy_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilons: Sequence[float] | Tensor,
    attack: Callable[..., Tensor] = pgd_l2,
    batch_size: int = 500,
    **options: Any,
) -> Tensor:
    """Share of samples that are classified rightly at every strength up to each of `epsilons`, in their order.

    Strengths are tried from small to large and only on the survivors: what a small one breaks stays broken, so the
    curve cannot rise. A network that answers NaN has no accuracy and is an error.

    Args:
        attack: called as `attack(model, x, y, epsilon, **options)`, any attack of `lip.attacks`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x = torch.tensor([[0.6, 0.6, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]]).reshape(2, 1, 2, 2)
    >>> robust_accuracy_curve(model, x, torch.tensor([0, 0]), [0.0, 0.5, 1.0])
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if len(x) == 0:
        raise ValueError("the robust accuracy of no samples is undefined")
    whole("batch_size", batch_size)
    check_eval(model, "measuring its robustness")
    strengths = torch.as_tensor(epsilons, dtype=torch.float64, device="cpu")
    if strengths.ndim != 1 or not (strengths >= 0).all():
        raise ValueError(f"epsilons must be a list of numbers, 0 or more, not {epsilons}")
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    standing = ~torch.cat([misclassified(model, *batch) for batch in batches])
    curve = torch.zeros_like(strengths)
    for index in strengths.argsort().tolist():
        if strengths[index] > 0:
            survivors = standing.nonzero().squeeze(1)
            if not len(survivors):  # zero from here on; many models refuse an empty batch
                break
            for part in survivors.split(batch_size):
                moved = attack(model, x[part], y[part], strengths[index].item(), **options)
                standing[part] = ~misclassified(model, moved, y[part])
        curve[index] = standing.double().mean()
    return curve

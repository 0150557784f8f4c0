"""The radius of a prediction, and the share of samples whose radius is large enough.

If the logits z are L-Lipschitz in the picture (L2 norms), a perturbation of norm ε changes z_y − z_j by at most √2 L ε;
if z = W h + b on features h that are L-Lipschitz, by at most L ‖w_y − w_j‖ ε. So y stays on top for every ε below

    radius = min_{j ≠ y} (z_y − z_j) / (√2 L)      or      min_{j ≠ y} (z_y − z_j) / (L ‖w_y − w_j‖).

L belongs to the *whole* way from pixels in [0, 1] to the logits (or to the features): a normalisation of the input is a
part of the model, and multiplies L by 1 / min(std). And it belongs to pictures of one size, the `input_shape` that
`lip.lipschitz_bound` was asked for. Logits do not tell the size of their pictures, so nothing here can notice another
one; `checked_logits` does, if it is given the `Bound` itself.

*In which arithmetic it holds.* The certificate is about the network in exact arithmetic, with the weights as they are
stored and the logits as they are given. What is computed here is computed in float64 and rounded down, so nothing is
lost on the way from logits to radius. A forward pass in float32 has rounded its logits, by some 1e-6 of the
activations, at x and at every x' near it. If no gap z_y − z_j that it gives is further than δ from the exact one, a
network that *runs* in float32 keeps its label within the radius less δ / (L ‖w_y − w_j‖) for logits in float64, as
`checked_logits` gives them, and less twice as much for its own. Logits in half precision are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

from lipguide.checks import check_numbers, class_indices, lipschitz_constant

__all__ = ["certified_accuracy", "radius"]

ATTACKERS_FAVOUR = 1e-12  # relative slack granted to the attacker, far above the rounding of float64 sums
SMALLEST = 1e-150  # stands in for the distance of two equal rows, and is above what squares to nothing


def radius(
    logits: Tensor,
    labels: Tensor | None = None,
    lipschitz: float | SupportsFloat = 1.0,
    rows: Tensor | None = None,
) -> Tensor:
    """Certified L2 radius of every sample, (N, C) to (N,), or of every pixel, (N, C, H, W) to (N, H, W).

    It is zero or below where the label is wrong. It holds in exact arithmetic: see above for a network that runs in
    float32.

    Args:
        labels: classes, (N,) or (N, H, W); without them it is the radius in which the prediction stays.
        lipschitz: the constant of the whole network or, with `rows`, of the features below the head.
        rows: the weight of the head, (C, D), (C, D, 1, 1) or (C, D, k, k), one full row a class. All classes must look
            at the same features, each feature once: a dense head, one of 1×1, or one of k×k that pads with zeros.
            Nothing may stand behind it: up-sampling, for one, gives a feature a say in many pixels. `checked_logits`
            refuses heads of several groups, those whose padding repeats pixels, and those that are not the end.

    >>> radius(torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]]), torch.tensor([0, 0]))
    tensor([ 1.2728, -0.7071])
    >>> radius(torch.tensor([[2.0, 0.2]]), rows=torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    tensor([2.0125])
    """
    exact = exact_radius(logits, labels, lipschitz, rows)
    rounded = exact.to(logits.dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


def certified_accuracy(
    logits: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float] | Tensor,
    lipschitz: float | SupportsFloat = 1.0,
    rows: Tensor | None = None,
) -> Tensor:
    """Share of samples that no perturbation of norm `epsilon` can misclassify; one number an `epsilon`.

    Args:
        lipschitz, rows: as for `radius`, which also says in which arithmetic the share holds.

    >>> logits = torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]])
    >>> certified_accuracy(logits, torch.tensor([0, 1]), [0.0, 1.0, 2.0])
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if len(logits) == 0:
        raise ValueError("the certified accuracy of no samples is undefined")
    epsilons = budgets(epsilon, logits.device)
    radii = exact_radius(logits, labels, lipschitz, rows)
    safe = radii > epsilons.reshape(-1, *[1] * radii.ndim)  # (E, N, ...)
    return safe.double().flatten(1).mean(1).reshape(epsilons.shape)


def exact_radius(
    logits: Tensor, labels: Tensor | None, lipschitz: float | SupportsFloat, rows: Tensor | None
) -> Tensor:
    """`radius` in float64, whatever the logits came in.

    >>> exact_radius(torch.tensor([[2.0, 0.2]]), None, 1.0, None).dtype
    torch.float64
    """
    if labels is None:
        labels = logits.argmax(1)
    label = check_logits(logits, labels, rows).unsqueeze(1)  # (N, 1, ...)
    z = logits.detach().double()
    slope = slopes(z.shape[1], lipschitz, rows, z.device)[label.squeeze(1)].movedim(-1, 1)  # (N, C, ...)
    distance = displacement(z.gather(1, label) - z, slope)
    nearest = distance.scatter(1, label, math.inf).amin(1)
    return nearest - ATTACKERS_FAVOUR * nearest.abs()


def slopes(classes: int, lipschitz: float | SupportsFloat, rows: Tensor | None, device: torch.device) -> Tensor:
    """L ‖w_i − w_j‖ for every two classes, rounded up: how fast their gap can change. √2 L if the rows are unknown.

    It is never zero, so that it can divide.

    >>> slopes(2, 3.0, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.device("cpu"))[0, 1].item() >= 3 * 2**0.5
    True
    """
    constant = lipschitz_constant(lipschitz)
    if rows is None:
        distance = torch.full((classes, classes), math.sqrt(2), dtype=torch.float64, device=device)
    else:
        flat = rows.detach().to(device).double().flatten(1)
        distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=SMALLEST)
        distance = distance * (1 + flat.shape[1] * torch.finfo(torch.float64).eps)
    return (constant * distance).clamp(min=SMALLEST)


def displacement(gap: Tensor, slope: Tensor) -> Tensor:
    """How far the input has to move to close a gap that changes with this slope: a finite number, rounded down.

    >>> displacement(torch.tensor([1.0, math.inf]), torch.tensor([2.0, math.inf]))
    tensor([0.5000, 0.0000])
    """
    largest = torch.finfo(gap.dtype).max
    gap = gap.clamp(-largest, largest)  # the gap of two finite logits may be infinite
    return (gap / slope).clamp(-largest, largest)


def budgets(epsilon: float | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """The norms of perturbations in float64, or ValueError.

    >>> budgets([0.0, 0.5], torch.device("cpu"))
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    epsilons = torch.as_tensor(epsilon, dtype=torch.float64, device=device)
    if not (epsilons >= 0).all() or epsilons.isinf().any():
        raise ValueError(f"epsilon must be 0 or more and finite, not {epsilon}")
    return epsilons


def check_precision(values: Tensor, what: str = "logits") -> None:
    """Raise ValueError for logits, or other numbers, in half precision: what they lost in rounding is not small.

    >>> check_precision(torch.zeros(1, 2))
    """
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"certify in float32 or float64: {what} of {values.dtype} are too coarse for a certificate")


def check_logits(logits: Tensor, labels: Tensor, rows: Tensor | None) -> Tensor:
    """The labels in int64, or ValueError for what cannot be certified.

    >>> check_logits(torch.zeros(1, 2), torch.tensor([1], dtype=torch.uint8), None)
    tensor([1])
    """
    check_precision(logits)
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, C, ...) with at least two classes")
    check_numbers(logits, "a logit")
    classes = logits.shape[1]
    entries = logits.shape[:1] + logits.shape[2:]
    if labels.shape != entries:
        raise ValueError(f"labels {tuple(labels.shape)} must be class indices of shape {tuple(entries)}")
    label, _ = class_indices(labels, None)
    if ((label < 0) | (label >= classes)).any():
        raise ValueError(f"a label lies outside 0..{classes - 1}, the {classes} classes of the logits")
    if rows is not None and (rows.ndim < 2 or len(rows) != classes or not rows.isfinite().all()):
        raise ValueError(f"rows {tuple(rows.shape)} must be the finite weights of {classes} outputs, one row a class")
    return label

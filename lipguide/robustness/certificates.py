"""Certificates: how far a picture may move before its label can change, from one forward pass.

If the logits z are L-Lipschitz in the picture (L2 norms), a perturbation of norm ε changes z_y - z_j by at
most √2 L ε; if z = W h + b on features h that are L-Lipschitz, by at most L ‖w_y - w_j‖ ε. So y stays on top
for every ε below

    radius = min_{j ≠ y} (z_y - z_j) / (√2 L)      or      min_{j ≠ y} (z_y - z_j) / (L ‖w_y - w_j‖).

L belongs to the *whole* way from pixels in [0, 1] to the logits (or to the features): a normalisation of the
input is a part of the model, and multiplies L by 1 / min(std). ``checked_logits`` runs a model under these
conditions, in float64, and looks for a gradient that refutes L. Arithmetic here is in float64 too and rounds down, so
no certificate owes its size to rounding; what a network in float32 has rounded before it hands over its logits, some
1e-6 of its activations, is not made good.

For segmentation the certificates of all pixels hold at once, and more: a perturbation that flips the pixels
in B has to spend Σ_{p ∈ B} radius_p² ≤ ε² (see ``_shared_budget``). ``certified_miou`` is the worst that this
allows.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.checks import check_eval
from lipguide.robustness.scores import labelled

ATTACKERS_FAVOUR = 1e-12  # relative slack granted to the attacker, far above the rounding of float64 sums


def radius(logits: Tensor, labels: Tensor | None = None, lipschitz: float = 1.0, rows: Tensor | None = None) -> Tensor:
    """Certified L2 radius of every sample, (N, C) to (N,), or of every pixel, (N, C, H, W) to (N, H, W).

    It is zero or below where the label is wrong. Without ``labels`` it is the radius in which the prediction
    stays. ``rows`` are the weights ``(C, D)`` of a linear or 1x1 head, or ``(C, D, k, k)`` of a convolution;
    ``lipschitz`` is then the constant of the features below the head, otherwise that of the whole network.

    >>> radius(torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]]), torch.tensor([0, 0]))
    tensor([ 1.2728, -0.7071])
    >>> radius(torch.tensor([[2.0, 0.2]]), rows=torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    tensor([2.0125])
    """
    exact = _radius(logits, labels, lipschitz, rows)
    rounded = exact.to(logits.dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


def certified_accuracy(
    logits: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float] | Tensor,
    lipschitz: float = 1.0,
    rows: Tensor | None = None,
) -> Tensor:
    """Share of samples that no perturbation of norm ``epsilon`` can misclassify; one number an ``epsilon``.

    >>> logits = torch.tensor([[2.0, 0.2, -0.5], [0.0, 1.0, -0.5]])
    >>> certified_accuracy(logits, torch.tensor([0, 1]), [0.0, 1.0, 2.0])
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if len(logits) == 0:
        raise ValueError("the certified accuracy of no samples is undefined")
    budgets = _budgets(epsilon, logits.device)
    safe = _radius(logits, labels, lipschitz, rows) > budgets.reshape(-1, *[1] * labels.ndim)
    return safe.double().flatten(1).mean(1).reshape(budgets.shape)


def certified_pixel_accuracy(
    logits: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float] | Tensor,
    lipschitz: float = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    bound: str = "both",
) -> Tensor:
    """Share of each picture's pixels that stay right under any perturbation of norm ``epsilon``: (N,), or (E,
    N).

    ``bound`` "independent" counts the pixels of radius above epsilon; "shared" lets the attacker buy the
    cheapest pixels from one budget; "both" lets it buy only those that it could reach alone, which is the
    better bound for a head with a kernel larger than 1×1 and the same as "shared" for any other.
    ``lipschitz`` is the constant of the whole map of logits (of features, with ``rows``), all pixels
    together. The mean over equally large pictures bounds the accuracy of the data set, for each picture is
    attacked with its own epsilon.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> labels = torch.zeros(1, 2, 2, dtype=torch.long)
    >>> certified_pixel_accuracy(logits, labels, [0.0, 2.2, 3.1])
    tensor([[0.7500],
            [0.5000],
            [0.2500]], dtype=torch.float64)
    >>> certified_pixel_accuracy(logits, labels, 2.2, bound="independent")
    tensor([0.], dtype=torch.float64)
    """
    if bound not in ("independent", "shared", "both"):
        raise ValueError(f'bound must be "independent", "shared" or "both", not {bound!r}')
    labels, valid = labelled(labels, ignore_index)
    pixels = _radius(logits, labels, lipschitz, rows).flatten(1)
    right = (valid.flatten(1)) & (pixels > 0)
    budgets = _budgets(epsilon, logits.device)
    safe = []
    for budget in budgets.reshape(-1):
        within_reach = right & (pixels <= budget) if bound != "shared" else right
        cost = torch.where(within_reach, pixels.square(), math.inf).sort(1).values
        limit = math.inf if bound == "independent" else _shared_budget(budget, rows)
        broken = (cost.isfinite() & (cost.cumsum(1) <= limit)).sum(1)
        safe.append((right.sum(1) - broken) / valid.flatten(1).sum(1).double())
    return torch.stack(safe).reshape(*budgets.shape, len(logits))


@dataclass(frozen=True)
class ClassAttacks:
    """What one budget buys an attacker against each class of one picture, as far as its IoU goes.

    The intersection over union of class c is TP / (G + FP) for G pixels labelled c. The attacker breaks a of
    the TP true positives, and adds at most ``added[c, a]`` false positives with what is left of its budget;
    -1 stands where breaking a true positives is out of reach.
    """

    correct: Tensor  # (C,) TP
    union: Tensor  # (C,) G + FP
    labelled: Tensor  # (C,) G
    added: Tensor  # (C, A)


def class_attacks(
    logits: Tensor,
    labels: Tensor,
    epsilon: float,
    lipschitz: float = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = -100,
) -> list[ClassAttacks]:
    """For every picture, all that a perturbation of norm ``epsilon`` could do to each class.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> class_attacks(logits, torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2), epsilon=1.0)[0].added
    tensor([[ 1, -1],
            [ 0,  0]])
    """
    labels, valid = labelled(labels, ignore_index)
    _check(logits, labels, lipschitz, rows)
    distance = lipschitz * _row_distances(logits.shape[1], rows, logits.device)
    reach = _budgets(epsilon, logits.device) * (1 + ATTACKERS_FAVOUR)
    pictures = zip(logits.detach().flatten(2), labels.flatten(1), valid.flatten(1), strict=True)
    return [_attack_picture(z.double(), y, v, distance, reach, _shared_budget(reach, rows)) for z, y, v in pictures]


def certified_miou(
    logits: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float] | Tensor,
    lipschitz: float = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Lower bound, for each picture, of its mIoU under any perturbation of norm ``epsilon``: (N,), or (E, N).

    The mIoU is taken over the classes that the picture's *labels* hold, a set that no attack can change. Each
    class is attacked with the whole budget, and the minima are averaged: a sound bound, as no one attack does
    better than that against all of them. For the IoU of a data set take ``certified_pooled_miou``.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> labels = torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2)
    >>> certified_miou(logits, labels, [0.0, 1.0])
    tensor([[1.0000],
            [0.3750]], dtype=torch.float64)
    """
    budgets = _budgets(epsilon, logits.device)
    rest = (lipschitz, rows, ignore_index)
    bounds = [
        torch.stack([_picture_miou(a) for a in class_attacks(logits, labels, budget, *rest)])
        for budget in budgets.reshape(-1).tolist()
    ]
    return torch.stack(bounds).reshape(*budgets.shape, len(logits))


def certified_pooled_miou(attacks: Iterable[ClassAttacks]) -> Tensor:
    """Lower bound of a data set's mIoU, Σ TP / Σ (G + FP) a class, when every picture is attacked: a scalar.

    ``attacks`` are those of all pictures, gathered from ``class_attacks`` batch by batch. Every picture's
    worst case depends on the pooled ratio itself: against a low ratio, breaking true positives counts for
    more than adding false ones. Pooling each picture's own minimiser is therefore *not* a bound. Dinkelbach's
    iteration finds the minimum.

    >>> logits = torch.tensor([[3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    >>> labels = torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2)
    >>> certified_pooled_miou(class_attacks(logits, labels, 1.0) + class_attacks(logits, labels, 0.0))
    tensor(0.6786, dtype=torch.float64)
    """
    attacks = list(attacks)
    if not attacks:
        raise ValueError("the mIoU of no pictures is undefined")
    present = sum(a.labelled for a in attacks) > 0
    iou = sum(a.correct for a in attacks) / sum(a.union for a in attacks).clamp(min=1).double()
    while True:  # each round lowers a ratio of whole numbers, so the rounds come to an end
        correct, union = torch.zeros_like(iou), torch.zeros_like(iou)
        for picture in attacks:
            broken = torch.arange(picture.added.shape[1], device=iou.device)
            harm = broken + iou[:, None] * picture.added
            chosen = torch.where(picture.added >= 0, harm, -1.0).argmax(1, keepdim=True)
            correct += picture.correct - chosen.squeeze(1)
            union += picture.union + picture.added.gather(1, chosen).squeeze(1)
        lower = correct / union.clamp(min=1)
        if (lower >= iou)[present].all():
            return iou[present].mean()
        iou = torch.minimum(iou, lower)


def checked_logits(
    model: nn.Module,
    images: Tensor,
    lipschitz: float = 1.0,
    rows: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """The logits of ``model`` in float64, ready to be certified, or an error that says why they could not be.

    Checked are the conditions of a certificate: pixels in [0, 1] (so that ``lipschitz`` has to include the
    normalisation), evaluation mode (no dropout), full precision (the model's own logits agree with those in
    float64: no half-precision parameters, no autocast, no TF32), and, on the first 32 pictures, that no
    gradient exceeds what ``lipschitz`` allows. The last can refute a constant, never prove it:
    ``lipguide.bounds.network.lipschitz_bound`` does.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    >>> _ = nn.init.orthogonal_(model[1].weight), nn.init.orthogonal_(model[2].weight)
    >>> checked_logits(model, torch.rand(5, 1, 2, 2)).dtype
    torch.float64
    """
    _check_images(images)
    check_eval(model, "certifying it")
    twin = copy.deepcopy(model).double()
    batches = images.split(batch_size)
    with torch.no_grad():
        logits = torch.cat([twin(batch.double()) for batch in batches])
        own = model(images[:32])
    error = (own.double() - logits[:32]).abs().max().item()
    if own.dtype in (torch.float16, torch.bfloat16) or error > 1e-5 * (1 + logits[:32].abs().max().item()):
        raise ValueError(
            f"the model's own logits ({own.dtype}) are up to {error:.2g} from those in float64: it runs in reduced "
            "precision (half-precision parameters, autocast or TF32), which no certificate covers"
        )
    _try_to_refute(twin, images[:32].double(), lipschitz, rows)
    return logits


def _picture_miou(attacks: ClassAttacks) -> Tensor:
    broken = torch.arange(attacks.added.shape[1], device=attacks.added.device)
    iou = (attacks.correct[:, None] - broken).double() / (attacks.union[:, None] + attacks.added)
    worst = torch.where(attacks.added >= 0, iou, math.inf).amin(1)
    return worst[attacks.labelled > 0].mean()


def _attack_picture(
    z: Tensor, labels: Tensor, valid: Tensor, distance: Tensor, reach: Tensor, budget: Tensor
) -> ClassAttacks:
    """``z`` is (C, P). To break a true positive, one class must catch up with it; to add a false positive of
    class c, c must overtake every class. Both costs are displacements, in units of the input.
    """
    every_class = torch.arange(len(z), device=z.device)[:, None]
    predicted = z.argmax(0)
    labelled, claimed = valid & (labels == every_class), valid & (predicted == every_class)
    quiet = valid & ~labelled & ~claimed
    top = z.gather(0, predicted[None])
    to_break = ((top - z) / distance[predicted].T).scatter(0, predicted[None], math.inf).amin(0)
    to_add = torch.stack([((z - z[c]) / distance[c][:, None]).amax(0) for c in range(len(z))])

    def total_cost(pixels: Tensor, cost: Tensor) -> Tensor:
        """Entry n: what the n + 1 cheapest of these pixels cost together."""
        affordable = pixels & (cost <= reach)
        return torch.where(affordable, cost.square(), math.inf).sort(1).values.cumsum(1)

    breaking = F.pad(total_cost(labelled & claimed, to_break), (1, 0))
    breaking = breaking[:, : int((breaking <= budget).sum(1).max())]
    left = budget - breaking
    added = torch.searchsorted(total_cost(quiet, to_add), left.contiguous(), right=True)
    return ClassAttacks(
        correct=(labelled & claimed).sum(1),
        union=(labelled | claimed).sum(1),
        labelled=labelled.sum(1),
        added=torch.where(left >= 0, added, -1),
    )


def _try_to_refute(model: nn.Module, images: Tensor, lipschitz: float, rows: Tensor | None) -> None:
    """Hold the gradient of the gap between two classes against its bound, where the gap is smallest."""
    images = images.clone().requires_grad_()
    logits = model(images)
    distance = _row_distances(logits.shape[1], rows, logits.device)
    best, index = logits.reshape(*logits.shape[:2], -1).topk(2, dim=1)
    gap = best[:, 0] - best[:, 1]
    pixel = gap.argmin(1, keepdim=True)
    (gradient,) = torch.autograd.grad(gap.gather(1, pixel).sum(), images)
    slope = gradient.flatten(1).norm(dim=1)
    allowed = lipschitz * distance[index[:, 0].gather(1, pixel), index[:, 1].gather(1, pixel)].squeeze(1)
    worst = int((slope - allowed).argmax())
    if slope[worst] > allowed[worst] * (1 + 1e-6):
        raise ValueError(
            f"lipschitz = {lipschitz} is refuted by picture {worst}: the gap between its two best classes grows by "
            f"{slope[worst]:.4g} per unit of the input, and {allowed[worst]:.4g} was allowed. A normalisation of the "
            "input inside the model multiplies the constant by 1 / min(std)"
        )


def _radius(logits: Tensor, labels: Tensor | None, lipschitz: float, rows: Tensor | None) -> Tensor:
    if labels is None:
        labels = logits.argmax(1)
    _check(logits, labels, lipschitz, rows)
    z, label = logits.detach().double(), labels.long().unsqueeze(1)
    distance = _row_distances(z.shape[1], rows, z.device)[labels.long()].movedim(-1, 1)
    gap = z.gather(1, label) - z
    nearest = (gap / (lipschitz * distance)).scatter(1, label, math.inf).amin(1)
    return nearest - ATTACKERS_FAVOUR * nearest.abs()


def _row_distances(classes: int, rows: Tensor | None, device: torch.device) -> Tensor:
    """‖w_i - w_j‖ for every two classes, √2 if the rows are unknown; never zero, so that it can divide."""
    if rows is None:
        return torch.full((classes, classes), math.sqrt(2), dtype=torch.float64, device=device)
    flat = rows.detach().to(device).double().flatten(1)
    pairs = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return pairs.clamp(min=1e-150)


def _shared_budget(epsilon: Tensor, rows: Tensor | None) -> Tensor:
    """What Σ radius² over the flipped pixels cannot exceed.

    To flip pixel p, its logits (or features) have to move by L radius_p, and the squares of these moves add
    up, over the map, to (L ε)² at most. Under a k x k head it is a patch of features that moves, and a
    feature is in k² patches.
    """
    taps = 1 if rows is None else rows.shape[2:].numel()
    return taps * epsilon.square() * (1 + ATTACKERS_FAVOUR)


def _budgets(epsilon: float | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    budgets = torch.as_tensor(epsilon, dtype=torch.float64, device=device)
    if not (budgets >= 0).all() or budgets.isinf().any():
        raise ValueError(f"epsilon must be 0 or more and finite, not {epsilon}")
    return budgets


def _check_images(images: Tensor) -> None:
    if len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"images must be a batch of floating-point pixels, not {tuple(images.shape)} {images.dtype}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"pixels must lie in [0, 1], and these lie in [{low:.4g}, {high:.4g}]: give the pictures as they are, make "
            "the normalisation the first layer of the model, and its 1 / min(std) a factor of lipschitz"
        )


def _check(logits: Tensor, labels: Tensor, lipschitz: float, rows: Tensor | None) -> None:
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"certify in float32 or float64: logits of {logits.dtype} are too coarse for a certificate")
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, C, ...) with at least two classes")
    finite = logits.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"sample {int((~finite).nonzero()[0])} has a logit that is NaN or infinite")
    classes, entries = logits.shape[1], logits.shape[:1] + logits.shape[2:]
    if labels.shape != entries or labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)} ({labels.dtype}) must be class indices of shape {tuple(entries)}"
        )
    if ((labels < 0) | (labels >= classes)).any():
        raise ValueError(f"a label lies outside 0..{classes - 1}, the {classes} classes of the logits")
    if not 0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must be positive and finite, not {lipschitz}")
    if rows is not None and (rows.ndim < 2 or len(rows) != classes or not rows.isfinite().all()):
        raise ValueError(f"rows {tuple(rows.shape)} must be the finite weights of {classes} outputs, one row a class")

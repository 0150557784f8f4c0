"""Attacks in plain PyTorch: projected gradient ascent in the L2 and the L-infinity ball, and everyday corruptions.

Each takes ``(model, x, y, strength)`` with pixels in [0, 1] and returns pictures of the same shape, still in [0, 1]: of
all points that it visits, the clean picture included, the one that hurts each sample most, so an early success is never
lost. The model is attacked as it stands (call ``eval()`` first) and its parameters' gradients are left alone.
Randomness comes from ``generator``, by default one with seed 0: the same call gives the same pictures.

An attack finds an upper bound of the robust accuracy, a certificate a lower one. A weak attack looks just like a robust
model, so an objective with vanishing gradients is announced by a warning.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.checks import check_eval

Model = Callable[[Tensor], Any]
Objective = Callable[[Any, Any], Tensor]
SPREAD = 10.0  # between the largest and the smallest logit, once rescaled


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class is above the right one: positive once the sample is misclassified.

    >>> margin(torch.tensor([[2.0, 0.5], [0.0, 1.0]]), torch.tensor([0, 0]))
    tensor([-1.5000,  1.0000])
    """
    right = logits.gather(1, y.unsqueeze(1))
    return (logits.scatter(1, y.unsqueeze(1), -math.inf).amax(1, keepdim=True) - right).squeeze(1)


def rescaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the logits scaled, sample by sample, to a spread of 10: the default objective.

    Plain cross-entropy attacks badly at either end of the scale. Logits in the hundreds saturate the softmax and the
    gradient is exactly 0; the small logits of a 1-Lipschitz network leave it nearly uniform and the gradient pulls at
    all classes at once. The scale itself carries no gradient.

    >>> small, large = torch.tensor([[0.02, 0.01]]), torch.tensor([[2000.0, 1000.0]])
    >>> rescaled_cross_entropy(small, torch.tensor([0])) == rescaled_cross_entropy(large, torch.tensor([0]))
    tensor([True])
    """
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
    tiny = torch.finfo(logits.dtype).tiny
    return F.cross_entropy(SPREAD * logits / spread.clamp(min=tiny), y, reduction="none")


def pgd_l2(
    model: Model,
    x: Tensor,
    y: Any,
    eps: float | Tensor,
    steps: int = 40,
    restarts: int = 1,
    loss: Objective | None = None,
    score: Objective | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent of ``loss`` within L2 distance ``eps`` (a number, or one a sample).

    Every step follows the normalised gradient, and falls from 2 ``eps`` to 0 along a cosine. The first run starts at x,
    each of the ``restarts`` - 1 further ones at a random point, and takes on only the samples not yet misclassified.
    Unless a loss is given, the first run ascends ``rescaled_cross_entropy`` and each further one raises a single wrong
    class, the best first: with as many restarts as classes, every class is aimed at.

    ``loss(model(x), y)`` gives one number a sample (or one a pixel, which are averaged). ``score`` decides which of the
    visited points to keep: for class labels it is ``margin`` (a score of theirs must be positive once it succeeds), for
    other tasks the loss, unless given.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x, y = torch.tensor([0.6, 0.6, 0.4, 0.4]).reshape(1, 1, 2, 2), torch.tensor([0])
    >>> [(model(pgd_l2(model, x, y, eps)).argmax(1) != y).item() for eps in (0.19, 0.21)]  # exact: 0.2
    [False, True]
    """
    return _pgd(_L2, model, x, y, eps, steps, restarts, loss, score, generator)


def pgd_linf(
    model: Model,
    x: Tensor,
    y: Any,
    eps: float | Tensor,
    steps: int = 40,
    restarts: int = 1,
    loss: Objective | None = None,
    score: Objective | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """As ``pgd_l2``, but no pixel may change by more than ``eps``, and a step follows the gradient's sign.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])
    >>> bool((pgd_linf(model, x, y, 0.1) - x).abs().max() <= 0.1 + 1e-6)
    True
    """
    return _pgd(_LInf, model, x, y, eps, steps, restarts, loss, score, generator)


def least_norm_l2(
    model: Model, x: Tensor, y: Tensor, max_eps: float, halvings: int = 10, **options: Any
) -> tuple[Tensor, Tensor]:
    """The nearest misclassified picture that bisection over ``pgd_l2`` finds, and its L2 distance.

    The distance is 0 for a sample that is misclassified as it is, and infinite, with x returned, where nothing was
    found up to ``max_eps``. It bounds the true distance to the decision boundary from above.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x, y = torch.tensor([0.6, 0.6, 0.4, 0.4]).reshape(1, 1, 2, 2), torch.tensor([0])
    >>> round(least_norm_l2(model, x, y, max_eps=1.0)[1].item(), 2)
    0.2
    """
    nearest, low = x.clone(), torch.zeros(len(x), device=x.device)
    distance = torch.where(_misclassified(model, x, y), 0.0, math.inf)
    eps = torch.full_like(low, max_eps)
    for _ in range(halvings + 1):
        moved = pgd_l2(model, x, y, eps, **options)
        length = (moved - x).flatten(1).norm(dim=1)
        found = _misclassified(model, moved, y)
        nearer = found & (length < distance)
        nearest, distance = torch.where(_like(nearer, x), moved, nearest), torch.where(nearer, length, distance)
        low = torch.where(found, low, eps)
        eps = (low + distance.clamp(max=max_eps)) / 2
    return nearest, distance


def noise(
    model: Model,
    x: Tensor,
    y: Any,
    severity: float,
    draws: int = 10,
    score: Objective = margin,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst of ``draws`` pictures with Gaussian noise; ``severity`` is its standard deviation a pixel.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> noise(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=0.1).shape
    torch.Size([3, 1, 2, 2])
    """
    generator = generator or _default_generator(x)
    candidates = (x + severity * _normal(x, generator) for _ in range(draws))
    return _worst_of(model, x, y, candidates, score, severity)


def brightness(model: Model, x: Tensor, y: Any, severity: float, score: Objective = margin) -> Tensor:
    """The worst of eight shifts of all pixels by the same amount, up to ``severity`` lighter or darker.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> brightness(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=0.3).shape
    torch.Size([3, 1, 2, 2])
    """
    return _worst_of(
        model, x, y, (x + sign * level for level in _levels(severity) for sign in (-1, 1)), score, severity
    )


def contrast(model: Model, x: Tensor, y: Any, severity: float, score: Objective = margin) -> Tensor:
    """The worst of eight stretches about the picture's mean, by a factor from 1 - ``severity`` to 1 + ``severity``.

    At severity 1 the darkest candidate is flat grey.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> contrast(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=0.5).shape
    torch.Size([3, 1, 2, 2])
    """
    _check(x, severity)
    if severity > 1:
        raise ValueError(f"contrast of severity {severity} would turn pictures into negatives: take at most 1")
    mean = x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    stretched = (mean + (1 + sign * level) * (x - mean) for level in _levels(severity) for sign in (-1, 1))
    return _worst_of(model, x, y, stretched, score, severity)


def blur(model: Model, x: Tensor, y: Any, severity: float, score: Objective = margin) -> Tensor:
    """The worst of four Gaussian blurs; ``severity`` is the largest standard deviation, in pixels.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> blur(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=1.0).shape
    torch.Size([3, 1, 2, 2])
    """
    return _worst_of(model, x, y, (_gaussian_blur(x, level) for level in _levels(severity)), score, severity)


class BlindAttack(UserWarning):
    """An attack met no gradient but zero at ``blind`` of its samples.

    >>> print(BlindAttack(blind=2, samples=9))
    the gradient of the loss was zero at every step for 2 of 9 samples, and random directions were taken instead: that \
they stand says nothing about their robustness
    """

    def __init__(self, blind: int, samples: int) -> None:
        super().__init__(
            f"the gradient of the loss was zero at every step for {blind} of {samples} samples, and random directions "
            "were taken instead: that they stand says nothing about their robustness"
        )
        self.blind = blind


def robust_accuracy_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilons: Sequence[float] | Tensor,
    attack: Callable[..., Tensor] = pgd_l2,
    batch_size: int = 500,
    **options: Any,
) -> Tensor:
    """Share of samples that are classified rightly at every strength up to each of ``epsilons``, in their order.

    ``attack(model, x, y, epsilon, **options)`` is any attack of this module. Strengths are tried from small to large
    and only on the survivors: what a small one breaks stays broken, so the curve cannot rise.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x = torch.tensor([[0.6, 0.6, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]]).reshape(2, 1, 2, 2)
    >>> robust_accuracy_curve(model, x, torch.tensor([0, 0]), [0.0, 0.5, 1.0])
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if len(x) == 0:
        raise ValueError("the robust accuracy of no samples is undefined")
    check_eval(model, "measuring its robustness")
    strengths = torch.as_tensor(epsilons, dtype=torch.float64).cpu()
    if strengths.ndim != 1 or not (strengths >= 0).all():
        raise ValueError(f"epsilons must be a list of numbers, 0 or more, not {epsilons}")
    standing = ~torch.cat([_misclassified(model, *part) for part in _parts(x, y, batch_size)])
    curve = torch.zeros_like(strengths)
    for index in strengths.argsort().tolist():
        if strengths[index] > 0:
            survivors = standing.nonzero().squeeze(1)
            if not len(survivors):  # zero from here on; many models refuse an empty batch
                break
            for part in survivors.split(batch_size):
                moved = attack(model, x[part], y[part], strengths[index].item(), **options)
                standing[part] = ~_misclassified(model, moved, y[part])
        curve[index] = standing.double().mean()
    return curve


class _L2:
    @staticmethod
    def direction(gradient: Tensor) -> Tensor:
        return gradient / _norm(gradient)

    @staticmethod
    def project(delta: Tensor, eps: Tensor) -> Tensor:
        return delta * (eps / _norm(delta).clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1)


class _LInf:
    @staticmethod
    def direction(gradient: Tensor) -> Tensor:
        return gradient.sign()

    @staticmethod
    def project(delta: Tensor, eps: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(delta, -eps), eps)


def _pgd(
    ball: type[_L2] | type[_LInf],
    model: Model,
    x: Tensor,
    y: Any,
    eps: float | Tensor,
    steps: int,
    restarts: int,
    loss: Objective | None,
    score: Objective | None,
    generator: torch.Generator | None,
) -> Tensor:
    _check(x, eps)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    generator = generator or _default_generator(x)
    classification = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
    score = score or (margin if classification else loss or rescaled_cross_entropy)
    # Inside cached(), parametrized weights are computed once for all steps.
    with torch.inference_mode(False), torch.enable_grad(), parametrize.cached():
        x = x.detach().clone()
        eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
        worst, best, blind = x.clone(), x.new_full((len(x),), -math.inf), x.new_zeros(len(x), dtype=torch.bool)
        for restart in range(restarts):
            todo = (best <= 0).nonzero().squeeze(1) if classification else torch.arange(len(x), device=x.device)
            if len(todo) == 0:
                break
            radius = _like(eps[todo], x)
            start = torch.zeros_like(x[todo]) if restart == 0 else ball.project(_normal(x[todo], generator), radius)
            target = y[todo] if classification else y
            objective = loss or rescaled_cross_entropy
            if restart > 0 and loss is None and classification:
                objective = _raise_one_class(model(x[todo]), target, restart - 1)
            moved, value, unseen = _ascend(
                ball, model, x[todo], target, radius, start, steps, objective, score, generator
            )
            better = value > best[todo]
            worst[todo] = torch.where(_like(better, x), moved, worst[todo])
            best[todo] = torch.maximum(value, best[todo])
            blind[todo] = unseen & (best[todo] <= 0) if classification else unseen
    if blind.any():
        warnings.warn(BlindAttack(int(blind.sum()), len(x)), stacklevel=3)
    return worst


def _ascend(
    ball: type[_L2] | type[_LInf],
    model: Model,
    x: Tensor,
    y: Any,
    eps: Tensor,
    delta: Tensor,
    steps: int,
    loss: Objective,
    score: Objective,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run from x + delta: the worst pictures met, their scores, and which samples never had a gradient."""
    worst, best = x, x.new_full((len(x),), -math.inf)
    blind, finite = torch.ones_like(best, dtype=torch.bool), torch.ones_like(best, dtype=torch.bool)
    for step in range(steps + 1):
        moved = (x + delta).clamp(0, 1).requires_grad_()
        output = model(moved)
        scored = _per_sample(score(output, y), x)
        value = scored.detach()
        better = value > best
        worst, best = torch.where(_like(better, x), moved.detach(), worst), torch.maximum(value, best)
        finite &= ~value.isnan()
        if step < steps:
            climbed = scored if loss is score else _per_sample(loss(output, y), x)
            (gradient,) = torch.autograd.grad(climbed.sum(), moved)
            largest = _like(gradient.abs().flatten(1).amax(1), x)
            dead = ~((largest > 0) & largest.isfinite())
            blind &= dead.flatten()
            gradient = torch.where(dead, _normal(x, generator), gradient / largest)
            size = eps * (1 + math.cos(math.pi * step / steps))
            delta = ball.project(moved.detach() - x + size * ball.direction(gradient), eps)
    if not finite.all():
        raise ValueError(f"the model's output was NaN for {int((~finite).sum())} of {len(x)} samples under attack")
    return worst, best, blind


def _raise_one_class(logits: Tensor, y: Tensor, turn: int) -> Objective:
    """The objective z_k - z_y, k being the wrong classes in turn, from the best at x to the worst and round again."""
    wrong = logits.detach().scatter(1, y.unsqueeze(1), -math.inf).argsort(1, descending=True)
    aim = wrong[:, turn % (logits.shape[1] - 1), None]

    def difference(z: Tensor, y: Tensor) -> Tensor:
        return (z.gather(1, aim) - z.gather(1, y.unsqueeze(1))).squeeze(1)

    return difference


def _worst_of(
    model: Model, x: Tensor, y: Any, candidates: Iterable[Tensor], score: Objective, severity: float
) -> Tensor:
    _check(x, severity)
    with torch.no_grad(), parametrize.cached():
        worst, best = x, _per_sample(score(model(x), y), x)
        for candidate in candidates:
            candidate = candidate.clamp(0, 1)
            value = _per_sample(score(model(candidate), y), x)
            worst, best = torch.where(_like(value > best, x), candidate, worst), torch.maximum(value, best)
    return worst


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    if values.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"the objective has shape {tuple(values.shape)} for {len(x)} samples: it must give one number a sample; "
            'a torch loss does with reduction="none"'
        )
    return (values if values.ndim == 1 else values.flatten(1).mean(1)).to(x.dtype)


def _misclassified(model: Model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return x
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-offsets.square() / (2 * sigma**2), 0)
    channels = x.shape[1]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        weight = kernel.reshape(shape).expand(channels, -1, -1, -1)
        padding = (0, 0, reach, reach) if shape[2] == -1 else (reach, reach, 0, 0)
        x = F.conv2d(F.pad(x, padding, mode="replicate"), weight, groups=channels)
    return x


def _levels(severity: float) -> list[float]:
    return [severity * part / 4 for part in (1, 2, 3, 4)]


def _parts(x: Tensor, y: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


def _norm(delta: Tensor) -> Tensor:
    return _like(delta.flatten(1).norm(dim=1), delta)


def _like(per_sample: Tensor, x: Tensor) -> Tensor:
    """(N,) to (N, 1, 1, 1), so that it broadcasts over pixels."""
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _default_generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(0)


def _check(x: Tensor, strength: float | Tensor) -> None:
    if not x.is_floating_point() or (x.numel() and not (x.min() >= 0 and x.max() <= 1)):
        raise ValueError(
            "attacks move pixels within [0, 1], and x holds other values: give the pictures as they are and make a "
            "normalisation the first layer of the model"
        )
    if not (torch.as_tensor(strength) >= 0).all():
        raise ValueError(f"the strength of an attack must be 0 or more, not {strength}")

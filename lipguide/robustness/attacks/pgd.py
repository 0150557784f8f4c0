"""Projected gradient ascent in the L2 and the L-infinity ball.

Directions, projections and lengths are computed in float64, whatever the model computes in, and a picture is rounded
towards x. So what the model receives lies in the ball, in half precision too.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lipguide.arguments import whole
from lipguide.layers.export import remembered
from lipguide.robustness.attacks.objectives import (
    Model,
    Objective,
    check_pictures,
    default_generator,
    like,
    margin,
    normal,
    per_sample,
    raise_one_class,
    raise_undefined,
    rescaled_cross_entropy,
    undefined,
)

__all__ = ["BlindAttack", "pgd_l2", "pgd_linf"]

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of so many bytes
WITHIN = 1 - 1e-12  # of the radius is used: the rest is room for the rounding of float64
PAUSE = 5  # steps between two looks at which samples are done, for each of which a GPU waits


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
    enough: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent of `loss` within L2 distance `eps`.

    Every step follows the normalised gradient, and falls from 2 `eps` to 0 along a cosine. The first run starts at x,
    each of the `restarts` − 1 further ones at a random point, and takes on only the samples not yet misclassified.
    Unless a loss is given, the first run ascends `rescaled_cross_entropy` and each further one raises a single wrong
    class, the best first: with as many restarts as classes, every class is aimed at.

    Args:
        eps: a number, or one a sample. An `eps` beyond the size of the box is as good as that size.
        loss: `loss(model(x), y)` gives one number a sample (or one a pixel, which are averaged).
        score: decides which of the visited points to keep: for class labels it is `margin` (a score of theirs must be
            positive once it succeeds), for other tasks the loss, unless given.
        enough: (N,), the largest score that there is, for a task that is no classification and has one. A sample that
            has reached it leaves the batch: nothing is left to gain. `y` must then be a tensor, or have a method
            `part(indices)`.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    >>> x, y = torch.tensor([0.6, 0.6, 0.4, 0.4]).reshape(1, 1, 2, 2), torch.tensor([0])
    >>> [(model(pgd_l2(model, x, y, eps)).argmax(1) != y).item() for eps in (0.19, 0.21)]  # exact: 0.2
    [False, True]
    """
    return _pgd(_Search(_L2, model, steps, restarts, loss, score, generator or default_generator(x)), x, y, eps, enough)


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
    """As `pgd_l2`, but no pixel may change by more than `eps`, and a step follows the gradient's sign.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])
    >>> bool((pgd_linf(model, x, y, 0.1) - x).abs().max() <= 0.1)
    True
    """
    return _pgd(_Search(_LInf, model, steps, restarts, loss, score, generator or default_generator(x)), x, y, eps)


class BlindAttack(UserWarning):
    """An attack met no gradient but zero at `blind` of its samples.

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


class _L2:
    @staticmethod
    def widest(pixels: int) -> float:
        return math.sqrt(pixels)

    @staticmethod
    def direction(gradient: Tensor) -> Tensor:
        return gradient / _norm(gradient)

    @staticmethod
    def project(delta: Tensor, eps: Tensor) -> Tensor:
        return delta * (eps / _norm(delta).clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1)


class _LInf:
    @staticmethod
    def widest(pixels: int) -> float:
        return 1.0

    @staticmethod
    def direction(gradient: Tensor) -> Tensor:
        return gradient.sign()

    @staticmethod
    def project(delta: Tensor, eps: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(delta, -eps), eps)


@dataclass(frozen=True)
class _Search:
    """All that an attack is told beside the pictures."""

    ball: type[_L2] | type[_LInf]
    model: Model
    steps: int
    restarts: int
    loss: Objective | None
    score: Objective | None
    generator: torch.Generator

    def objective(self, x: Tensor, y: Any, restart: int, classification: bool) -> Objective:
        """What this run ascends."""
        if self.loss is None and classification and restart > 0:
            return raise_one_class(self.model(x), y, restart - 1)
        return self.loss or rescaled_cross_entropy

    def judge(self, classification: bool) -> Objective:
        """What decides which of the visited points to keep."""
        return self.score or (margin if classification else self.loss or rescaled_cross_entropy)

    def start(self, x: Tensor, eps: Tensor, restart: int) -> Tensor:
        """The displacement at which this run begins."""
        if restart == 0:
            return torch.zeros_like(x, dtype=torch.float64)
        return self.ball.project(normal(x, self.generator).double(), eps)


def _pgd(search: _Search, x: Tensor, y: Any, eps: float | Tensor, enough: Tensor | None = None) -> Tensor:
    check_pictures(x, eps, unbounded=True)
    whole("steps", search.steps)
    whole("restarts", search.restarts)
    classification = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
    # Within `remembered`, parametrized weights are computed once for all steps.
    with torch.inference_mode(False), torch.enable_grad(), remembered(search.model):
        x = x.detach().clone()
        y = y.clone() if isinstance(y, Tensor) else y  # autograd keeps no tensor made in inference_mode
        reach = _reach(search, x, eps)  # (N,)
        worst = x.clone()
        best = torch.full_like(reach, -math.inf)
        blind = torch.zeros_like(best, dtype=torch.bool)
        for restart in range(search.restarts):
            todo = torch.arange(len(x), device=x.device)
            if classification:
                todo = (best <= 0).nonzero().squeeze(1)
            elif enough is not None:
                todo = (best < enough).nonzero().squeeze(1)
            if len(todo) == 0:
                break
            target = y if len(todo) == len(x) else _some(y, todo)
            radius = like(reach[todo], x)
            aim = search.objective(x[todo], target, restart, classification)
            most = None if enough is None else enough[todo]
            run = _Run(search, aim, search.judge(classification), x[todo], radius, most)
            moved, value, unseen = run.ascend(target, search.start(x[todo], radius, restart))
            better = value > best[todo]
            worst[todo] = torch.where(like(better, x), moved, worst[todo])
            best[todo] = torch.maximum(value, best[todo])
            blind[todo] = unseen & (best[todo] <= 0) if classification else unseen
    if blind.any():
        warnings.warn(BlindAttack(int(blind.sum()), len(x)), stacklevel=3)
    return worst


def _reach(search: _Search, x: Tensor, eps: float | Tensor) -> Tensor:
    """The radius of each sample's ball, (N,) in float64, no larger than the box is wide."""
    radii = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    if radii.shape not in ((), (len(x),)):
        raise ValueError(f"eps must be a number, or one for each of {len(x)} samples, not {tuple(radii.shape)}")
    return radii.clamp(max=search.ball.widest(x[:1].numel())).expand(len(x)) * WITHIN


@dataclass
class _State:
    """Where a run stands, sample by sample."""

    delta: Tensor  # (N, …), in float64
    worst: Tensor  # (N, …), the worst picture met
    best: Tensor  # (N,), its score
    blind: Tensor  # (N,), whether there never was a gradient
    bad: Tensor  # (N,), whether the model said NaN

    def part(self, todo: Tensor) -> _State:
        return _State(*(getattr(self, field.name)[todo] for field in fields(self)))

    def put(self, todo: Tensor, part: _State) -> None:
        for field in fields(self):
            getattr(self, field.name)[todo] = getattr(part, field.name)


@dataclass(frozen=True)
class _Run:
    """One run of an attack: what it ascends, what it keeps, from which pictures and how far."""

    search: _Search
    loss: Objective
    score: Objective
    x: Tensor
    eps: Tensor  # (N, 1, 1, 1)
    enough: Tensor | None = None  # (N,)

    def ascend(self, y: Any, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From x + delta: the worst pictures met, their scores, and which samples never had a gradient."""
        least = torch.full((len(self.x),), -math.inf, dtype=torch.float64, device=self.x.device)
        blind = torch.ones_like(least, dtype=torch.bool)
        state = _State(delta, self.x, least, blind, torch.zeros_like(blind))
        if self.enough is None:
            self._climb(y, state, range(self.search.steps + 1))
        else:
            self._climb_while_it_pays(y, state)
            state.blind &= state.best < self.enough
        raise_undefined(state.bad)
        return state.worst, state.best, state.blind

    def _climb_while_it_pays(self, y: Any, state: _State) -> None:
        """All steps, without the samples that have reached what is enough for them."""
        state.worst = state.worst.clone()
        todo = torch.arange(len(self.x), device=self.x.device)
        for first in range(0, self.search.steps + 1, PAUSE):
            some = state.part(todo)
            run = _Run(self.search, self.loss, self.score, self.x[todo], self.eps[todo])
            run._climb(_some(y, todo), some, range(first, min(first + PAUSE, self.search.steps + 1)))
            state.put(todo, some)
            todo = todo[some.best < self.enough[todo]]
            if len(todo) == 0:
                break

    def _climb(self, y: Any, state: _State, steps: range) -> None:
        """Some of the steps, which bring the state up to date."""
        x, last = self.x, self.search.steps
        for step in steps:
            moved = _displaced(x, state.delta).requires_grad_()
            output = self.search.model(moved)
            scored = per_sample(self.score(output, y), x)
            value = scored.detach().double()
            better = value > state.best
            state.worst = torch.where(like(better, x), moved.detach(), state.worst)
            state.best = torch.maximum(value, state.best)
            state.bad = state.bad | undefined(output, value)
            if step == last:
                break
            climbed = scored if self.loss is self.score else per_sample(self.loss(output, y), x)
            direction, dead = self._direction(climbed, moved)
            state.blind = state.blind & dead
            size = self.eps * (1 + math.cos(math.pi * step / last))
            further = moved.detach().double() - x.double() + size * direction
            state.delta = self.search.ball.project(further, self.eps)

    def _direction(self, climbed: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Where to go, and which samples have no gradient and go anywhere."""
        (gradient,) = torch.autograd.grad(climbed.sum(), moved)
        gradient = gradient.double()
        largest = gradient.abs().flatten(1).amax(1)
        dead = ~((largest > 0) & largest.isfinite())
        anywhere = normal(moved, self.search.generator).double()
        gradient = torch.where(like(dead, moved), anywhere, gradient / like(largest, moved))
        return self.search.ball.direction(gradient), dead


def _some(y: Any, todo: Tensor) -> Any:
    """What belongs to some of the samples."""
    return y[todo] if isinstance(y, Tensor) else y.part(todo)


def _displaced(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, in [0, 1] and in the type of x, with no pixel further from x than delta says."""
    moved = (x.double() + delta).clamp(0, 1).to(x.dtype)
    too_far = (moved.double() - x.double()).abs() > delta.abs()
    return torch.where(too_far, _one_step(moved, x), moved)


def _one_step(moved: Tensor, x: Tensor) -> Tensor:
    """The next number from `moved` towards x, on every device: from 0 up, the bits count as the numbers do."""
    bits = (moved + 0.0).view(BITS[moved.element_size()])  # + 0.0 makes a plain zero of -0.0
    return torch.where(x > moved, bits + 1, bits - 1).view(moved.dtype)


def _norm(delta: Tensor) -> Tensor:
    return like(delta.flatten(1).norm(dim=1), delta)

"""A look through an SLL block and the sorted pairs below it: never above what a search reaches, and close to it."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lipguide.robustness.certificates import pairs as module
from lipguide.robustness.certificates.block import Block
from lipguide.robustness.certificates.dual import least_gap
from lipguide.robustness.certificates.pairs import Sorted, least_gap_below
from tests.robustness.common import generator

MANY, INPUTS, PAIRS, FEATURES, UNITS = 6, 12, 5, 6, 7
STILL = torch.zeros(1, MANY, INPUTS, dtype=torch.float64)  # no move


class Problem(NamedTuple):
    """gap(δ) = wᵀ block(R s(h + Cδ) + b), for MANY of w and h."""

    c: Tensor  # C (H, INPUTS), in sums and differences
    read: Tensor
    bias: Tensor
    block: Block
    w: Tensor
    h: Tensor

    def gaps(self, moves: Tensor) -> Tensor:
        """Of moves (S, MANY, INPUTS), (S, MANY)."""
        return (self.block(self.features(moves)) * self.w).sum(-1)

    def features(self, moves: Tensor) -> Tensor:
        """What the block is given, (S, MANY, FEATURES)."""
        sums, tau = (self.h + moves @ self.c.mT).split(PAIRS, -1)
        return torch.cat([sums, tau.abs()], -1) @ self.read.mT + self.bias

    def now(self) -> Tensor:
        return self.gaps(STILL)[0]

    @property
    def sorted(self) -> Sorted:
        return Sorted(self.c @ self.c.mT, self.read, self.bias)

    def inner(self, reach: float) -> float:
        return reach * float(torch.linalg.matrix_norm(self.c, 2))

    def bounds(self, reach: float, **changes) -> Tensor:
        """By the look, with some of what it is told changed."""
        told = {"block": self.block, "below": self.sorted, "reach": reach, "inner": self.inner(reach)} | changes
        return least_gap_below(self.now(), self.w, self.h, **told)


def some(seed: int, scale: float = 0.95, spread: float = 1.0) -> Problem:
    """With V of norm `scale`, and singular values of C from 1 down to 1 / (1 + spread)²."""
    given = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=given, dtype=torch.float64)

    left, _, right = torch.linalg.svd(normal(2 * PAIRS, INPUTS), full_matrices=False)
    c = left @ torch.diag(torch.linspace(1, 1 / (1 + spread), 2 * PAIRS, dtype=torch.float64) ** 2) @ right
    filters = normal(UNITS, FEATURES)
    filters *= scale / torch.linalg.matrix_norm(filters, 2)
    read, w = torch.linalg.qr(normal(2 * PAIRS, FEATURES)).Q.mT, normal(MANY, FEATURES)
    block = Block(filters, 0.2 * normal(UNITS))
    return Problem(
        c, read, 0.1 * normal(FEATURES), block, w / w.norm(dim=1, keepdim=True), 0.3 * normal(MANY, 2 * PAIRS)
    )


def lowest(problem: Problem, reach: float, steps: int = 60) -> Tensor:
    """The smallest gaps that a descent from 48 beginnings finds within `reach`, (MANY,)."""
    move = torch.randn(48, MANY, INPUTS, generator=generator(1), dtype=torch.float64)
    best = torch.full((MANY,), math.inf, dtype=torch.float64)
    for step in range(steps):
        move = (reach * move / move.norm(dim=2, keepdim=True).clamp(min=reach)).requires_grad_()
        gaps = problem.gaps(move)
        best = torch.minimum(best, gaps.detach().amin(0))
        slope = torch.autograd.grad(gaps.sum(), move)[0]
        rate = reach * (1 - step / steps)
        move = (move - rate * slope / slope.norm(dim=2, keepdim=True).clamp(min=1e-12)).detach()
    return best


CASES = [(seed, scale, reach) for seed in range(3) for scale in (0.5, 0.95, 1.2) for reach in (0.05, 0.3, 1.0)]


@pytest.mark.parametrize("seed, scale, reach", CASES)
def test_no_move_gets_below(seed, scale, reach):
    problem = some(seed, scale)
    bounds = problem.bounds(reach)
    assert bounds.isfinite().all() and (bounds <= lowest(problem, reach) + 1e-9).all()


def turned(problem: Problem) -> Problem:
    """With the signs of some differences the other way round: other pairs are in order."""
    return problem._replace(h=problem.h * torch.tensor([1.0] * PAIRS + [-1.0] * PAIRS))


LIES = {
    "half the reach": lambda problem, reach: problem.bounds(reach / 2),
    "a quarter of the gram": lambda problem, reach: problem.bounds(
        reach, below=replace(problem.sorted, gram=problem.sorted.gram / 4)
    ),
    "units that stay": lambda problem, reach: problem.bounds(reach, inner=0.0),
    "other kinks": lambda problem, reach: problem.bounds(
        reach, block=replace(problem.block, bias=problem.block.bias + 5)
    ),
    "other pairs": lambda problem, reach: least_gap_below(
        problem.now(), problem.w, turned(problem).h, problem.block, problem.sorted, reach, problem.inner(reach)
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_planted_errors_are_caught(lie):
    caught = 0
    for seed in range(8):
        problem = some(seed)
        caught += int((LIES[lie](problem, 0.3) > lowest(problem, 0.3) + 1e-9).sum())
    assert caught > 0


@pytest.mark.parametrize("charge", ["pairs", "units"])
def test_what_is_charged_is_needed(charge, monkeypatch):
    """With a hundredth of the price for the moves of pairs, or of units, the bound would be none."""
    kinked = module._kinked

    def cheap(at, right, left, line, price):
        of_units = isinstance(left, float)
        return kinked(at, right, left, line, price * (100 if of_units == (charge == "units") else 1))

    monkeypatch.setattr(module, "_kinked", cheap)
    caught = sum(int((some(k).bounds(0.5) > lowest(some(k), 0.5) + 1e-9).sum()) for k in range(8))
    assert caught > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_search_goes_along_the_slopes_of_what_it_climbs(seed, monkeypatch):
    """Against finite differences in double precision, and the end of it against the bound that is proved."""
    ends, values = [], []
    searched, surely = module.highest, module._surely

    def checked(function, start, rates, steps, memory):
        search = function.__self__
        double = [part.double() if part.is_floating_point() else part for part in search.open]
        search = search._replace(
            open=module._Open(*double), **{k: getattr(search, k).double() for k in search._fields[1:-1]}
        )
        point = [part.double() + 0.01 for part in start]
        for number, there in enumerate((search.open.units, search.open.here)):  # padding counts for nothing
            point[number] = point[number] * there
        for number, slope in enumerate(search.value(*point)[1:]):
            toward = torch.randn(slope.shape, generator=generator(number), dtype=torch.float64)
            if number < 2:
                toward *= (search.open.units, search.open.here)[number]
            ahead, behind = (
                search.value(*(part + sign * 1e-6 * toward if k == number else part for k, part in enumerate(point)))[0]
                for sign in (1, -1)
            )
            along = (slope * toward).reshape(len(ahead), -1).sum(1)
            assert torch.allclose((ahead - behind) / 2e-6, along, rtol=1e-4, atol=1e-6)
        found = searched(function, start, rates, steps, memory)
        ends.append(function(*found)[0])
        return found

    def kept(gap, *rest):
        values.append((gap, surely(gap, *rest)))
        return values[-1][1]

    monkeypatch.setattr(module, "highest", checked)
    monkeypatch.setattr(module, "_surely", kept)
    some(seed).bounds(0.3)
    for end, (gap, proved) in zip(ends, values, strict=True):
        assert torch.allclose(gap + end, proved, atol=1e-4)


def test_a_norm_that_is_missed_is_raised_or_bounds_nothing(monkeypatch):
    problem = some(1)
    wanted = problem.bounds(0.3)
    monkeypatch.setattr(module, "TURNS", 0)
    monkeypatch.setattr(module, "ROOM", 0.5)
    raised = problem.bounds(0.3)
    assert (raised <= wanted + 0.05).all() and (raised <= lowest(problem, 0.3) + 1e-9).all()
    monkeypatch.setattr(module, "ROOM", 1e-3)
    monkeypatch.setattr(module, "TRIES", 1)
    assert (problem.bounds(0.3) <= lowest(problem, 0.3) + 1e-9).all()


def test_it_is_closer_than_the_dual_where_the_layer_shrinks_and_near_the_truth_where_little_can_switch():
    fallen = {"true": 0.0, "pairs": 0.0, "dual": 0.0}
    for seed in range(6):
        problem, reach = some(seed, spread=2.0), 0.05
        now, u = problem.now(), problem.features(STILL)[0]
        fallen["true"] += float((now - lowest(problem, reach)).sum())
        fallen["pairs"] += float((now - problem.bounds(reach)).sum())
        fallen["dual"] += float((now - least_gap(now, problem.w, u, problem.block, problem.inner(reach))).sum())
    assert fallen["true"] <= fallen["pairs"] < 1.1 * fallen["true"]
    assert fallen["pairs"] < 0.75 * fallen["dual"]


def test_each_gap_is_bounded_by_itself():
    """Whatever else is asked, and in parts; with padding that stands for other rows' pairs and units."""
    problem = some(0)
    together = problem.bounds(0.3)
    for k in range(MANY):
        own = least_gap_below(
            problem.now()[k : k + 1], problem.w[k : k + 1], problem.h[k : k + 1], problem.block, problem.sorted, 0.3,
            problem.inner(0.3),
        )  # fmt: skip
        assert torch.allclose(own, together[k : k + 1], atol=1e-5)


def test_nothing_moves_and_nothing_is_asked():
    problem = some(0)
    assert (problem.bounds(1e-3) > problem.now() - 1.1e-3).all() and (problem.bounds(0.0) <= problem.now()).all()
    none = least_gap_below(problem.now()[:0], problem.w[:0], problem.h[:0], problem.block, problem.sorted, 0.1, 0.1)
    assert none.shape == (0,)


def test_what_is_no_number_bounds_nothing():
    problem = some(0)
    problem.h[2, 0] = math.nan
    bounds = problem.bounds(0.1)
    assert bounds[2] == -math.inf and bounds[[0, 1, 3, 4, 5]].isfinite().all()


def test_it_may_be_asked_where_nothing_is_recorded():
    problem = some(0)
    wanted = problem.bounds(0.2)
    with torch.inference_mode():
        assert torch.equal(some(0).bounds(0.2), wanted)

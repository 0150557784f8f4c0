"""The Lipschitz constant of a network from below: two inputs that it pulls apart, found by a search.

`lipschitz_lower_bound` searches a whole network, sample by sample. `stretch` and `most_stretched_pair` look at any
function of one tensor, batch and all: they show that other layers have no bound.

What two inputs really do is a lower bound of every constant, provided that the function pulls them apart and not the
rounding of its values. That is why a pair is measured in float64, and what rounding may have added is taken off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lipguide.arguments import whole
from lipguide.layers.export import without_parametrizations
from lipguide.seeded import normal

__all__ = ["StretchedPair", "lipschitz_lower_bound", "most_stretched_pair", "stretch"]

NO_NUMBERS = "the function or one of the points is NaN or infinite, so no stretch can be measured"
COMPUTES_NOTHING = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "copy_")
}  # values are still to come, or are copied before they are there


def lipschitz_lower_bound(model: nn.Module, x: Tensor, steps: int = 100, distance: float | None = None) -> float:
    """The largest stretch ‖f(a) − f(b)‖ / ‖a − b‖ that a search finds, in eval mode: a lower bound of every constant.

    From each of the given points it looks for the direction that f stretches most, by power iteration on the Jacobian
    (v ← Jᵀ J v), and climbs to points where it stretches more. Pairs begin at `distance` and end a hundred times
    nearer. What is returned was measured on a pair, in float64, less what rounding may have added: near pairs of a
    function with large values count for little or nothing.

    Args:
        model: any module that treats the samples of a batch one by one; several outputs count as one.
        x: points to start from, a batch; inputs of the kind that the network is made for find more than noise.
        steps: of the search.
        distance: of the pairs at first; by default a tenth of the mean norm of x.

    >>> model = nn.Linear(3, 3)
    >>> model.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> round(lipschitz_lower_bound(model, torch.randn(2, 3)), 4)
    3.0
    """
    _check(x, distance)
    whole("steps", steps, least=0)
    with torch.inference_mode(False), torch.enable_grad():
        f = without_parametrizations(model).requires_grad_(False)
        points = x.detach().clone()
        if distance is None:
            distance = float(_norms(points).mean()) / 10 or 1.0
        a, step = _climbed(f, points, steps, distance)
        return _measured(f, a.double(), step.double())


def _climbed(f: nn.Module, points: Tensor, steps: int, distance: float) -> tuple[Tensor, Tensor]:
    """For each point the pair that f stretched most on the way: where it starts, and the step to its end."""
    direction = _unit(normal(points.shape).to(points))
    found = torch.zeros(len(points), dtype=points.dtype, device=points.device)
    best_points = points
    best_steps = distance * direction
    for step in range(steps):
        share = step / max(1, steps - 1)
        reach = distance * 1e-2**share
        a = points.requires_grad_()
        d = direction.requires_grad_()
        start = _flat(f(a.clone()))  # f may change its input
        apart = _norms(_flat(f(a + reach * d)) - start)
        towards, turn = torch.autograd.grad(apart.sum(), (a, d), materialize_grads=True)

        stretch = apart.detach() / reach
        better = _column(stretch > found, a)
        found = torch.maximum(found, stretch)
        best_points = torch.where(better, a.detach(), best_points)
        best_steps = torch.where(better, reach * d.detach(), best_steps)

        points = (a + reach / 4 * _unit(towards)).detach()
        turns = _column(_norms(turn) > 0, d)
        direction = torch.where(turns, _unit(turn), d).detach()
    return best_points.detach(), best_steps.detach()


def _check(x: Tensor, distance: float | None) -> None:
    if not len(x) or not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}: give the search one point or more to start from")
    if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN, infinite or whole numbers: the search starts from finite floating-point values")
    if distance is not None:
        _check_distance(distance)


def _check_distance(distance: float) -> None:
    if not 0 < distance < math.inf:
        raise ValueError(f"distance is {distance}: two points are a positive and finite distance apart")


@torch.no_grad()
def _measured(f: nn.Module, a: Tensor, step: Tensor) -> float:
    """The largest ‖f(a) − f(b)‖ / ‖a − b‖ in float64, with b at the end of each step and of a thousandth of it."""
    f = f.double()
    for part in f.modules():
        # torch goes over to x where the exact value is x + 2e-9; in float64 that is a jump, so put it further off.
        if isinstance(part, nn.Softplus) and part.threshold >= 16:
            part.threshold = max(part.threshold, 40.0)
    stretches = []
    for shrink in (1.0, 1e-3):
        b = a + shrink * step
        with _Rounding(len(a)) as rounding:
            start, end = _flat(f(torch.cat((a, b)))).chunk(2)
        length = _norms(b - a).clamp_min(torch.finfo(a.dtype).tiny)
        stretch = _norms(end - start) / length
        sure = (1 - rounding.share.to(stretch)).clamp_min(0)
        stretches.append(stretch * sure)
    found = torch.stack(stretches)
    if not bool(torch.isfinite(found).any()):
        raise ValueError("the model gives NaN or infinite values where the search ended, so no stretch can be measured")
    return float(found[torch.isfinite(found)].max())


class _Rounding(TorchDispatchMode):
    """The share of ‖f(a) − f(b)‖ that rounding may have made, while f runs on the batch (a, b).

    Each operation rounds its values by ε of them. Where the two values A and B differ by little, that is a share
    ε ‖A‖ / ‖A − B‖ of the difference, which the rest of f carries on as it does the difference itself.
    """

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs, self.share = pairs, torch.zeros(pairs, dtype=torch.float64, device="cpu")

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not _makes_values(function):
            return result
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        """Adds the share that the rounding of this value has, where it holds all the pairs."""
        pairs = value.dim() > 0 and value.numel() > 0 and value.shape[0] % (2 * self.pairs) == 0
        if not pairs:
            return
        a, b = value.detach().double().reshape(2, self.pairs, -1)
        apart = torch.linalg.vector_norm(a - b, dim=1)
        size = torch.linalg.vector_norm(a, dim=1)
        share = 8 * torch.finfo(value.dtype).eps * size / apart
        self.share = self.share.to(share) + torch.where(apart > 0, share, 0.0)


def _makes_values(function: Any) -> bool:
    """False for new memory, for views of it and for copies: there may be whatever was there before, infinities too."""
    aliases = [each.alias_info for each in function._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in aliases)
    return not view and function.overloadpacket not in COMPUTES_NOTHING


def _flat(outputs: Any) -> Tensor:
    """All outputs of each sample in one row."""
    if isinstance(outputs, Tensor):
        return outputs.reshape(len(outputs), -1)
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return torch.cat([_flat(part) for part in parts], 1)


def _norms(batch: Tensor) -> Tensor:
    return torch.linalg.vector_norm(batch.flatten(1), dim=1)


def _unit(batch: Tensor) -> Tensor:
    return batch / _column(_norms(batch), batch).clamp_min(torch.finfo(batch.dtype).tiny)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


class StretchedPair(NamedTuple):
    """Two inputs and by how much the function pulls them apart."""

    a: Tensor
    b: Tensor
    stretch: float


def stretch(fn: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """‖f(a) − f(b)‖ / ‖a − b‖: a lower bound of every Lipschitz constant of f.

    Each tensor is one point, batch and all: what batch norm does is visible. Random layers draw the same numbers for
    both points.

    >>> stretch(lambda x: x + x, torch.zeros(1, 3), torch.ones(1, 3))
    2.0
    """
    if a.shape != b.shape:  # one would be repeated to fit the other
        raise ValueError(f"the two points have shapes {tuple(a.shape)} and {tuple(b.shape)}: give it two alike")
    if torch.equal(a, b):
        raise ValueError("the two points are the same: give it two that differ")
    with torch.no_grad():
        found = _ratio((_same_draws(fn, a), _same_draws(fn, b)), a, b)
    if not math.isfinite(found):
        raise ValueError(NO_NUMBERS)
    return found


def _ratio(outputs: tuple[Tensor, Tensor], a: Tensor, b: Tensor) -> float:
    """‖f(a) − f(b)‖ / ‖a − b‖ from what f gives at both points."""
    start, end = (output.detach().double() for output in outputs)
    distance = torch.linalg.vector_norm((a - b).detach().double())
    return float(torch.linalg.vector_norm(start - end) / distance)


def most_stretched_pair(
    fn: Callable[[Tensor], Tensor], start: Tensor, distance: float = 0.1, steps: int = 200, seed: int = 0
) -> StretchedPair:
    """Searches two points a given distance apart that f pulls apart as far as it can, by gradient ascent on both.

    A stretch above 1 disproves that f is 1-Lipschitz; one below 1 proves nothing. A module is searched as a copy in its
    present mode, so that a batch norm in training keeps its statistics.

    Args:
        fn: the function f, or a module.
        start: the first point a, one tensor, batch and all.
        distance: ‖a − b‖ in the L2 norm.
        steps: of Adam, each at a rate of a tenth of `distance`.
        seed: of the direction in which b lies at first.

    >>> most_stretched_pair(nn.Linear(4, 4), torch.randn(1, 4)).stretch > 0
    True
    """
    _check_distance(distance)
    whole("steps", steps, least=0)
    with torch.inference_mode(False), torch.enable_grad():
        fn = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
        return _most_stretched(fn, start.detach().clone(), distance, steps, seed)


def _most_stretched(
    fn: Callable[[Tensor], Tensor], start: Tensor, distance: float, steps: int, seed: int
) -> StretchedPair:
    a = start.requires_grad_()
    direction = normal(start.shape, start.dtype, seed).to(start.device).requires_grad_()
    ascent = torch.optim.Adam([a, direction], lr=distance / 10, maximize=True)
    best = None
    for _ in range(steps + 1):
        b = a + distance * direction / torch.linalg.vector_norm(direction)
        outputs = _same_draws(fn, a), _same_draws(fn, b)
        pair = StretchedPair(a.detach().clone(), b.detach().clone(), _ratio(outputs, a, b))
        if math.isfinite(pair.stretch):
            best = pair if best is None or pair.stretch > best.stretch else best
        apart = torch.linalg.vector_norm(outputs[0] - outputs[1])
        a.grad, direction.grad = torch.autograd.grad(apart, (a, direction))
        with torch.device("cpu"):  # where Adam counts its steps, whatever device new tensors lie on
            ascent.step()
    if best is None:
        raise ValueError(NO_NUMBERS)
    return best


def _same_draws(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), with the same random numbers each time. The copies keep x from an f that works in place, and f(x) from one
    that writes each answer over its last."""
    with torch.random.fork_rng(devices=[x.device.index] if x.is_cuda else []):
        torch.default_generator.manual_seed(0)
        if x.is_cuda:
            torch.cuda.default_generators[x.device.index].manual_seed(0)
        return fn(x.clone()).clone()

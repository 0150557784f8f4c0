"""Which brick to take: seven networks of the same size learn for the same seconds, with a rate searched for each.

`python -m lipguide compare` makes the record. A comparison of layers is decided by what is held equal (Prach et al.,
2024): here the number of parameters, the seconds of training and the budget of the search for a rate. Rates are chosen
on digits of one seed, networks are judged on those of another. Then the best brick learns with other losses.

Every run leaves a file in the folder, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguide.layers.export import without_parametrizations
from lipguide.losses import EMMA, LogitAnnealing, OffsetCrossEntropy
from lipguide.tasks.classification.bricks import FAMILIES, classifier, parameters, width_for
from lipguide.tasks.classification.recipes import Recipe, measure
from lipguide.tasks.classification.runs import Digits
from lipguide.tasks.runs import once, spread
from lipguide.tasks.task import Data
from lipguide.training import Shifted, Supervised, adam, fit

__all__ = ["LOSSES", "PLAN", "Plan", "compare", "training_steps"]

logger = logging.getLogger(__name__)
ASKED = 36 / 255  # the radius at which a rate, a brick and a loss are chosen
TEMPERATURE = 0.25


class TemperedEMMA(nn.Module):
    """EMMA of logits over a temperature; the bound of a logit grows by as much.

    >>> round(TemperedEMMA(0.5)(torch.zeros(1, 2), torch.tensor([0])).item(), 3)
    0.177
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.loss = EMMA(epsilon, 1 / TEMPERATURE)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return TEMPERATURE * self.loss(logits / TEMPERATURE, labels)


FIRST_LOSS = "offset"
LOSSES: dict[str, Callable[[], nn.Module]] = {
    FIRST_LOSS: lambda: OffsetCrossEntropy(2 * math.sqrt(2) * ASKED, TEMPERATURE),
    "annealing": lambda: LogitAnnealing(),  # as published
    "EMMA": lambda: TemperedEMMA(2 * ASKED),
}


@dataclass(frozen=True)
class Plan:
    """What all bricks are given alike."""

    seconds: float = 150.0  # of each training
    search: float = 48.0  # of each training that looks for a rate
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    parameters: int = 80_000
    batch_size: int = 64
    train_items: int | None = None
    choosing_items: int | None = 1000
    test_items: int | None = 2000


PLAN = Plan()


def training_steps(plan: Plan, device: torch.device) -> dict[str, Callable[[], None]]:
    """One training step of each brick on noise, as a function without arguments, to be timed side by side."""
    images = torch.rand(plan.batch_size, 3, 32, 32, device=device)
    labels = torch.arange(plan.batch_size, device=device) % 10

    def of(brick: str) -> Callable[[], None]:
        model = _network(brick, plan, 0).to(device).train()
        optimizer, loss = adam(model, 1e-4), LOSSES[FIRST_LOSS]()

        def step() -> None:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()

        return step

    return {brick: of(brick) for brick in FAMILIES}


def compare(
    folder: str | Path,
    costs: Mapping[str, tuple[float, float]],
    device: torch.device,
    plan: Plan = PLAN,
    bricks: Sequence[str] = tuple(FAMILIES),
) -> dict[str, Any]:
    """Search a rate for each brick, train it with each seed, and the best one with the other losses.

    Args:
        folder: holds one file a run.
        costs: seconds and MiB of a training step of each brick.
        bricks: those of `FAMILIES` that are compared.
    """
    runs = _Runs(Path(folder), plan, {brick: seconds for brick, (seconds, _) in costs.items()}, device)
    rates = {brick: _best_rate(runs, brick) for brick in bricks}
    found = {brick: [runs(brick, rate, seed) for seed in plan.seeds] for brick, rate in rates.items()}
    best = max(bricks, key=lambda brick: _certified(found[brick]))
    others = [loss for loss in LOSSES if loss != FIRST_LOSS]
    losses = {FIRST_LOSS: found[best]}
    losses |= {loss: [runs(best, rates[best], seed, loss) for seed in plan.seeds] for loss in others}
    searched = {brick: {f"{rate:g}": _searched(runs, brick, rate) for rate in plan.rates} for brick in bricks}
    return {
        "plan": asdict(plan),
        "data": runs.digits.facts,
        "bricks": {
            brick: _summary(found[brick])
            | {"rate": rates[brick], "milliseconds": 1000 * costs[brick][0], "MiB": costs[brick][1]}
            | {
                "width": width_for(brick, plan.parameters),
                "parameters": found[brick][0]["parameters"],
                "steps": found[brick][0]["steps"],
            }
            for brick in bricks
        },
        "best": best,
        "losses": {loss: _summary(entries) for loss, entries in losses.items()},
        "searched": searched,
    }


class _Runs:
    """Trainings by brick, rate, seed and loss, each made once."""

    def __init__(self, folder: Path, plan: Plan, seconds: Mapping[str, float], device: torch.device) -> None:
        self.folder, self.plan, self.seconds, self.device = folder, plan, seconds, device
        self.digits = Digits(plan.train_items, plan.choosing_items, plan.test_items)

    def searching(self, brick: str, rate: float) -> dict[str, Any]:
        """A short training, scored on the digits that rates are chosen on."""
        return self._once(f"search {brick} {rate:g}", brick, rate, 0, FIRST_LOSS, self.plan.search, self.digits.choose)

    def __call__(self, brick: str, rate: float, seed: int, loss: str = FIRST_LOSS) -> dict[str, Any]:
        """A whole training, scored on the digits that nothing was chosen on."""
        return self._once(f"{brick} {loss} {seed}", brick, rate, seed, loss, self.plan.seconds, self.digits.judge)

    def _once(
        self, name: str, brick: str, rate: float, seed: int, loss: str, seconds: float, data: Data
    ) -> dict[str, Any]:
        path = self.folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        steps = round(seconds / self.seconds[brick])
        wanted = {"brick": brick, "rate": rate, "seed": seed, "loss": loss, "steps": steps}
        wanted |= {"learned": self.digits.train.hash, "judged": data.hash}
        entry = once(path, wanted, lambda: self._trained(brick, rate, seed, loss, steps, data))
        logger.info("%s: clean %.3f, certified %s", name, entry["accuracy"], entry["certified"])
        return entry

    def _trained(self, brick: str, rate: float, seed: int, loss: str, steps: int, data: Data) -> dict[str, Any]:
        model = _network(brick, self.plan, seed).to(self.device)
        size = parameters(model)
        step = Shifted(Supervised(LOSSES[loss]()))
        began = time.perf_counter()
        history = fit(
            model,
            self.digits.train.columns,
            step,
            adam(model, rate),
            steps,
            self.plan.batch_size,
            "one-cycle",
            seed=seed,
        )
        seconds = time.perf_counter() - began
        plain = without_parametrizations(model.eval())
        scores = measure(plain, Recipe(brick, steps), data)
        return {"parameters": size, "seconds": round(seconds, 1), "loss_at_the_end": history[-1]["loss"]} | scores


def _network(brick: str, plan: Plan, seed: int) -> nn.Sequential:
    width = width_for(brick, plan.parameters)
    torch.manual_seed(seed)
    return classifier(brick, width)


def _at(entry: dict[str, Any], radius: float = ASKED) -> float:
    """What is certified at a radius, in per cent."""
    return 100 * next(share for at, share in entry["certified"] if abs(at - radius) < 1e-5)


def _certified(entries: list[dict[str, Any]]) -> float:
    return statistics.mean(_at(entry) for entry in entries)


def _best_rate(runs: _Runs, brick: str) -> float:
    return max(runs.plan.rates, key=lambda rate: _searched(runs, brick, rate))


def _searched(runs: _Runs, brick: str, rate: float) -> float:
    return _at(runs.searching(brick, rate))


def _summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds in per cent, and from the least to the largest."""
    clean = spread([100 * entry["accuracy"] for entry in entries])
    return {"clean": clean} | {f"{k}/255": spread([_at(entry, k / 255) for entry in entries]) for k in (36, 72, 108)}

"""What the dials of a loss do: one small network learns some forty times, each time with another setting or loss.

`python -m lipguide losses` makes the record that the chapter `losses` reads. All settings are given the same digits,
batches and steps; each is trained once a seed, of the first weights and of the batches. Settings are chosen on digits
that neither train nor judge.

Every run leaves a file in the folder, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguide import losses
from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import orthogonal
from lipguide.layers.brick import Through
from lipguide.layers.export import without_parametrizations
from lipguide.layers.pooling import ScaledAvgPool2d
from lipguide.precision import full_precision
from lipguide.robustness.certificates import certified_accuracy
from lipguide.tasks.classification.runs import Digits
from lipguide.tasks.runs import once, spread
from lipguide.tasks.task import Data
from lipguide.training import Supervised, adam, fit

__all__ = ["PLAN", "RADII", "Grey", "Plan", "learn", "measured", "small_network", "sweep"]

logger = logging.getLogger(__name__)
Row = dict[str, Any]
RADII = [k / 20 for k in range(21)]  # from 0, which is clean accuracy, to 1
SHOWN = {"clean": 0, "quarter": 5, "half": 10}  # the places of ε = 0, 1/4 and 1/2 among the radii
SMALL = (3, 32, 32)
ASKED = {"36/255": 36 / 255, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}  # the ε of requirements


class Grey(nn.Module):
    """Orthogonal projection onto the grey pictures, around medium grey.

    >>> Grey()(torch.ones(1, 3, 2, 2)).shape
    torch.Size([1, 1, 2, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).sum(1, keepdim=True) / 3**0.5

    def lipschitz(self, constant: float, through: Through) -> float:
        return constant  # a projection stretches nothing


def small_network(width: int, outputs: int = 10, seed: int = 0) -> nn.Sequential:
    """Three orthogonal dense layers on the 16×16 grey values of a picture; the first three modules learn nothing.

    >>> small_network(8)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        Grey(),
        ScaledAvgPool2d(2),
        nn.Flatten(),
        orthogonal(nn.Linear(256, width)),
        GroupSort2(),
        orthogonal(nn.Linear(width, width)),
        GroupSort2(),
        orthogonal(nn.Linear(width, outputs)),
    )


@dataclass(frozen=True)
class Plan:
    """What all settings are given alike."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    width: int = 128
    batch_size: int = 256
    rate: float = 0.02
    train_scenes: int | None = 3500
    choosing_scenes: int | None = 800
    test_scenes: int | None = 2000

    def digits(self) -> Digits:
        """What networks learn from, what settings are chosen on, and what judges."""
        return Digits(self.train_scenes, self.choosing_scenes, self.test_scenes)


PLAN = Plan()


def learn(
    network: nn.Sequential,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    plan: Plan = PLAN,
    seed: int = 0,
) -> nn.Sequential:
    """Train a small network with a loss, and return it in eval mode, its weights fixed.

    Args:
        network: such as `small_network` makes; its first three modules must have nothing to learn.
        loss: of its outputs and the labels.
        data: pictures and labels.
        seed: of the batches.

    >>> digits = torch.rand(8, 3, 32, 32), torch.arange(8)
    >>> learn(small_network(8), losses.CosineSimilarity(), digits, Plan(steps=1, batch_size=4)).training
    False
    """
    device = next(network.parameters()).device
    images, labels = data
    with torch.no_grad():
        seen = torch.cat([network[:3](part.to(device)) for part in images.split(1000)])  # once, not at every step
    dense = network[3:]
    fit(dense, (seen, labels), Supervised(loss), adam(dense, plan.rate), plan.steps, plan.batch_size, seed=seed)
    return network.eval().requires_grad_(False)


def measured(network: nn.Sequential, data: Data) -> list[float]:
    """The certified accuracy in per cent at each of the `RADII`."""
    images, labels = data.columns
    bound = lipschitz_bound(network, SMALL).value
    plain = without_parametrizations(network)
    device = next(plain.parameters()).device
    with torch.no_grad(), full_precision():
        logits = torch.cat([plain(part.to(device)) for part in images.split(1000)]).cpu()
    curve = certified_accuracy(logits, labels, RADII, bound)
    return [round(100 * share, 3) for share in curve.tolist()]


# -- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A loss with its knobs turned."""

    name: str
    value: float  # of the knob
    loss: Callable[[], nn.Module]


def temperatures() -> list[Setting]:
    """Cross-entropy, from robustness to accuracy."""
    return [_tempered(tau) for tau in (0.3, 1, 3, 10, 30, 100, 255)]


def _tempered(tau: float) -> Setting:
    return Setting(f"tempered CE, τ = {tau:g}", tau, lambda: losses.TauCrossEntropy(tau))


def margins() -> list[Setting]:
    """The hinge alone."""
    return [_hinge(margin) for margin in (0.02, 0.1, 0.3, 1, 3, 10, 30)]


def _hinge(margin: float) -> Setting:
    return Setting(f"hinge, m = {margin:g}", margin, lambda: losses.MulticlassHKR(math.inf, margin))


def alphas(margin: float) -> list[Setting]:
    """HKR with the margin that the hinge has chosen; α = ∞ is that hinge."""
    return [_hkr(alpha, margin) for alpha in (0, 1, 2, 4, 16, 64)]


def _hkr(alpha: float, margin: float) -> Setting:
    return Setting(f"HKR, α = {alpha:g}, m = {margin:g}", alpha, lambda: losses.MulticlassHKR(alpha, margin))


def offsets() -> list[Setting]:
    """Offset cross-entropy, by the ε of ξ = 2√2 ε."""
    return [_offset(name, epsilon) for name, epsilon in (ASKED | {"2": 2.0, "4": 4.0}).items()]


def _offset(name: str, epsilon: float) -> Setting:
    offset = 2 * math.sqrt(2) * epsilon
    return Setting(f"offset CE, ξ = 2√2 · {name}", epsilon, lambda: losses.OffsetCrossEntropy(offset))


def annealings() -> list[Setting]:
    """Logit annealing, by its offset; temperature and exponent as published."""
    return [_annealing(offset) for offset in (0.25, 0.5, 1, 2, 4)]


def _annealing(offset: float) -> Setting:
    return Setting(f"logit annealing, ξ = {offset:g}, T = 3/4", offset, lambda: losses.LogitAnnealing(offset))


def emmas() -> list[Setting]:
    """EMMA, by its ε."""
    return [_emma(name, epsilon) for name, epsilon in ASKED.items()]


def _emma(name: str, epsilon: float) -> Setting:
    return Setting(f"EMMA, ε = {name}", epsilon, lambda: losses.EMMA(epsilon=epsilon))


def others() -> list[Setting]:
    """One round or customary setting each; the knob, where there is one, is not turned."""
    return [
        Setting("SoftHKR, α = 10, m = 1", 10, lambda: losses.MulticlassSoftHKR(10, 1.0)),
        Setting("LseHKR, α = 10, m = 1", 10, lambda: losses.MulticlassLseHKR(10, 1.0)),
        Setting("CategoricalHinge, m = 1", 1, lambda: losses.CategoricalHinge(1.0)),
        Setting("MultiMargin, m = 1", 1, lambda: losses.MultiMargin(1.0)),
        Setting("cosine similarity", 0, lambda: losses.CosineSimilarity()),
    ]


# -- the sweep --------------------------------------------------------------------------------------------------------


def sweep(folder: str | Path, device: torch.device, plan: Plan = PLAN) -> dict[str, Any]:
    """Turn each dial, then train with the losses that have none, and return the record.

    Args:
        folder: holds one file a run.
    """
    runs = _Runs(Path(folder), plan, device)
    dials = {"temperature": runs.rows(temperatures()), "margin": runs.rows(margins())}
    margin = max(dials["margin"], key=lambda row: row["chosen on"]["clean"])["value"]
    dials |= {"alpha": runs.rows(alphas(margin)), "offset": runs.rows(offsets())}
    dials |= {"annealing": runs.rows(annealings()), "EMMA": runs.rows(emmas()), "none": runs.rows(others())}
    facts = {"plan": asdict(plan), "data": runs.digits.facts, "radii": RADII}
    return {**facts, "margin": margin, "dials": dials, "seconds": runs.seconds}


class _Runs:
    """Trainings by setting and seed, each made once."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        self.folder, self.plan, self.device = folder, plan, device
        self.digits = plan.digits()
        self.seconds = 0.0  # that all runs took, those on file too

    def rows(self, settings: list[Setting]) -> list[Row]:
        return [self.row(setting) for setting in settings]

    def row(self, setting: Setting) -> Row:
        """What the seeds of a setting have come to, in per cent: means and ranges, and the mean curve of the judges."""
        runs = [self.run(setting, seed) for seed in self.plan.seeds]
        judged = {name: spread([run["judged on"][at] for run in runs]) for name, at in SHOWN.items()}
        chosen = {name: statistics.mean(run["chosen on"][at] for run in runs) for name, at in SHOWN.items()}
        curves = zip(*(run["judged on"] for run in runs), strict=True)
        row = {"name": setting.name, "value": setting.value, "train": spread([run["train"][0] for run in runs])}
        return {**row, **judged, "chosen on": chosen, "curve": [statistics.mean(at) for at in curves]}

    def run(self, setting: Setting, seed: int) -> Row:
        facts = self.digits.facts
        wanted = {"setting": setting.name, "seed": seed, "steps": self.plan.steps, "width": self.plan.width}
        wanted |= {"rate": self.plan.rate, "batch_size": self.plan.batch_size}
        wanted |= {"data": {name: part["hash"] for name, part in facts.items()}}
        file = "".join(sign if sign.isalnum() or sign in "=." else "-" for sign in f"{setting.name} {seed}")
        entry = once(self.folder / f"{file}.json", wanted, lambda: self._made(setting, seed))
        self.seconds += entry["seconds"]
        logger.info("%s, seed %d: clean %.1f %%", setting.name, seed, entry["judged on"][0])
        return entry

    def _made(self, setting: Setting, seed: int) -> Row:
        began = time.perf_counter()
        network = small_network(self.plan.width, seed=seed).to(self.device)
        learn(network, setting.loss(), self.digits.train.columns, self.plan, seed)
        parts = {"train": self.digits.train, "chosen on": self.digits.choose, "judged on": self.digits.judge}
        curves = {name: measured(network, part) for name, part in parts.items()}
        return {**curves, "seconds": round(time.perf_counter() - began, 1)}

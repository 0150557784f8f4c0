"""A training step and an inference of one convolution under each constraint, beside plain torch and the peers."""

import time
from collections.abc import Callable

import pytest
import torch

from lipguide.book.cost import Cost, compare
from tests.benchmarks.candidates import exported, inference_step, layers, training_step
from tests.benchmarks.conftest import PROFILE

# Pictures shrink as channels grow, as they do in a network.
SIDES = {16: 32, 64: 32, 128: 16, 256: 8}
QUICK = [(16, 64), (64, 16), (64, 64), (256, 16)]
GRID = QUICK if PROFILE == "quick" else [(channels, batch) for channels in SIDES for batch in (16, 64, 256)]


def rows(costs: dict[str, Cost]) -> dict[str, dict[str, float]]:
    return {name: {"seconds": cost.seconds, "ratio": cost.ratio, "MiB": cost.mebibytes} for name, cost in costs.items()}


def rounds_within(seconds: float, steps: dict[str, Callable[[], None]]) -> int:
    """As many rounds as fit into the seconds, so that short steps, which scatter most, are repeated most often."""
    began = time.perf_counter()
    for step in steps.values():
        step()
    return min(max(int(seconds / (time.perf_counter() - began)), 7), 101)


@pytest.mark.parametrize("channels, batch", GRID)
def test_training_step(benchmark, record, device, channels, batch):
    x = torch.randn(batch, channels, SIDES[channels], SIDES[channels], device=device)
    steps = {name: training_step(layer, x) for name, layer in layers(channels, device).items()}
    costs = benchmark.pedantic(compare, args=(steps, rounds_within(12, steps)), rounds=1, iterations=1)
    record(f"training/channels {channels}/batch {batch}/side {SIDES[channels]}", rows(costs))
    # What does not depend on how busy the machine is: a constraint costs memory for weights, not for pictures.
    plain = costs["plain"].mebibytes
    assert all(costs[name].mebibytes <= costs["orthogonium AOC"].mebibytes + 1 for name in ("spectral", "orthogonal"))
    assert costs["spectral"].mebibytes <= 1.1 * plain + 16


@pytest.mark.parametrize("channels, batch", GRID)
def test_inference_after_export(benchmark, record, device, channels, batch):
    x = torch.randn(batch, channels, SIDES[channels], SIDES[channels], device=device)
    steps = {name: inference_step(layer, x) for name, layer in exported(layers(channels, device)).items()}
    costs = benchmark.pedantic(compare, args=(steps, rounds_within(5, steps)), rounds=1, iterations=1)
    record(f"inference/channels {channels}/batch {batch}/side {SIDES[channels]}", rows(costs))
    assert all(cost.mebibytes == pytest.approx(costs["plain"].mebibytes) for cost in costs.values())

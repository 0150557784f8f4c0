"""A training step and an inference of one convolution under each constraint, beside plain torch and the peers."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lipguide.book.cost import Cost, compare
from lipguide.layers.activations import GroupSort2, MaxMin
from tests.benchmarks.candidates import OURS, blocks, exported, inference_step, layers, recorded, training_step
from tests.benchmarks.conftest import DEVICE, PROFILE

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


# Channels, batch and side: the block alone is dear where channels are many and pictures few.
BLOCKS = [(64, 16, 32), (64, 64, 32), (128, 64, 16), (256, 64, 8)]


@pytest.mark.parametrize("channels, batch, side", BLOCKS)
def test_training_step_of_a_block(benchmark, record, device, channels, batch, side):
    x = torch.randn(batch, channels, side, side, device=device)
    steps = {name: training_step(block, x) for name, block in blocks(channels, device).items()}
    costs = benchmark.pedantic(compare, args=(steps, rounds_within(8, steps)), rounds=1, iterations=1)
    record(f"training, block/channels {channels}/batch {batch}/side {side}", rows(costs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step_of_an_activation(benchmark, record, device, dtype):
    x, gradient = (torch.randn(64, 64, 32, 32, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()

    def step(activation: nn.Module) -> Callable[[], None]:
        return lambda: torch.autograd.grad(activation(x), x, gradient)

    steps = {"ReLU": step(nn.ReLU()), "GroupSort2": step(GroupSort2()), "MaxMin": step(MaxMin())}
    costs = benchmark.pedantic(compare, args=(steps, 31), rounds=1, iterations=1)
    name = str(dtype).removeprefix("torch.")
    record(f"training, activation/channels 64/batch 64/side 32/{name}", rows(costs))


@pytest.mark.skipif(DEVICE == "cpu", reason="half precision, and batches of a GPU's size")
@pytest.mark.parametrize("kind", ["layers", "blocks"])
def test_training_step_in_half_precision(benchmark, record, device, kind):
    """Layers beside a plain one, and blocks beside one of two plain ones, with the weights in float32."""
    x = torch.randn(256, 256, 16, 16, device=device)
    made = layers(256, device) if kind == "layers" else blocks(256, device)
    steps = {name: training_step(layer, x, torch.bfloat16) for name, layer in made.items()}
    costs = benchmark.pedantic(compare, args=(steps, 31), rounds=1, iterations=1)
    record(f"training in bfloat16, {kind}/channels 256/batch 256/side 16", rows(costs))


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU records a step")
@pytest.mark.parametrize("kind", ["layers", "blocks"])
def test_recorded_training_step_in_half_precision(benchmark, record, device, kind):
    """The same steps, recorded: what the kernels take, without the starting of them. Peers may not be recordable."""
    x = torch.randn(256, 256, 16, 16, device=device)
    made = layers(256, device) if kind == "layers" else blocks(256, device)
    own = {name: layer for name, layer in made.items() if name.startswith(("plain", "SLL")) or name in OURS}
    steps = {name: recorded(training_step(layer, x, torch.bfloat16), device) for name, layer in own.items()}
    costs = benchmark.pedantic(compare, args=(steps, 31), rounds=1, iterations=1)
    record(f"recorded training in bfloat16, {kind}/channels 256/batch 256/side 16", rows(costs))


@pytest.mark.parametrize("channels, batch", GRID)
def test_inference_after_export(benchmark, record, device, channels, batch):
    x = torch.randn(batch, channels, SIDES[channels], SIDES[channels], device=device)
    steps = {name: inference_step(layer, x) for name, layer in exported(layers(channels, device)).items()}
    costs = benchmark.pedantic(compare, args=(steps, rounds_within(5, steps)), rounds=1, iterations=1)
    record(f"inference/channels {channels}/batch {batch}/side {SIDES[channels]}", rows(costs))
    assert all(cost.mebibytes == pytest.approx(costs["plain"].mebibytes) for cost in costs.values())

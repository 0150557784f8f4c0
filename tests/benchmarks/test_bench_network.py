"""A whole network of VGG's kind: its inference after export, and the price of a bound, ours and the peers'."""

import contextlib
import io
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from deel.torchlip.utils import evaluate_lip_const
from orthogonium.layers.conv.singular_values.get_sv import get_conv_sv
from torch import nn

from lipguide.book.cost import compare
from lipguide.bounds.network import lipschitz_bound, lipschitz_lower_bound
from lipguide.layers.affine import orthogonal, spectral
from lipguide.layers.export import export
from tests.benchmarks.candidates import inference_step, vgg
from tests.benchmarks.test_bench_layers import rows


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_inference_of_an_exported_network(benchmark, record, device, batch):
    x = torch.randn(batch, 3, 32, 32, device=device)
    models = {
        "plain": vgg(lambda layer: layer),
        "spectral, exported": export(vgg(spectral)),
        "orthogonal, exported": export(vgg(orthogonal)),
        "spectral, in eval mode": vgg(spectral),
        "orthogonal, in eval mode": vgg(orthogonal),
    }
    steps = {name: inference_step(model.to(device).eval(), x) for name, model in models.items()}
    costs = benchmark.pedantic(compare, args=(steps, 31 if batch <= 16 else 15), rounds=1, iterations=1)
    record(f"network inference/batch {batch}", rows(costs))
    assert costs["spectral, exported"].mebibytes <= costs["plain"].mebibytes * 1.01


def our_bound(model: nn.Module) -> float:
    return lipschitz_bound(model, (3, 32, 32)).value


def orthogonium_bound(model: nn.Sequential, iterations: int) -> float:
    """The product of the bounds that orthogonium's own tool gives for the layers."""
    product = 1.0
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            product *= float(get_conv_sv(layer, iterations, return_stab_rank=False))
        elif isinstance(layer, nn.Linear):
            product *= float(torch.linalg.matrix_norm(layer.weight.detach(), ord=2))
    return product


def torchlip_search(model: nn.Module, x: torch.Tensor, kind: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluate_lip_const(model, x, kind)


def test_bound_of_a_whole_network(benchmark, record):
    """Upper bounds first: ours is the tightest, and faster than any that comes near. Then searches from below."""
    model, x = vgg(lambda layer: layer).eval(), torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    constrained = vgg(spectral).eval()
    calls = {
        "lip.lipschitz_bound": (our_bound, model),
        "lip.lipschitz_bound, spectral network": (our_bound, constrained),
        "orthogonium get_conv_sv, 3 iterations": (orthogonium_bound, model, 3),
        "below: torchlip jacobian_norm, 1 picture": (torchlip_search, model, x[:1], "jacobian_norm"),
        "below: torchlip jacobian_norm, 32 pictures": (torchlip_search, model, x, "jacobian_norm"),
        "below: torchlip attack, 1 picture": (torchlip_search, model, x[:1], "attack"),
        "below: lip.lipschitz_lower_bound, 1 picture": (lipschitz_lower_bound, model, x[:1]),
    }
    found: dict[str, float] = {}

    def keep(name: str, function: Callable[..., float], *arguments: object) -> None:
        found[name] = function(*arguments)

    steps = {name: partial(keep, name, *call) for name, call in calls.items()}
    costs = benchmark.pedantic(compare, args=(steps, 3), rounds=1, iterations=1)
    seconds = {name: cost.seconds for name, cost in costs.items()}
    tight = "orthogonium get_conv_sv, 4 iterations"  # a minute long, so once only
    began = time.perf_counter()
    found[tight] = orthogonium_bound(model, 4)
    seconds[tight] = time.perf_counter() - began
    record("bound of a network", {name: {"seconds": seconds[name], "value": found[name]} for name in sorted(seconds)})
    value = found["lip.lipschitz_bound"]
    assert value <= found["orthogonium get_conv_sv, 3 iterations"]
    assert value >= max(result for name, result in found.items() if name.startswith("below"))
    assert value <= found[tight] and seconds["lip.lipschitz_bound"] < seconds[tight]
    assert found["lip.lipschitz_bound, spectral network"] <= 1 + 1e-4

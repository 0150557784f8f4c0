"""What the chapter `training` states as a theorem or leaves to an exercise, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lipguide as lip
from lipguide.losses import OffsetCrossEntropy

EXAMPLES = settings(deadline=None, max_examples=15, derandomize=True)
SCALE_FREE = {"orthogonal": lip.orthogonal, "frobenius": lip.frobenius, "unit rows": lip.unit_rows, "aol": lip.aol}


def network(constrain, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 8), lip.GroupSort2(), nn.Linear(8, 4))
    for layer in layers[::2]:
        constrain(layer)
    return layers.double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (16,), generator=generator)


def raw_weights(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "original" in name]


def descend(model: nn.Module, seed: int, eta: float, decay: float, rate, steps: int = 8) -> Tensor:
    """SGD with the decay on the raw weights only; the logits of the network where it ends."""
    x, y = batch(seed)
    weights = raw_weights(model)
    biases = [p for name, p in model.named_parameters() if "original" not in name]
    sgd = torch.optim.SGD([{"params": weights, "weight_decay": decay}, {"params": biases}], lr=eta)
    for step in range(steps):
        sgd.param_groups[0]["lr"] = rate(step)
        sgd.zero_grad()
        OffsetCrossEntropy()(model(x), y).backward()
        sgd.step()
    return model(x).detach()


@pytest.mark.parametrize("name", SCALE_FREE)
@EXAMPLES
@given(seed=st.integers(0, 10**6), eta=st.floats(0.01, 0.3), product=st.floats(0.01, 0.3))
def test_weight_decay_under_a_normalisation_is_a_growing_learning_rate(name, seed, eta, product):
    constrain, decay = SCALE_FREE[name], product / eta
    decayed = descend(network(constrain, seed), seed, eta, decay, lambda step: eta)
    faster = descend(network(constrain, seed), seed, eta, 0.0, lambda step: eta * (1 - product) ** (-2 * step - 1))
    torch.testing.assert_close(decayed, faster, rtol=1e-6, atol=1e-8)


@EXAMPLES
@given(seed=st.integers(0, 10**6))
def test_without_the_growing_rate_weight_decay_ends_elsewhere(seed):
    """So the test above can fail."""
    decayed = descend(network(lip.orthogonal, seed), seed, 0.3, 1.0, lambda step: 0.3)
    plain = descend(network(lip.orthogonal, seed), seed, 0.3, 0.0, lambda step: 0.3)
    assert (decayed - plain).abs().max() > 1e-4


def test_weight_decay_with_clipping_is_no_learning_rate():
    """Exercise: clipping does not forget the scale, so the statement fails for it."""
    eta, product = 0.1, 0.2

    def clip(layer: nn.Module) -> nn.Module:
        return lip.clip(layer, 0.5)

    decayed = descend(network(clip, 0), 0, eta, product / eta, lambda step: eta)
    faster = descend(network(clip, 0), 0, eta, 0.0, lambda step: eta * (1 - product) ** (-2 * step - 1))
    assert (decayed - faster).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCALE_FREE)
@EXAMPLES
@given(seed=st.integers(0, 10**6))
def test_gradient_of_a_normalised_weight_is_orthogonal_to_it(name, seed):
    model = network(SCALE_FREE[name], seed)
    x, y = batch(seed)
    OffsetCrossEntropy()(model(x), y).backward()
    for raw in raw_weights(model):
        assert abs((raw * raw.grad).sum().item()) <= 1e-10 * (1 + raw.norm() * raw.grad.norm()).item()


@EXAMPLES
@given(seed=st.integers(0, 10**6), eta=st.floats(0.01, 0.5), product=st.floats(0.0, 0.5))
def test_weight_decay_before_a_projection_is_a_larger_rate(seed, eta, product):
    generator = torch.Generator().manual_seed(seed)
    weight, step = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)

    def projected(raw: Tensor) -> Tensor:
        layer = nn.Linear(7, 5, bias=False).double()
        layer.weight.data = raw.clone()
        return lip.constrain_(layer, lip.spectral).weight.detach()

    decayed = projected((1 - product) * weight - eta * step)
    faster = projected(weight - eta / (1 - product) * step)
    torch.testing.assert_close(decayed, faster, rtol=1e-5, atol=1e-7)


@EXAMPLES
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 12), scale=st.floats(0.1, 100.0))
def test_gradients_of_a_lipschitz_network_are_bounded_whatever_the_depth(seed, depth, scale):
    """At every layer's output by √2, and at its constrained weight by √2 times the norm of its input."""
    torch.manual_seed(seed)
    layers = [lip.orthogonal(nn.Linear(6, 6)).double() for _ in range(depth)]
    a = (scale * torch.randn(1, 6, dtype=torch.float64)).requires_grad_()
    inputs, weights, outputs = [], [], []
    for layer in layers:
        inputs.append(a)
        weights.append(layer.weight.detach().requires_grad_())
        z = nn.functional.linear(a, weights[-1], layer.bias)
        outputs.append(z)
        a = lip.GroupSort2()(z)
    loss = OffsetCrossEntropy()(a, torch.tensor([0]))
    gradients = torch.autograd.grad(loss, [*outputs, *weights])
    for at_output, at_weight, x in zip(gradients[:depth], gradients[depth:], inputs, strict=True):
        assert at_output.norm() <= math.sqrt(2) + 1e-9
        assert at_weight.norm() <= math.sqrt(2) * x.norm() + 1e-9


@EXAMPLES
@given(share=st.floats(0.01, 0.5), size=st.integers(4, 12))
def test_a_class_is_missing_from_a_random_batch_as_often_as_stated(share, size):
    """Against the binomial distribution, and the size that the chapter asks for is the smallest that will do."""
    from scipy.stats import binom

    assert (1 - share) ** size == pytest.approx(binom.pmf(0, size, share))
    needed = math.ceil(math.log(0.01) / math.log(1 - share))
    assert (1 - share) ** needed <= 0.01 * (1 + 1e-9) and (1 - share) ** (needed - 1) > 0.01 * (1 - 1e-9)


@EXAMPLES
@given(seed=st.integers(0, 10**6), rare=st.integers(2, 5), others=st.integers(10, 40))
def test_variance_of_the_kr_estimate_of_a_class_is_the_sum_of_two(seed, rare, others):
    """Exactly: the mean over all draws of two independent samples, one from each of two small populations."""
    generator = torch.Generator().manual_seed(seed)
    inside, outside = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    draws = torch.randint(0, 4, (20_000, rare + others), generator=generator)
    estimate = inside[draws[:, :rare]].mean(1) - outside[draws[:, rare:]].mean(1)
    expected = inside.var(unbiased=False) / rare + outside.var(unbiased=False) / others
    assert estimate.var() == pytest.approx(expected.item(), rel=0.1)

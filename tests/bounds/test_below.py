"""The searches from below: what they find, under whatever mode of torch is around them; and they change nothing."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lipguide as lip
from lipguide.bounds.below import StretchedPair, _Rounding
from tests.networks import Forward, linear
from tests.oracles import randn, steepest

MODES = {"gradients": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(lip.spectral(nn.Linear(6, 6)), lip.GroupSort2(), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("mode", MODES)
def test_the_searches_find_the_same_without_gradients_around_them(mode):
    net, x = model(), torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    below = lip.lipschitz_lower_bound(net, x, steps=5)
    pair = lip.most_stretched_pair(net, x, steps=5)
    with MODES[mode]():
        points = x.clone()  # an inference tensor in inference mode
        assert lip.lipschitz_lower_bound(net, points, steps=5) == pytest.approx(below)
        again = lip.most_stretched_pair(net, points, steps=5)
        assert isinstance(again, StretchedPair) and again.stretch == pytest.approx(pair.stretch)
        assert lip.stretch(net, points, points + 1) == pytest.approx(lip.stretch(net, x, x + 1))
        made_here = nn.Linear(6, 2)
        assert lip.lipschitz_lower_bound(made_here, points, steps=5) > 0
        assert lip.most_stretched_pair(made_here, points, steps=5).stretch > 0


def unlike_training() -> nn.Linear:
    """A constrained layer whose weight in training is not that of eval mode."""
    torch.manual_seed(0)
    layer = lip.spectral(nn.Linear(8, 8))
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.diag(torch.arange(1.0, 9)))
    return layer


ASKS = {
    "from above": lambda net: lip.lipschitz_bound(net, (8,)).value,
    "from below": lambda net: lip.lipschitz_lower_bound(net, torch.randn(2, 8), steps=5),
    "exported": lambda net: lip.lipschitz_bound(lip.export(net), (8,)).value,
}


@pytest.mark.parametrize("ask", ASKS)
def test_a_weight_that_is_remembered_from_training_is_an_error(ask):
    layer = unlike_training().train()
    with parametrize.cached():
        layer(torch.randn(2, 8))
        used = layer.weight.detach().clone()
        layer.eval()
        with pytest.raises(ValueError, match=r"weight is remembered by parametrize.cached\(\)"):
            ASKS[ask](layer)
        assert torch.equal(layer.weight, used)
    assert ASKS[ask](layer) <= 1 + 1e-5


@pytest.mark.parametrize("ask", ASKS)
def test_the_weight_of_a_module_that_is_gone_is_not_taken_for_another(ask):
    with parametrize.cached():
        net = nn.Sequential(unlike_training()).eval()
        for size in (4, 8):  # as if a layer had died whose address this one was given
            parametrize._cache[id(net[0]), "weight"] = 7 * torch.eye(size)
            with pytest.raises(ValueError, match="0.weight is remembered"):
                ASKS[ask](net)
        parametrize._cache.clear()
        assert ASKS[ask](net) <= 1 + 1e-5
        assert not parametrize._cache  # what was computed without a gradient is not left to training


@pytest.mark.parametrize("ask", ASKS)
def test_copies_meet_no_weight_of_another_module(ask):
    """Modules are made and freed in one block, so that addresses are given away again and again."""
    with parametrize.cached():
        for size in range(8, 40):
            held = nn.Sequential(lip.spectral(nn.Linear(size, 8)), lip.MaxMin()).eval()
            _ = held[0].weight  # remembered, by an address that is free again
            del held
            net = nn.Sequential(unlike_training(), lip.MaxMin()).eval()
            try:
                assert ASKS[ask](net) <= 1 + 1e-5
            except ValueError as error:
                assert "remembered" in str(error)


# What the search for a lower bound finds


def test_the_search_finds_the_norm_of_a_linear_network_and_beats_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 10))
    true = steepest(model, (2, 6, 6), 1)
    assert lip.lipschitz_lower_bound(model, torch.randn(2, 2, 6, 6)) == pytest.approx(true, rel=1e-3)
    bent = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    points = torch.randn(64, 8)
    assert lip.lipschitz_lower_bound(bent, points[:4]) > steepest(bent, (8,), 1)


def test_the_search_climbs_to_where_a_function_is_steep():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    start = torch.full((1, 1), 1.4)  # slope 0.17 here, 1 at zero
    assert lip.lipschitz_lower_bound(Sine(), start, steps=200, distance=0.2) > 0.99


def test_the_search_treats_a_batch_of_one_a_zero_input_and_a_constant_network():
    assert lip.lipschitz_lower_bound(linear(2), torch.zeros(1, 4)) == pytest.approx(2, rel=1e-4)
    assert lip.lipschitz_lower_bound(linear(0), torch.randn(1, 4)) == 0


@pytest.mark.parametrize(
    "fn, truth",
    [
        (lambda m, x: x + 1e10, 1.0),
        (lambda m, x: x + 1e10 - 1e10, 1.0),
        (lambda m, x: (x * 1e-6 + 1e10 - 1e10) * 1e6, 1.0),
        (lambda m, x: nn.functional.pad(3 * x, (0, 4), value=1e12), 3.0),
    ],
)
def test_the_search_does_not_take_rounding_for_a_stretch(fn, truth):
    assert lip.lipschitz_lower_bound(Forward(fn), torch.randn(3, 4), steps=20) <= truth


def test_the_search_does_not_take_the_threshold_of_softplus_for_a_stretch():
    at_threshold = torch.full((2, 3), 20.0)
    for distance in (1e-6, 1e-3, None):
        assert 0.9 <= lip.lipschitz_lower_bound(nn.Softplus(), at_threshold, distance=distance) <= 1


@pytest.mark.parametrize(
    "x, distance, why",
    [
        (torch.full((1, 4), math.nan), None, "NaN"),
        (torch.zeros(2, 4, dtype=torch.int64), None, "whole"),
        (torch.zeros(0, 4), None, "one point or more"),
        (torch.zeros(2, 4), 0.0, "distance is 0.0"),
    ],
)
def test_the_search_refuses_points_that_it_cannot_start_from(x, distance, why):
    with pytest.raises(ValueError, match=why):
        lip.lipschitz_lower_bound(linear(1), x, distance=distance)


def test_the_search_says_where_a_model_has_no_values():
    with pytest.raises(ValueError, match="NaN or infinite values"):
        lip.lipschitz_lower_bound(Forward(lambda m, x: x / 0), torch.randn(2, 4), steps=2)


# The guide's layers, safe and forbidden


def attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 1, batch_first=True, dtype=torch.float64)
    return lambda x: layer(x, x, x)[0]


def batch_norm(training):
    layer = nn.BatchNorm1d(4, dtype=torch.float64).train(training)
    nn.init.constant_(layer.running_var, 0.25)
    return layer


SAFE = {
    "flatten": (nn.Flatten(), (2, 3, 2, 2)),
    "reshape": (nn.Unflatten(1, (2, 2)), (2, 4)),
    "dropout at inference": (nn.Dropout(0.5).eval(), (2, 8)),
    "half an addition": (lip.Residual(nn.Identity()), (2, 4)),
    "concatenation over √2": (lip.Concat(nn.Identity(), nn.Identity()), (2, 4)),
    "patches": (lip.Patches(nn.Flatten(), 2), (1, 1, 4, 4)),
    "centering": (lip.BatchCentering(4).double(), (6, 4)),
}
FORBIDDEN = {  # at least this stretch must be found
    "batch norm in training": (batch_norm(True), (6, 4), 2.0),
    "batch norm at inference": (batch_norm(False), (6, 4), 1.99),
    "layer norm": (nn.LayerNorm(8, dtype=torch.float64), (1, 8), 2.0),
    "dropout in training": (nn.Dropout(0.5), (2, 8), 1.99),
    "addition": (lambda x: x + x, (2, 4), 1.99),
    "concatenation": (lambda x: torch.cat((x, x), 1), (2, 4), 1.41),
    "self-attention": (attention(), (1, 5, 4), 1.05),
}


@pytest.mark.parametrize(("fn", "shape"), SAFE.values(), ids=SAFE.keys())
def test_the_search_breaks_no_safe_layer(fn, shape):
    assert lip.most_stretched_pair(fn, randn(*shape), steps=100).stretch <= 1 + 1e-9


@pytest.mark.parametrize(("fn", "shape", "least"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_the_search_finds_a_pair_that_breaks_each_forbidden_layer(fn, shape, least):
    pair = lip.most_stretched_pair(fn, randn(*shape), steps=300)
    assert pair.stretch >= least
    assert lip.stretch(fn, pair.a, pair.b) == pytest.approx(pair.stretch)
    assert (pair.a - pair.b).norm() == pytest.approx(0.1)


def test_self_attention_has_no_bound_at_all():
    """The further out the search starts, the more it finds: from one pair to the next the stretch doubles and more."""
    pair = lip.most_stretched_pair(attention(), randn(1, 5, 4))
    for _ in range(4):
        further = lip.most_stretched_pair(attention(), 1.5 * pair.a)
        assert further.stretch > 2 * pair.stretch
        pair = further
    assert pair.stretch > 100


def test_the_search_leaves_modules_and_random_numbers_alone():
    layer = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = copy.deepcopy(layer.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    lip.most_stretched_pair(layer, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), steps=3)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_search_for_a_pair_asks_the_function_at_its_two_points_once_a_step():
    seen = []
    pair = lip.most_stretched_pair(lambda x: seen.append(x) or x.sin(), torch.zeros(1, 2), steps=5)
    assert len(seen) == 2 * 6
    assert pair.stretch == lip.stretch(torch.sin, pair.a, pair.b)


def test_stretch_is_a_ratio_of_distances():
    assert lip.stretch(lambda x: 3 * x, torch.zeros(2, 2), torch.ones(2, 2)) == pytest.approx(3)
    with pytest.raises(ValueError, match="two that differ"):
        lip.stretch(nn.Identity(), torch.ones(2), torch.ones(2))


def clamped(x):
    with torch.no_grad():
        x.clamp_(-0.02, 0.02)
    return 2 * x


def test_a_function_that_works_in_place_is_measured_between_the_points_given():
    a, b = torch.zeros(1, 3), torch.ones(1, 3)
    assert lip.stretch(lambda x: x.mul_(0.5), a, b) == 0.5
    assert torch.equal(a, torch.zeros(1, 3)) and torch.equal(b, torch.ones(1, 3))
    assert lip.stretch(nn.ReLU(inplace=True), a - 1, b) == pytest.approx(0.5)

    pair = lip.most_stretched_pair(clamped, torch.zeros(1, 3), steps=20)
    assert torch.linalg.vector_norm(pair.a - pair.b).item() == pytest.approx(0.1, rel=1e-5)
    assert pair.stretch == lip.stretch(clamped, pair.a, pair.b) < 2


def test_a_function_that_writes_each_answer_over_its_last_is_measured():
    answer = torch.empty(1, 3)
    assert lip.stretch(lambda x: torch.mul(x, 2, out=answer), torch.zeros(1, 3), torch.ones(1, 3)) == 2


def test_a_stretch_that_is_no_number_is_none():
    a, b = torch.zeros(1, 2), torch.ones(1, 2)
    for fn, start in ((lambda x: x * math.nan, a), (nn.Identity(), a * math.nan), (lambda x: x * math.inf, a)):
        with pytest.raises(ValueError, match="NaN or infinite, so no stretch"):
            lip.stretch(fn, start, b)
    with pytest.raises(ValueError, match="NaN or infinite, so no stretch"):
        lip.most_stretched_pair(lambda x: x * math.nan, a, steps=2)
    with pytest.raises(ValueError, match="give it two alike"):  # else one would be repeated to fit the other
        lip.stretch(nn.Identity(), torch.zeros(1, 2), torch.ones(3, 2))


@pytest.mark.parametrize("steps", [-1, 1.5, math.nan])
def test_searches_take_a_number_of_steps(steps):
    with pytest.raises(ValueError, match="steps is"):
        lip.lipschitz_lower_bound(linear(1), torch.ones(1, 4), steps=steps)
    with pytest.raises(ValueError, match="steps is"):
        lip.most_stretched_pair(linear(1), torch.ones(1, 4), steps=steps)


@pytest.mark.parametrize("distance", [0.0, -1.0, math.nan, math.inf])
def test_a_pair_is_a_positive_and_finite_distance_apart(distance):
    with pytest.raises(ValueError, match="positive and finite distance"):
        lip.most_stretched_pair(linear(1), torch.ones(1, 4), distance=distance)


def test_memory_that_is_still_to_be_written_counts_for_nothing(monkeypatch):
    """Circular padding is written into new memory piece by piece; what lay there before may be infinite."""
    seen = []
    monkeypatch.setattr(_Rounding, "_count", lambda self, value: seen.append(value.isfinite().all()))
    torch.use_deterministic_algorithms(True)  # then new memory holds NaN
    try:
        with _Rounding(1):
            torch.nn.functional.pad(torch.ones(2, 1, 3, 3, dtype=torch.float64), (1, 1, 1, 1), mode="circular")
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen and all(seen)

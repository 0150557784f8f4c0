"""The searches from below work under whatever mode of torch is around them, and change nothing."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lipguide as lip
from lipguide.bounds.below import StretchedPair

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

"""Networks of seven kinds of brick: each is 1-Lipschitz, and the bricks are the cells of the chapter `frontier`."""

import math

import pytest
import torch
from torch import nn

from lipguide import lipschitz_bound
from lipguide.layers.export import without_parametrizations
from lipguide.losses import OffsetCrossEntropy
from lipguide.tasks.classification import bricks
from lipguide.tasks.classification.bricks import FAMILIES, classifier, parameters, width_for
from lipguide.training import Supervised, fit
from tests.book.test_bricks_of_the_frontier import BRICKS

SIDE = 16


def stretched(brick):
    """A small network after a few steps, at a rate at which nobody would train."""
    torch.manual_seed(0)
    model = classifier(brick, 8, pixels=SIDE)
    data = torch.rand(64, 3, SIDE, SIDE), torch.randint(10, (64,))
    sgd = torch.optim.SGD(model.parameters(), lr=3.0)
    fit(model, data, Supervised(OffsetCrossEntropy(2.0)), sgd, steps=4, batch_size=32, schedule="constant")
    return without_parametrizations(model.eval())


@pytest.mark.parametrize("brick", FAMILIES)
def test_every_network_is_1_lipschitz_by_its_bound_and_by_its_true_jacobian(brick):
    model = stretched(brick)
    trunk, x = model[:-1].eval(), torch.rand(1, 3, SIDE, SIDE)
    assert lipschitz_bound(trunk, (3, SIDE, SIDE)).value <= 1 + 1e-4
    jacobian = torch.autograd.functional.jacobian(trunk.double(), x.double()).reshape(-1, x.numel())
    assert torch.linalg.matrix_norm(jacobian, 2) <= 1 + 1e-4
    torch.testing.assert_close(model[-1].weight.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("channels, shape", [(8, (6, 6)), (8, (5, 8)), (12, (7, 4))])
def test_a_reflector_by_frequency_keeps_every_length_and_undoes_itself(channels, shape):
    torch.manual_seed(0)
    layer = bricks.FrequencyReflector(channels).double()
    x = torch.randn(2, channels, *shape, dtype=torch.float64)
    torch.testing.assert_close(layer(layer(x)), x)
    torch.testing.assert_close(layer(x).norm(), x.norm())
    nn.init.ones_(layer.bias)
    torch.testing.assert_close(layer(torch.zeros_like(x)), torch.ones_like(x))


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_reflectors_keep_every_length_whatever_the_condition_of_v(condition):
    """The inverse of a Gram matrix loses the square of the condition: at 1e4 the layer would stretch sixfold."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    mixed = torch.logspace(0, -math.log10(condition), 8)[:, None] * turn
    raw = torch.randn(16, 16)
    raw[:, :8] = raw[:, :8] @ mixed
    w = bricks.BlockReflector()(raw)
    torch.testing.assert_close(w @ w.mT, torch.eye(16), atol=1e-5, rtol=0)
    layer, x = bricks.FrequencyReflector(16), torch.randn(4, 16, 6, 6)
    with torch.no_grad():
        layer.kernel.copy_(torch.einsum("cnyx,nm->cmyx", layer.kernel, mixed))
        torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


def test_the_bricks_are_those_of_the_chapter():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 6)
    pairs = {
        "FrequencyReflector": (bricks.FrequencyReflector(16), BRICKS["FrequencyReflector"](16)),
        "ShiftBlock": (bricks.ShiftBlock(16, 6), BRICKS["ShiftBlock"](16, 6)),
        "Shift": (bricks.Shift(), BRICKS["Shift"]()),
        "HalfAbs": (bricks.HalfAbs(), BRICKS["HalfAbs"]()),
    }
    for ours, chapter in pairs.values():
        chapter.load_state_dict(ours.state_dict(), strict=False)  # the chapter's reflector has no bias
        torch.testing.assert_close(ours(x), chapter(x))
    raw = torch.randn(5, 9)
    torch.testing.assert_close(bricks.BlockReflector()(raw), BRICKS["BlockReflector"]()(raw))


def test_no_width_comes_nearer_to_a_number_of_parameters():
    counts = {width: parameters(classifier("reflector", width)) for width in range(8, 21, 2)}
    for budget in (0, 40_000, 60_000, 81_234):
        width = width_for("reflector", budget)
        assert abs(counts[width] - budget) == min(abs(count - budget) for count in counts.values())


@pytest.mark.parametrize("brick, width", [("tanh", 8), ("aol", 9), ("aol", 6)])
def test_a_network_that_there_is_not_says_what_there_is(brick, width):
    with pytest.raises(ValueError, match="take one of orthogonal, .* 8, 10, 12 or more"):
        classifier(brick, width)

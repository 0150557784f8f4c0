"""Networks of seven kinds of brick: each is 1-Lipschitz, and the bricks are the cells of the chapter `frontier`."""

from pathlib import Path

import jupytext
import pytest
import torch
from torch import nn

from lipguide import lipschitz_bound
from lipguide.layers.export import without_parametrizations
from lipguide.losses import OffsetCrossEntropy
from lipguide.tasks.classification import bricks
from lipguide.tasks.classification.bricks import FAMILIES, classifier, parameters, width_for
from lipguide.training import Supervised, fit

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "frontier.md"
SIDE = 16


def stretched(brick, rate):
    """A small network after a few steps, at a rate at which nobody would train."""
    torch.manual_seed(0)
    model = classifier(brick, 8, pixels=SIDE)
    data = torch.rand(64, 3, SIDE, SIDE), torch.randint(10, (64,))
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    fit(model, data, Supervised(OffsetCrossEntropy(2.0)), sgd, steps=4, batch_size=32, schedule="constant")
    return without_parametrizations(model.eval())


@pytest.mark.parametrize("brick", FAMILIES)
@pytest.mark.parametrize("rate", [0.0, 3.0], ids=["at first", "after steps at a rate of 3"])
def test_every_network_is_1_lipschitz_by_its_bound_and_by_its_true_jacobian(brick, rate):
    model = stretched(brick, rate)
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


def cells():
    """The classes that the chapter defines, by their names."""
    notebook = jupytext.read(CHAPTER)
    names: dict = {}
    wanted = ("class BlockReflector", "class FrequencyReflector", "class Shift(", "class HalfAbs", "def lipschitz(self")
    for cell in notebook.cells:
        if cell.cell_type == "code" and any(what in cell.source for what in wanted):
            exec(compile(cell.source, str(CHAPTER), "exec"), names)
    return names


def test_the_bricks_are_those_of_the_chapter():
    theirs = cells()
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 6)
    pairs = {
        "FrequencyReflector": (bricks.FrequencyReflector(16), theirs["FrequencyReflector"](16)),
        "ShiftBlock": (bricks.ShiftBlock(16, 6), theirs["ShiftBlock"](16, 6)),
        "Shift": (bricks.Shift(), theirs["Shift"]()),
        "HalfAbs": (bricks.HalfAbs(), theirs["HalfAbs"]()),
    }
    for ours, chapter in pairs.values():
        chapter.load_state_dict(ours.state_dict(), strict=False)  # the chapter's reflector has no bias
        torch.testing.assert_close(ours(x), chapter(x))
    raw = torch.randn(5, 9)
    torch.testing.assert_close(bricks.BlockReflector()(raw), theirs["BlockReflector"]()(raw))


@pytest.mark.parametrize("brick", ["aol", "reflector"])
def test_no_width_comes_nearer_to_a_number_of_parameters(brick):
    counts = {width: parameters(classifier(brick, width)) for width in range(8, 31, 2)}
    for budget in (0, 70_000, 100_000, 111_111, 150_000):
        assert abs(counts[width_for(brick, budget)] - budget) == min(abs(count - budget) for count in counts.values())


@pytest.mark.parametrize("brick, width", [("tanh", 8), ("aol", 9), ("aol", 6)])
def test_a_network_that_there_is_not_says_what_there_is(brick, width):
    with pytest.raises(ValueError, match="take one of orthogonal, .* 8, 10, 12 or more"):
        classifier(brick, width)

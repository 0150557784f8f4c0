"""The seven variants of the fully 1-Lipschitz Tinier SSD: their bounds, and what each of them changes."""

import pytest
import torch
from torch import nn

from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.activations import GroupSort2
from lipguide.layers.export import without_parametrizations
from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.layers.sll import SLL
from lipguide.tasks.detection.configurations import spectral_norm
from lipguide.tasks.detection.losses import Multibox
from lipguide.tasks.detection.sure import rates
from lipguide.tasks.detection.tinier_ssd import TinierSSD
from lipguide.tasks.detection.unlearnt import CHANGES, unlearnt
from tests.oracles import jacobian_norm

PICTURE = (3, 74, 74)
SMALL = (3, 32, 32)  # to learn on


def moved(change, monkeypatch):
    """A short and narrow network that has left its start, plain: three steps uphill."""
    torch.manual_seed(0)
    narrow = (8, "2", 8, "3"), ("2",), ("3",), ("2",)
    monkeypatch.setattr("lipguide.tasks.detection.unlearnt.STAGES", narrow)
    model = unlearnt(change, tau=20.0, offset=0.1, width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(part.square().mean() for part in model(torch.rand(2, *SMALL))).neg().backward()
        optimizer.step()
    return without_parametrizations(model.eval())


@pytest.mark.parametrize("change", CHANGES)
def test_no_jacobian_is_larger_than_the_bounds(change, monkeypatch):
    """In float64, at a random picture: the Jacobian of all outputs against the bound, and that of the 15 numbers of
    one prior, row by row, against its rates."""
    model = moved(change, monkeypatch).double()
    x = torch.rand(1, *PICTURE, dtype=torch.float64, requires_grad=True)
    bound = lipschitz_bound(model, PICTURE)
    reached = jacobian_norm(lambda picture: torch.cat([part.flatten() for part in model(picture)]), x)
    assert 0 < reached <= bound.value * (1 + 1e-9)
    whole = change not in ("unit-rows", "together")
    assert (bound.heads["logits"] <= 2 + 1e-4) == whole  # one unit for each of the four maps
    found, output = rates(model), model(x)
    for prior in (4 * (18 * 9 + 9) + 2, 1684 + 4 * 3):  # of the finest map and of the coarsest
        numbers = torch.cat([output.logits[0, prior], output.offsets[0, prior]])
        rows = torch.stack([torch.autograd.grad(n, x, retain_graph=True)[0].flatten() for n in numbers])
        gaps = torch.cdist(rows[:11], rows[:11], compute_mode="donot_use_mm_for_euclid_dist")
        assert (gaps <= found.gaps[prior] * (1 + 1e-9)).all()
        assert 0 < torch.linalg.matrix_norm(rows[11:], 2) <= found.offsets[prior] * (1 + 1e-9)


def kinds(model, part=nn.Module):
    return [type(m) for m in model.modules() if isinstance(m, part)]


def test_each_network_differs_from_the_first_in_one_thing():
    first = unlearnt("spectral-norm", tau=20.0, offset=0.1)
    torch.manual_seed(0)
    theirs = spectral_norm().state_dict()
    torch.manual_seed(0)
    ours = unlearnt("spectral-norm").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    made = {change: unlearnt(change, tau=20.0, offset=0.1) for change in CHANGES}
    assert {c for c, m in made.items() if (m.tau, m.offset) != (1, 0)} == {"temperature", "together"}
    assert {c for c, m in made.items() if kinds(m, ScaledL2NormPool2d)} == {"pooling", "together"}
    assert {c for c, m in made.items() if kinds(m, SLL)} == {"sll"}
    assert len(kinds(first, GroupSort2)) == 12 and not kinds(first, nn.ReLU)
    heads = {c: kinds(m.class_heads[0].parametrizations.weight)[-1].__name__ for c, m in made.items()}
    assert {c for c, kind in heads.items() if kind == "UnitRows"} == {"unit-rows", "together"}
    assert {c for c, kind in heads.items() if kind == "OrthogonalKernel"} == {"orthogonal"}


def test_temperature_and_margin_are_in_the_loss_and_the_temperature_is_in_the_scores():
    model = unlearnt("temperature", tau=20.0, offset=0.1)
    plain = unlearnt("temperature")
    assert isinstance(model, TinierSSD) and isinstance(plain.training_loss().per_prior, nn.CrossEntropyLoss)
    logits, right = torch.randn(2, 1700, 11), torch.randint(11, (2, 1700))
    per_prior = model.training_loss().per_prior(logits.mT, right)
    shifted = logits - 0.1 * nn.functional.one_hot(right, 11)
    wanted = nn.functional.cross_entropy((20 * shifted).mT, right, reduction="none") / 20
    torch.testing.assert_close(per_prior, wanted)
    scores = model.log_scores((logits, None)).exp()
    torch.testing.assert_close(scores, (20 * logits).softmax(2)[..., :-1])
    assert isinstance(model.training_loss("none"), Multibox) and model.training_loss("none").reduction == "none"


def test_an_unknown_change_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="no change 'magic'; there are: spectral-norm, sll"):
        unlearnt("magic")

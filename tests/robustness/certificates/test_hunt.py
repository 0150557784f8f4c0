"""The hunt: a right radius stands, and a planted wrong one is caught."""

import sys

import pytest
import torch
from torch import nn

import lipguide as lip
from lipguide.robustness.certificates import hunt, radius
from tests.robustness.common import generator, lipschitz_network

module = sys.modules[hunt.__module__]
MODEL = lipschitz_network(3)
X = torch.rand(40, 3, 2, 2, generator=generator(1), dtype=torch.float64)
Y = MODEL(X).argmax(1)


def test_right_radii_stand_and_the_same_attack_succeeds_outside():
    found = hunt(MODEL, X, Y, radius(MODEL(X), Y, 1.0, MODEL[-1].weight), batch_size=16)
    assert found.hunted == len(X) and found.broken == [] and found.outside > 0


def test_a_wrong_radius_is_caught_where_it_was_planted():
    radii = radius(MODEL(X), Y, 1.0, MODEL[-1].weight)
    planted = [3, 17, 31]
    radii[planted] = 1.0  # further than the nearest other class
    assert hunt(MODEL, X, Y, radii, batch_size=16).broken == planted


def test_radii_that_take_a_constant_for_smaller_than_it_is_are_caught():
    assert hunt(MODEL, X, Y, radius(MODEL(X), Y, 0.5, MODEL[-1].weight)).broken


def test_pictures_without_a_certificate_are_left_alone():
    radii = torch.zeros(len(X))
    assert hunt(MODEL, X, Y, radii).hunted == 0
    radii[5] = 1e-3
    assert hunt(MODEL, X, Y, radii).hunted == 1


def test_a_float32_model_is_hunted_in_float64_and_left_as_it_was():
    small = lipschitz_network(3).float()
    y = small(X.float()).argmax(1)
    radii = radius(small.double()(X.float().double()), y, 1.0, small[-1].weight)
    found = hunt(small.float(), X.float(), y, radii)
    assert found.broken == [] and small[1].weight.dtype == torch.float32


def test_what_cannot_be_hunted_is_named():
    with pytest.raises(ValueError, match="one radius a picture"):
        hunt(MODEL, X, Y, torch.ones(3))
    with pytest.raises(ValueError, match="training mode"):
        hunt(nn.Sequential(MODEL, nn.Dropout()), X, Y, torch.ones(len(X)))
    with pytest.raises(ValueError, match="a radius was NaN"):
        hunt(MODEL, X, Y, torch.full((len(X),), torch.nan))
    with pytest.raises(ValueError, match="batch_size is 0"):
        hunt(MODEL, X, Y, torch.ones(len(X)), batch_size=0)


def test_the_network_that_is_hunted_has_the_very_weights_of_the_one_that_was_certified(monkeypatch):
    """Constraints that computed anew in float64 would give others: SLL leaves room for the rounding of float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), lip.SLLLinear(12, 12), lip.unit_rows(nn.Linear(12, 3))).eval()
    with torch.no_grad():
        weights = [part.weight.double() for part in model[1:]]
    hunted = []
    monkeypatch.setattr(module, "pgd_l2", lambda model, x, *rest, **options: hunted.append(model) or x)
    hunt(model, X[:2, :, :, :], Y[:2], torch.ones(2))
    assert all(map(torch.equal, weights, (part.weight for part in hunted[0][1:])))

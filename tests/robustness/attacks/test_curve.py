"""Robust accuracy and the least norm: exact answers, peers, and nothing that fails in silence."""

import math

import pytest
import torch
from torch import Tensor, nn

from lipguide.robustness.attacks import least_norm_l2, pgd_l2, pgd_linf, robust_accuracy_curve
from tests.robustness.attacks.problems import ALL, accuracy, adv_lib_attacks, length
from tests.robustness.common import WHOLE, linear


def test_least_norm_of_a_linear_model_is_its_distance():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, generator=generator)
    model = linear(weight)
    x = 0.5 + 0.02 * torch.randn(20, 1, 4, 4, generator=generator)
    logits = model(x)
    y = logits.argmax(1)
    exact = ((logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight).norm(dim=2)).nan_to_num(math.inf)
    moved, found = least_norm_l2(model, x, y, max_eps=0.5)
    assert (model(moved).argmax(1) != y).all()
    torch.testing.assert_close(length(moved.double() - x.double()), found)
    assert (found >= exact.amin(1) * (1 - 1e-4)).all() and (found <= exact.amin(1) * 1.02 + 1e-3).all()


def test_least_norm_is_zero_for_the_misclassified_and_infinite_where_nothing_is_found(models, test_set):
    x, y = test_set
    model = models["ordinary"]
    moved, found = least_norm_l2(model, x, y, max_eps=0.2, steps=10, halvings=3)
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
        assert (model(moved).argmax(1) != y).eq(found.isfinite()).all()
    assert (found[wrong] == 0).all() and (found[~wrong] > 0).all()
    assert torch.equal(moved[found.isinf()], x[found.isinf()]) and found.isinf().any()


def test_least_norm_is_as_small_as_that_of_adv_libs_ddn(models, test_set):
    ddn = adv_lib_attacks().ddn
    (x, y), model = (test_set[0][:100], test_set[1][:100]), models["ordinary"]
    _, ours = least_norm_l2(model, x, y, max_eps=2.0)
    theirs = length(ddn(model, x, y, steps=300, levels=None) - x)
    assert ours.isfinite().all()
    assert ours.mean() <= 1.01 * theirs.mean()


@pytest.mark.parametrize("name", ALL)
def test_curve_starts_at_the_clean_accuracy_never_rises_and_keeps_the_callers_order(name, models, test_set):
    (x, y), model = test_set, models["ordinary"]
    strengths = [0.0, 0.1, 0.3, 0.6, 1.0]
    options = {"steps": 3} if name.startswith("pgd") else {}
    curve = robust_accuracy_curve(model, x, y, strengths, attack=ALL[name], **options)
    assert curve[0].item() == pytest.approx(accuracy(model, x, y))
    assert (curve.diff() <= 0).all() and curve[-1] < curve[0]
    mixed = [3, 0, 4, 2, 1]
    again = robust_accuracy_curve(model, x, y, [strengths[i] for i in mixed], attack=ALL[name], **options)
    assert torch.equal(again, curve[mixed])


def test_curve_of_a_linear_model_is_the_share_of_samples_beyond_the_distance():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, generator=generator)
    model = linear(weight)
    x = 0.5 + 0.05 * torch.randn(64, 1, 4, 4, generator=generator)
    y = model(x).argmax(1)
    distance = ((model(x)[:, 0] - model(x)[:, 1]).abs() / (weight[0] - weight[1]).norm()).detach()
    epsilons = [0.01, 0.02, 0.05, 0.1]
    expected = torch.tensor([(distance > e).double().mean() for e in epsilons])
    curve = robust_accuracy_curve(model, x, y, epsilons, batch_size=10)
    assert ((curve - expected).abs() <= 1 / 64).all()


@pytest.mark.parametrize("name", ["pgd_l2", "pgd_linf"])
def test_batches_do_not_matter(name, models, test_set):
    (x, y), model = (test_set[0][:60], test_set[1][:60]), models["1-Lipschitz"]
    curves = [robust_accuracy_curve(model, x, y, [0.1, 0.3], ALL[name], size, steps=5) for size in (7, 60, 500)]
    assert torch.equal(curves[0], curves[1]) and torch.equal(curves[1], curves[2])


def test_the_curve_does_not_ask_the_model_about_nobody():
    """Once no sample stands, the rest of the curve is zero without another call."""

    class Picky(nn.Module):
        def forward(self, x):
            assert len(x), "called with an empty batch"
            return x.flatten(1)[:, :2] * torch.tensor([1.0, 0.0]) - torch.tensor([0.1, 0.0])

    x = torch.full((4, 1, 2, 2), 0.5)
    labels = torch.zeros(4, dtype=torch.long)
    curve = robust_accuracy_curve(Picky().eval(), x, labels, [0.0, 1.0, 2.0], steps=5)
    assert curve[0] == 1 and curve[1] == curve[2] == 0


def test_wrong_input_is_named(models, test_set):
    (x, y), model = (test_set[0][:3], test_set[1][:3]), models["ordinary"]
    with pytest.raises(ValueError, match="no samples"):
        robust_accuracy_curve(model, x[:0], y[:0], [0.1])
    with pytest.raises(ValueError, match="list of numbers"):
        robust_accuracy_curve(model, x, y, 0.1)
    with pytest.raises(ValueError, match="the model .* is in training mode"):
        robust_accuracy_curve(nn.Sequential(model, nn.Dropout()), x, y, [0.1])
    with pytest.raises(ValueError, match="batch_size is 0: give it a whole number"):
        robust_accuracy_curve(model, x, y, [0.1], batch_size=0)
    with pytest.raises(ValueError, match="halvings is -1: give it a whole number"):
        least_norm_l2(model, x, y, 1.0, halvings=-1)
    with pytest.raises(ValueError, match="max_eps must be 0 or more"):
        least_norm_l2(model, x, y, math.nan)
    for labels in (torch.full((3,), 5), torch.full((3,), 156, dtype=torch.uint8), torch.full((3,), -100)):
        with pytest.raises(ValueError, match=r"a label lies outside 0\.\.4"):
            robust_accuracy_curve(model, x, labels, [0.0])


class SometimesNaN(nn.Module):
    """A classifier that answers NaN to pictures lighter than most."""

    def __init__(self, model: nn.Module, above: float) -> None:
        super().__init__()
        self.model, self.above = model, above

    def forward(self, x: Tensor) -> Tensor:
        lightness = x.flatten(1).mean(1, keepdim=True)
        return torch.where(lightness > self.above, math.nan, self.model(x))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_network_that_answers_nan_has_no_accuracy(name, strength, models, test_set):
    """Its argmax is class 0, so that pictures of class 0 would all pass for right."""
    x, y = test_set[0][:6], torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match="was NaN for 6 of 6"):
        robust_accuracy_curve(SometimesNaN(models["ordinary"], -1.0).eval(), x, y, [strength], ALL[name])
    with pytest.raises(ValueError, match="NaN"):
        least_norm_l2(SometimesNaN(models["ordinary"], -1.0).eval(), x, y, 0.1)


@pytest.mark.parametrize("dtype", WHOLE)
def test_labels_of_any_whole_type_give_the_same_curve(dtype, models, test_set):
    (x, y), model = (test_set[0][:20], test_set[1][:20]), models["1-Lipschitz"]
    expected = robust_accuracy_curve(model, x, y, [0.0, 0.3], steps=3, restarts=2)
    assert torch.equal(robust_accuracy_curve(model, x, y.to(dtype), [0.0, 0.3], steps=3, restarts=2), expected)


@pytest.mark.parametrize("eps", [1e20, 1e200, math.inf])
def test_a_ball_larger_than_the_box_is_the_box(eps):
    model = linear(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
    x, y = torch.tensor([0.9, 0.9, 0.1, 0.1]).reshape(1, 1, 2, 2), torch.tensor([0])
    for attack in (pgd_l2, pgd_linf):
        assert robust_accuracy_curve(model, x, y, [0.0, eps], attack).tolist() == [1.0, 0.0]
    _, distance = least_norm_l2(model, x, y, eps)
    assert distance.item() == pytest.approx(0.8, rel=0.02)

"""Losses of several logits an entry: the field's published numbers, deel-torchlip, and the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide import lipschitz_bound, losses
from tests.losses.cases import (
    LABELS,
    LOGITS,
    TWO_LABELS,
    TWO_LOGITS,
    random_batch,
    value,
)


def test_multiclass_losses_give_the_published_values():
    assert value(losses.MulticlassKR(), LOGITS, LABELS) == pytest.approx(761 / 1800, abs=1e-6)
    assert value(losses.MulticlassHKR(5, 2), LOGITS, LABELS) / 6 == pytest.approx(0.8925, abs=1e-6)
    assert value(losses.MulticlassLseHKR(5, 0.2), LOGITS, LABELS) / 6 == pytest.approx(1.0231503, abs=1e-6)
    soft = losses.MulticlassSoftHKR(5, 0.2)
    assert value(soft, LOGITS, LABELS) / 6 == pytest.approx(0.908135, abs=1e-6)
    assert value(soft, LOGITS, LABELS) / 6 == pytest.approx(0.902872, abs=1e-6)  # the running mean has moved


@pytest.mark.parametrize(
    "offset, expected",
    [
        (2 * math.sqrt(2) * 36 / 255, 0.0127094),
        (math.sqrt(2) * 36 / 255, 0.00586715),
        (math.sqrt(2), 0.267926),
        (2.12132, 0.774760),
    ],
)
def test_offset_cross_entropy_gives_the_published_values(offset, expected):
    assert value(losses.OffsetCrossEntropy(offset), TWO_LOGITS, TWO_LABELS) == pytest.approx(expected, rel=2e-6)


def test_offset_cross_entropy_of_uniform_logits_is_the_entropy_times_the_temperature():
    uniform = torch.full((3, 10), 7.0)
    loss = losses.OffsetCrossEntropy(offset=0.0)
    assert value(loss, uniform, torch.tensor([0, 4, 9])) == pytest.approx(math.log(10) / 4, abs=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(3, 7),
    copies=st.integers(1, 4),
    alpha=st.floats(0.0, 0.99),
)
def test_multiclass_losses_equal_those_of_torchlip(seed, classes, copies, alpha):
    torchlip = pytest.importorskip("deel.torchlip")
    logits, labels = random_batch(seed, classes * copies, classes)
    one_hot = F.one_hot(labels, classes).double()
    ours = alpha / (1 - alpha)
    scale = 1 / (1 + ours)
    margin = 0.6
    pairs = [
        (losses.MulticlassKR(), torchlip.KRMulticlassLoss(), 1),
        (losses.MulticlassHinge(margin), torchlip.HingeMulticlassLoss(margin), 1),
        (losses.MulticlassHKR(ours, margin), torchlip.HKRMulticlassLoss(alpha, margin), scale),
        (losses.MulticlassSoftHKR(ours, margin), torchlip.SoftHKRMulticlassLoss(alpha, margin), scale),
        (
            losses.MulticlassLseHKR(ours, margin),
            torchlip.LseHKRMulticlassLoss(alpha, min_margin=margin),
            scale,
        ),
        (losses.CategoricalHinge(margin), torchlip.CategoricalHingeLoss(margin), 1),
        (losses.TauCrossEntropy(4.0), torchlip.TauCrossEntropyLoss(4.0), 1),
    ]
    for mine, theirs, factor in pairs:
        for reduction in ("mean", "sum", "none"):  # SoftHKR's running means march in step
            mine.reduction = theirs.reduction = reduction
            torch.testing.assert_close(
                mine(logits, labels) * factor, theirs(logits, one_hot).to(logits.dtype), atol=1e-6, rtol=1e-6
            )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), margin=st.floats(0.1, 3))
def test_multi_margin_equals_torchs(seed, classes, margin):
    logits, labels = random_batch(seed, 9, classes)
    torch.testing.assert_close(
        losses.MultiMargin(margin)(logits, labels), F.multi_margin_loss(logits, labels, margin=margin)
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), offset=st.floats(0, 3), temperature=st.floats(0.1, 2))
def test_offset_and_annealing_follow_their_papers_formulas(seed, offset, temperature):
    """Straight transcriptions, with a loop over the samples, of the two definitions."""
    logits, labels = random_batch(seed, 6, 4)
    plain, annealed = [], []
    for z, y in zip(logits, labels, strict=True):
        shifted = z.clone()
        shifted[y] -= offset
        p = torch.softmax(shifted / temperature, 0)[y]
        plain.append(-temperature * p.log())
        annealed.append(-temperature * (1 - p) ** 5 * p.log())
    torch.testing.assert_close(
        losses.OffsetCrossEntropy(offset, temperature)(logits, labels), torch.stack(plain).mean()
    )
    torch.testing.assert_close(losses.LogitAnnealing(offset, temperature)(logits, labels), torch.stack(annealed).mean())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), epsilon=st.floats(0.05, 2), lipschitz=st.floats(0.5, 2))
def test_emma_follows_its_papers_formula(seed, epsilon, lipschitz):
    logits, labels = random_batch(seed, 6, 4)
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        pushed = z.clone()
        for j in range(4):
            reach = lipschitz * (rows[y] - rows[j]).norm()
            if j != y:
                pushed[j] += epsilon * ((z[y] - z[j]) / (epsilon * reach)).clamp(0.01, 1) * reach
        total += -torch.log_softmax(pushed, 0)[y] / 6
    torch.testing.assert_close(losses.EMMA(epsilon, lipschitz)(logits, labels, rows), total)


def test_emma_pushes_an_easy_class_no_further_than_the_boundary_and_keeps_its_gradient():
    """At the boundary both classes have probability 1/2; a push that carried gradient would cancel it to 0."""
    logits = torch.tensor([[3.0, 0.0]], requires_grad=True)
    far = losses.EMMA(epsilon=100.0)(logits, torch.tensor([0]))
    far.backward()
    assert far.item() == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.5]]))


def test_focal_loss_without_focus_is_the_cross_entropy_and_its_gradient_is_finite_at_certainty():
    assert value(losses.TauFocal(3.0, gamma=0), LOGITS, LABELS) == value(losses.TauCrossEntropy(3.0), LOGITS, LABELS)
    for gamma in (0.0, 1.0, 2.0):
        logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
        losses.TauFocal(10.0, gamma)(logits, torch.tensor([0])).backward()
        assert logits.grad.isfinite().all()


def test_cosine_similarity_ignores_the_scale_and_stays_finite_at_zero():
    loss = losses.CosineSimilarity()
    torch.testing.assert_close(loss(LOGITS, LABELS), loss(10 * LOGITS, LABELS))
    zero = torch.zeros(1, 3, requires_grad=True)
    out = loss(zero, torch.tensor([0]))
    out.backward()
    assert out.item() == 0 and zero.grad.isfinite().all()


def test_running_mean_is_saved_and_restored():
    loss = losses.MulticlassSoftHKR(5, 0.2)
    for _ in range(3):
        loss(5 * LOGITS, LABELS)
    copy = losses.MulticlassSoftHKR(5, 0.2)
    copy.load_state_dict(loss.state_dict())
    assert value(copy, LOGITS, LABELS) == value(loss, LOGITS, LABELS)


def test_evaluation_leaves_the_running_mean_alone():
    loss = losses.MulticlassSoftHKR(5, 0.2)
    before = loss.mean.clone()
    with torch.no_grad():
        loss(100 * LOGITS, LABELS)
    loss.eval()(100 * LOGITS, LABELS)
    loss.train()(LOGITS, torch.full((6,), -100))
    assert torch.equal(loss.mean, before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), power=st.integers(-30, 30))
def test_emma_is_a_number_for_rows_of_any_size_and_scales_with_them(seed, power):
    """Logits and rows times a factor: the loss of the scaled head, computed in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0**power * torch.randn(4, 6, generator=generator)
    logits = torch.randn(5, 4, generator=generator) * 10.0**power
    labels = torch.randint(4, (5,), generator=generator)
    rows.requires_grad_()
    loss = losses.EMMA(0.3)(logits, labels, rows)
    (gradient,) = torch.autograd.grad(loss, rows)
    exact = losses.EMMA(0.3)(logits.double(), labels, rows.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-6)
    assert gradient.isfinite().all()


def test_emma_refuses_rows_of_another_head_and_takes_a_bound_as_it_is():
    with pytest.raises(ValueError, match="one row for each of 3 classes"):
        losses.EMMA(0.3)(TWO_LOGITS, TWO_LABELS, torch.randn(4, 6))
    bound = lipschitz_bound(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), (4,))
    assert losses.EMMA(0.3, bound)(TWO_LOGITS, TWO_LABELS) == losses.EMMA(0.3, bound.value)(TWO_LOGITS, TWO_LABELS)

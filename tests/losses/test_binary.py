"""Losses of one logit an entry: the field's published numbers, deel-torchlip, and labels of every kind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipguide import losses
from tests.losses.cases import (
    BINARY,
    F_BINARY,
    LABELS,
    LOGITS,
    Y_BINARY,
    every_binary,
    random_batch,
    value,
)
from tests.robustness.common import UNSIGNED, WHOLE


def test_binary_losses_give_the_published_values():
    assert value(losses.KR(), F_BINARY, Y_BINARY) == pytest.approx(1, abs=1e-6)
    assert value(losses.HingeMargin(2), F_BINARY, Y_BINARY) == pytest.approx(2 / 3, abs=1e-6)
    # the published figure is of a*hinge - (1-a)*KR with a = 1/2, i.e. alpha = 1 divided by 1 + alpha
    assert value(losses.HKR(1, 2), F_BINARY, Y_BINARY) / 2 == pytest.approx(-1 / 6, abs=1e-6)
    assert value(losses.TauBCEWithLogits(2), F_BINARY, Y_BINARY) == pytest.approx(0.279185, abs=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 20), alpha=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_binary_losses_equal_those_of_torchlip(seed, n, alpha):
    torchlip = pytest.importorskip("deel.torchlip")
    f, labels = random_batch(seed, n, 2)
    f, y = f[:, :1], labels[:, None]
    ours = math.inf if alpha == 1 else alpha / (1 - alpha)
    scale = 1 if alpha == 1 else 1 / (1 + ours)
    pairs = [
        (losses.KR(), torchlip.KRLoss(), 1),
        (losses.HingeMargin(0.8), torchlip.HingeMarginLoss(0.8), 1),
        (losses.HKR(ours, 0.8), torchlip.HKRLoss(alpha, 0.8), scale),
        (losses.TauBCEWithLogits(3.0), torchlip.TauBCEWithLogitsLoss(3.0), 1),
    ]
    for mine, theirs, factor in pairs:
        for reduction in ("mean", "sum", "none"):
            mine.reduction = theirs.reduction = reduction
            torch.testing.assert_close(
                mine(f, y).flatten() * factor, theirs(f, y.to(f.dtype)).flatten(), atol=1e-6, rtol=1e-6
            )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 50))
def test_hkr_is_alpha_times_the_hinge_minus_kr(seed, alpha):
    logits, labels = random_batch(seed, 12, 4)
    expected = alpha * losses.MulticlassHinge(0.7)(logits, labels) - losses.MulticlassKR()(logits, labels)
    torch.testing.assert_close(losses.MulticlassHKR(alpha, 0.7)(logits, labels), expected)
    f, y = logits[:, 0], labels % 2
    expected = alpha * losses.HingeMargin(0.7)(f, y) - losses.KR()(f, y)
    torch.testing.assert_close(losses.HKR(alpha, 0.7)(f, y), expected)


def test_infinite_alpha_is_the_hinge_alone():
    assert value(losses.HKR(math.inf, 2), F_BINARY, Y_BINARY) == value(losses.HingeMargin(2), F_BINARY, Y_BINARY)
    hinge = losses.MulticlassHinge(2)
    assert value(losses.MulticlassHKR(math.inf, 2), LOGITS, LABELS) == value(hinge, LOGITS, LABELS)


@every_binary
def test_empty_binary_batch_gives_zero(name):
    f = torch.zeros(0, requires_grad=True)
    loss = BINARY[name](f, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0


def test_kr_of_a_batch_of_one_class_is_zero_with_zero_gradient():
    logits = LOGITS.clone().requires_grad_()
    losses.MulticlassKR()(logits, torch.zeros(6, dtype=torch.long)).backward()
    assert (logits.grad == 0).all()
    assert value(losses.KR(), F_BINARY, torch.ones(6)) == 0


@every_binary
def test_binary_labels_may_be_signs_bits_or_booleans_and_logits_may_have_a_channel(name):
    loss = BINARY[name]
    expected = loss(F_BINARY, Y_BINARY)
    for target in (Y_BINARY.float(), 2 * Y_BINARY - 1, Y_BINARY.bool()):
        assert loss(F_BINARY, target) == expected
        assert loss(F_BINARY[:, None], target) == expected
        assert loss(F_BINARY[:, None], target[:, None]) == expected


@pytest.mark.parametrize("wrong", [2, -3, 0.5, float("nan")])
@every_binary
def test_binary_label_of_another_value_is_named(name, wrong):
    with pytest.raises(ValueError, match="binary label"):
        BINARY[name](F_BINARY, torch.tensor([0, 0, 0, 1, 1, wrong]))


def test_binary_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        losses.KR()(torch.zeros(4, 1), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="same shape"):
        losses.KR()(torch.zeros(4), torch.zeros(4, 1))


@every_binary
@pytest.mark.parametrize("dtype", WHOLE)
def test_a_binary_label_is_the_same_in_every_whole_type_and_255_is_none(name, dtype):
    loss = BINARY[name]
    assert loss(F_BINARY, Y_BINARY.to(dtype)) == loss(F_BINARY, Y_BINARY)
    wrong = torch.tensor([1, 0, -1, 0, 1, 1]).to(dtype)
    if dtype in UNSIGNED:
        with pytest.raises(ValueError, match="a binary label must be 0 or 1"):
            loss(F_BINARY, wrong)
    else:
        assert loss(F_BINARY, wrong) == loss(F_BINARY, torch.tensor([1, 0, 0, 0, 1, 1]))

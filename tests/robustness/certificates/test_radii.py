"""The radius: published values, pair by pair, and no attack inside it."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipguide import lipschitz_bound
from lipguide.robustness.certificates import (
    certified_accuracy,
    radius,
)
from tests.robustness.common import WHOLE, generator, lipschitz_network

SQRT2 = math.sqrt(2)
seeds = st.integers(0, 10**6)


def test_radii_are_the_published_ones():
    logits = torch.tensor([[2, 0.2, -0.5], [0, 1, -0.5]])
    torch.testing.assert_close(radius(logits, torch.tensor([0, 1])), torch.tensor([1.272792, 0.707107]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=seeds, classes=st.integers(2, 6), lipschitz=st.floats(0.1, 10), known_rows=st.booleans())
def test_radius_is_the_smallest_of_the_pairwise_quotients(seed, classes, lipschitz, known_rows):
    """Pair by pair in Python, the definition; the result never exceeds it."""
    g = generator(seed)
    logits = torch.randn(5, classes, generator=g)
    labels = torch.randint(classes, (5,), generator=g)
    rows = torch.randn(classes, 3, generator=g) if known_rows else None
    result = radius(logits, labels, lipschitz, rows)
    for z, y, r in zip(logits.double(), labels, result, strict=True):
        distances = [(rows[y].double() - rows[j].double()).norm() if known_rows else SQRT2 for j in range(classes)]
        expected = min((z[y] - z[j]) / (lipschitz * distances[j]) for j in range(classes) if j != y)
        assert r.item() <= expected
        assert r.item() == pytest.approx(float(expected), rel=3e-7)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=seeds)
def test_radius_of_a_map_is_that_of_its_pixels_and_labels_default_to_the_prediction(seed):
    logits = torch.randn(2, 3, 4, 5, generator=generator(seed))
    labels = torch.randint(3, (2, 4, 5), generator=generator(seed))
    as_list = radius(logits.movedim(1, -1).reshape(-1, 3), labels.reshape(-1))
    assert torch.equal(radius(logits, labels).reshape(-1), as_list)
    assert torch.equal(radius(logits), radius(logits, logits.argmax(1)))
    assert (radius(logits) >= 0).all()
    wrong = logits.argmax(1) != labels
    assert (radius(logits, labels)[wrong] <= 0).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=seeds)
def test_radius_of_a_linear_classifier_is_the_distance_to_its_boundary(seed):
    """With the rows known the certificate is exact: the point at that distance is on the boundary."""
    g = generator(seed)
    weight, x = torch.randn(4, 6, generator=g).double(), torch.randn(1, 6, generator=g).double()
    logits = x @ weight.T
    y, r = logits.argmax(1), radius(logits, rows=weight)
    gaps = [(logits[0, y] - logits[0, j]) / (weight[y] - weight[j]).norm() for j in range(4) if j != y]
    j = [j for j in range(4) if j != y][int(torch.stack(gaps).argmin())]
    step = weight[j] - weight[y]
    moved = x + r * step / step.norm()
    top, other = (moved @ weight.T)[0, y], (moved @ weight.T)[0, j]
    torch.testing.assert_close(top.squeeze(), other, atol=1e-9, rtol=0)
    assert top >= other


def test_two_classes_with_the_same_row_can_never_swap():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert radius(torch.tensor([[1.0, 0.5]]), rows=rows).item() > 1e30
    assert radius(torch.tensor([[0.5, 0.5]]), rows=rows).item() == 0
    assert radius(torch.tensor([[0.5, 1.0]]), torch.tensor([0]), rows=rows).item() < 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=seeds, lipschitz=st.floats(0.3, 3))
def test_float32_radius_never_exceeds_the_exact_one(seed, lipschitz):
    logits = torch.randn(50, 3, generator=generator(seed))
    labels = logits.argmax(1)
    assert (radius(logits, labels, lipschitz).double() <= radius(logits.double(), labels, lipschitz)).all()


def test_certified_accuracy_counts_the_radii_above_epsilon():
    logits = torch.tensor([[1.0, 0, 0], [0.1, 0, 0], [0, 0, 1], [0, 0, 0.1]])
    labels = torch.tensor([0, 0, 1, 1])
    assert certified_accuracy(logits, labels, 0.25).item() == 0.25
    assert certified_accuracy(logits, labels, [0.0, 0.05, 0.25, 1.0]).tolist() == [0.5, 0.5, 0.25, 0.0]
    assert certified_accuracy(logits, labels, 0.25, lipschitz=4.0).item() == 0.0
    exactly_at_the_radius = torch.tensor([[SQRT2, 0.0]], dtype=torch.float64)
    assert certified_accuracy(exactly_at_the_radius, torch.tensor([0]), 1.0).item() == 0.0


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=seeds)
def test_no_gradient_attack_breaks_a_certified_sample(seed):
    """Steepest descent on every pair's gap, 100 steps inside the certified ball of a tight network."""
    model = lipschitz_network(seed)
    x = torch.rand(16, 3, 2, 2, generator=generator(seed)).double()
    logits = model(x)
    labels, r = logits.argmax(1), radius(logits).reshape(-1, 1, 1, 1)
    for other in range(4):
        moved = x.clone()
        for _ in range(100):
            moved.requires_grad_()
            z = model(moved)
            gap = z.gather(1, labels[:, None]).squeeze(1) - z[:, other]
            (gradient,) = torch.autograd.grad(gap.sum(), moved)
            step = moved.detach() - 0.1 * r * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-9).view(
                -1, 1, 1, 1
            )
            delta = step - x
            moved = x + delta * (r / delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)).clamp(max=1)
        assert (radius(model(moved), labels) >= -1e-12).all()


GOOD = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((GOOD[0].half(), GOOD[1]), "float16"),
        ((GOOD[0].bfloat16(), GOOD[1]), "bfloat16"),
        ((torch.tensor([[1.0, math.nan, 0.0]]), GOOD[1]), "sample 0"),
        ((torch.tensor([[1.0, 0.0], [math.inf, 0.0]]), torch.tensor([0, 0])), "sample 1"),
        ((GOOD[0], torch.tensor([3])), r"outside 0\.\.2"),
        ((GOOD[0], torch.tensor([-100])), r"outside 0\.\.2"),
        ((GOOD[0], torch.tensor([0, 1])), "class indices of shape"),
        ((GOOD[0], torch.tensor([1.0])), "one whole number an entry"),
        ((GOOD[0][:, :1], torch.tensor([0])), "two classes"),
        ((*GOOD, 0.0), "lipschitz"),
        ((*GOOD, math.inf), "lipschitz"),
        ((*GOOD, 1.0, torch.zeros(2, 5)), "one row a class"),
    ],
)
def test_what_cannot_be_certified_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        radius(*arguments)


def test_undefined_scores_are_errors():
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert radius(*empty).shape == (0,)
    with pytest.raises(ValueError, match="no samples"):
        certified_accuracy(*empty, 0.1)
    with pytest.raises(ValueError, match="epsilon"):
        certified_accuracy(*GOOD, -0.1)
    with pytest.raises(ValueError, match="epsilon"):
        certified_accuracy(*GOOD, math.nan)


@pytest.mark.parametrize("dtype", WHOLE)
def test_a_label_is_the_same_in_every_whole_type(dtype):
    logits = torch.randn(4, 120, generator=generator(0))
    labels = torch.tensor([0, 3, 100, 119])
    assert torch.equal(radius(logits, labels.to(dtype)), radius(logits, labels))
    assert certified_accuracy(logits, labels.to(dtype), 0.1) == certified_accuracy(logits, labels, 0.1)


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-30, 1e30, 1e200, 1e308])
@pytest.mark.parametrize("constant", [1e-300, 1e-10, 1.0, 1e10, 1e300])
@pytest.mark.parametrize("row", [None, 1e-170, 1.0, 1e170])
def test_a_radius_is_a_number_below_the_exact_quotient_whatever_the_scale(size, constant, row):
    logits = size * torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)
    rows = None if row is None else row * torch.eye(3, dtype=torch.float64)
    result = Fraction(radius(logits, None, constant, rows).item())
    top, *others = map(Fraction, logits[0, [0, 1, 2]].tolist())
    wide = Fraction(SQRT2) * Fraction(1 if row is None else row)
    exact = min(top - other for other in others) / (Fraction(constant) * wide)
    assert result <= exact * (1 - Fraction(1, 10**13)) + Fraction(1, 10**150)
    assert radius(logits, torch.tensor([1]), constant, rows).item() <= 0


def test_a_bound_may_be_given_as_it_is():
    model = lipschitz_network(0)
    bound = lipschitz_bound(model, (3, 2, 2))
    logits = model(torch.rand(5, 3, 2, 2, generator=generator(0)).double())
    assert torch.equal(radius(logits, lipschitz=bound), radius(logits, lipschitz=bound.value))

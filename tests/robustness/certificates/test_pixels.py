"""Certificates of all pixels at once: brute force on tiny pictures, and attacks that must fail."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipguide.robustness.certificates import (
    certified_miou,
    certified_pixel_accuracy,
    certified_pooled_miou,
    class_attacks,
    radius,
)
from tests.robustness.common import WHOLE, generator

SQRT2 = math.sqrt(2)
seeds = st.integers(0, 10**6)


def pixel_costs(z: Tensor) -> Tensor:
    """Entry (p, q): how far the logits of pixel p have to move, at least, for class q to come out on top."""
    return torch.stack([(z - z[q]).amax(0) / SQRT2 for q in range(len(z))], 1)


def reachable_predictions(z: Tensor, epsilon: float) -> list[Tensor]:
    """Every prediction of the P pixels, out of all C^P, that a budget of epsilon pays for."""
    costs = pixel_costs(z)
    every = itertools.product(range(len(z)), repeat=z.shape[1])
    pixels = torch.arange(z.shape[1])
    return [p for q in every if costs[pixels, (p := torch.tensor(q))].square().sum() <= epsilon**2]


def iou_counts(predicted: Tensor, labels: Tensor, c: int) -> tuple[int, int]:
    intersection = ((predicted == c) & (labels == c)).sum().item()
    return intersection, ((predicted == c) | (labels == c)).sum().item()


def tiny_pictures(seed: int, pictures: int = 1, pixels: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Logits that lean towards labels, so that there is something to break."""
    g = generator(seed)
    labels = torch.randint(classes, (pictures, 1, pixels), generator=g)
    logits = torch.randn(pictures, classes, 1, pixels, generator=g).double()
    return logits.scatter_add(1, labels.unsqueeze(1), torch.full_like(logits, 1.0)), labels


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=seeds, epsilon=st.floats(0, 2.5))
def test_pixel_accuracy_is_the_worst_reachable_prediction(seed, epsilon):
    logits, labels = tiny_pictures(seed)
    worst = min((p == labels[0, 0]).double().mean() for p in reachable_predictions(logits[0, :, 0], epsilon))
    both, shared, independent = (
        certified_pixel_accuracy(logits, labels, epsilon, bound=b).item() for b in ("both", "shared", "independent")
    )
    assert both == pytest.approx(worst.item())
    assert both >= shared >= 0 and both >= independent >= 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=seeds, epsilon=st.floats(0, 2.5))
def test_iou_of_each_class_is_the_worst_reachable_one_and_miou_is_below_every_reachable_miou(seed, epsilon):
    logits, labels = tiny_pictures(seed)
    y = labels[0, 0]
    present = y.unique().tolist()
    table = [
        [i / u for i, u in (iou_counts(p, y, c) for c in present)]
        for p in reachable_predictions(logits[0, :, 0], epsilon)
    ]
    class_minima = torch.tensor(table, dtype=torch.float64).amin(0)
    bound = certified_miou(logits, labels, epsilon).item()
    assert bound == pytest.approx(class_minima.mean().item())
    assert bound <= torch.tensor(table, dtype=torch.float64).mean(1).min().item() + 1e-12


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=seeds, epsilon=st.floats(0, 2.0))
def test_pooled_iou_is_the_worst_over_all_ways_to_attack_every_picture(seed, epsilon):
    """Brute force: all reachable predictions of picture 1 with all those of picture 2, class by class."""
    logits, labels = tiny_pictures(seed, pictures=2, pixels=4)
    reachable = [reachable_predictions(z[:, 0], epsilon) for z in logits]
    minima = []
    for c in labels.unique().tolist():
        counts = [{iou_counts(p, y[0], c) for p in options} for options, y in zip(reachable, labels, strict=True)]
        minima.append(min((i + j) / (u + v) for (i, u), (j, v) in itertools.product(*counts) if u + v))
    bound = certified_pooled_miou(class_attacks(logits, labels, epsilon))
    assert bound.item() == pytest.approx(sum(minima) / len(minima))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=seeds, epsilon=st.floats(0.2, 2.0), classes=st.integers(2, 4))
def test_pooled_over_one_picture_is_the_bound_of_that_picture(seed, epsilon, classes):
    """Dinkelbach's rounds end where trying every split of the budget ends."""
    logits, labels = tiny_pictures(seed, pixels=40, classes=classes)
    pooled = certified_pooled_miou(class_attacks(logits, labels, epsilon))
    torch.testing.assert_close(pooled, certified_miou(logits, labels, epsilon)[0])


def test_pooled_bound_goes_on_when_the_first_round_is_not_the_last():
    """One budget breaks four of ten true positives (6/10) or adds five false ones (10/15, the first round's choice)."""
    cheap, cheaper, far = SQRT2 * math.sqrt(0.25), SQRT2 * math.sqrt(0.2), 50.0
    ones = torch.tensor([cheap] * 4 + [far] * 6 + [-cheaper] * 5 + [-far] * 5).double()
    logits = torch.stack([torch.zeros(20).double(), ones]).reshape(1, 2, 4, 5)
    labels = (torch.arange(20) < 10).long().reshape(1, 4, 5)
    attacks = class_attacks(logits, labels, 1.0)
    assert certified_pooled_miou([_only(a, 1) for a in attacks]).item() == pytest.approx(6 / 10)


def test_head_that_sees_patches_is_charged_for_a_feature_once_per_patch():
    """Under a 3x3 head of ones, one small change of every feature flips every pixel: nothing may stay certified."""
    rows = torch.stack([torch.ones(1, 3, 3), torch.zeros(1, 3, 3)]).double()
    features = torch.ones(1, 1, 8, 8).double()
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    flipped = torch.nn.functional.conv2d(features - 1.001, rows, padding=1).argmax(1)
    assert (flipped == 1).all()
    logits = torch.nn.functional.conv2d(features, rows, padding=1)
    assert certified_pixel_accuracy(logits, labels, 8 * 1.001, rows=rows).item() == 0
    assert certified_miou(logits, labels, 8 * 1.001, rows=rows).item() == 0


def counter_example() -> tuple[Tensor, Tensor]:
    """Picture 1: ten true positives of class 1, of which a budget of 1 breaks two, or else adds three false ones.
    Picture 2: a hundred pixels of class 1, all missed by far.
    """
    near, close, far = SQRT2 * math.sqrt(0.49), SQRT2 * math.sqrt(0.33), 50.0  # squared radii 0.49 and 0.33
    one = torch.tensor([near] * 2 + [far] * 8 + [-close] * 3 + [-far] * 87)
    two = torch.full((100,), -far)
    logits = torch.stack([torch.zeros(2, 100), torch.stack([one, two])], 1).reshape(2, 2, 10, 10).double()
    labels = torch.zeros(2, 100, dtype=torch.long)
    labels[0, :10], labels[1] = 1, 1
    return logits, labels.reshape(2, 10, 10)


def test_pooling_each_pictures_minimiser_is_no_bound_and_ours_is():
    """Alone, picture 1 is worst at 10/13; pooled with picture 2 that gives 10/113, above the 8/110 within reach."""
    logits, labels = counter_example()
    attacks = class_attacks(logits, labels, 1.0)
    first = attacks[0]
    ious = {(a, int(b)): (10 - a) / (10 + int(b)) for a, b in enumerate(first.added[1]) if b >= 0}
    assert ious == {(0, 3): 10 / 13, (1, 1): 9 / 11, (2, 0): 8 / 10}
    naive = (10 + 0) / (13 + 100)
    class_zero_only = certified_pooled_miou([_only(a, 0) for a in attacks])
    pooled = 2 * certified_pooled_miou(attacks).item() - class_zero_only.item()
    assert pooled == pytest.approx(8 / 110)
    assert pooled < naive


def _only(attacks, c):
    labelled = torch.zeros_like(attacks.labelled)
    labelled[c] = attacks.labelled[c]
    return type(attacks)(attacks.correct, attacks.union, labelled, attacks.added)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=seeds, ignore_index=st.sampled_from([-100, 255]))
def test_without_a_budget_the_certificates_are_the_clean_scores(seed, ignore_index):
    g = generator(seed)
    logits = torch.randn(3, 4, 6, 5, generator=g)
    labels = torch.randint(4, (3, 6, 5), generator=g)
    labels[torch.rand(3, 6, 5, generator=g) < 0.3] = ignore_index
    predicted, valid = logits.argmax(1), labels != ignore_index
    accuracy = [(predicted[i] == labels[i])[valid[i]].double().mean() for i in range(3)]
    result = certified_pixel_accuracy(logits, labels, 0.0, ignore_index=ignore_index)
    torch.testing.assert_close(result, torch.stack(accuracy))

    def iou(i: Tensor, c: int) -> float:
        hit, said = (labels[i] == c) & valid[i], (predicted[i] == c) & valid[i]
        return ((hit & said).sum() / (hit | said).sum()).item()

    expected = [
        sum(iou(i, c) for c in labels[i][valid[i]].unique()) / len(labels[i][valid[i]].unique()) for i in range(3)
    ]
    torch.testing.assert_close(
        certified_miou(logits, labels, 0.0, ignore_index=ignore_index), torch.tensor(expected).double()
    )
    pooled = [
        sum(((labels[i] == c) & (predicted[i] == c)).sum() for i in range(3))
        / sum((((labels[i] == c) | (predicted[i] == c)) & valid[i]).sum() for i in range(3))
        for c in range(4)
    ]
    attacks = class_attacks(logits, labels, 0.0, ignore_index=ignore_index)
    torch.testing.assert_close(certified_pooled_miou(attacks), torch.stack(pooled).mean().double())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=seeds)
def test_certificates_fall_as_the_budget_grows_and_every_pixel_is_lost_in_the_end(seed):
    logits, labels = tiny_pictures(seed, pictures=2, pixels=12)
    budgets = [0.0, 0.3, 0.6, 1.2, 2.4, 100.0]
    for bound in (certified_pixel_accuracy(logits, labels, budgets), certified_miou(logits, labels, budgets)):
        assert bound.shape == (6, 2)
        assert (bound.diff(dim=0) <= 1e-12).all()
        assert (bound[-1] == 0).all()
    assert certified_miou(logits, labels, 0.3).shape == (2,)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=seeds, epsilon=st.floats(0.1, 2.0), kernel=st.sampled_from([1, 3]))
def test_no_perturbation_of_a_segmentation_network_goes_below_its_certificates(seed, epsilon, kernel):
    """An orthogonal map to features, then a convolutional head; the whole budget is aimed at the cheapest pixels."""
    g = generator(seed)
    size, features, classes = 4, 3, 3
    n = features * size * size
    mixing = torch.linalg.qr(torch.randn(n, n, generator=g).double()).Q
    rows = torch.randn(classes, features, kernel, kernel, generator=g).double()

    def network(x: Tensor) -> Tensor:
        hidden = (x @ mixing).reshape(-1, features, size, size)
        return torch.nn.functional.conv2d(hidden, rows, padding=kernel // 2)

    x = torch.randn(1, n, generator=g).double()
    logits = network(x)
    labels = logits.argmax(1)
    bounds = (
        certified_pixel_accuracy(logits, labels, epsilon, rows=rows),
        certified_miou(logits, labels, epsilon, rows=rows),
    )
    safe = radius(logits, labels, rows=rows) > epsilon
    order = radius(logits, labels, rows=rows).flatten().argsort()
    for count in (1, 3, 9):
        moved = x.clone()
        for _ in range(12):
            moved.requires_grad_()
            z = network(moved)
            gap = z.gather(1, labels[:, None]) - z.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)
            (gradient,) = torch.autograd.grad(gap.flatten()[order[:count]].clamp(min=-0.01).sum(), moved)
            delta = moved.detach() - 0.2 * epsilon * gradient / gradient.norm().clamp(min=1e-12) - x
            moved = x + delta * min(1.0, epsilon / delta.norm().item())
            predicted = network(moved).argmax(1)
            assert (predicted == labels)[safe].all()
            assert (predicted == labels).double().mean() >= bounds[0] - 1e-12
            ious = [i / u for i, u in (iou_counts(predicted, labels, c) for c in labels.unique().tolist())]
            assert sum(ious) / len(ious) >= bounds[1] - 1e-12


def test_shared_budget_beats_counting_pixels_one_by_one():
    """A hundred pixels of radius 1 each: one by one all fall at ε = 1.5, but one budget buys only two of them."""
    logits = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    logits[:, 0] = SQRT2
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    assert certified_pixel_accuracy(logits, labels, 1.5, bound="independent").item() == 0
    assert certified_pixel_accuracy(logits, labels, 1.5).item() == pytest.approx(0.98)


def test_what_pays_for_a_million_pixels_buys_them_all():
    """A running sum of a million equal squares in float64 comes out too large, by more than 1e-12 of it."""
    logits = torch.zeros(1, 2, 1000, 1000, dtype=torch.float64)
    logits[:, 0] = (2 * 0.1) ** 0.5  # a radius whose square is 0.1
    labels = torch.zeros(1, 1000, 1000, dtype=torch.long)
    cost = radius(logits[..., :1, :1]).item() ** 2
    epsilon = math.sqrt(1e6 * cost) * (1 + 1e-15)
    assert torch.full((10**6,), cost, dtype=torch.float64).cumsum(0)[-1] > epsilon**2 * (1 + 1e-12)
    for bound in ("shared", "both"):
        assert certified_pixel_accuracy(logits, labels, epsilon, bound=bound) == 0
    assert certified_miou(logits, labels, epsilon) == 0


def test_undefined_scores_are_errors():
    logits, labels = torch.randn(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)
    labels[1] = -100
    for certificate in (certified_pixel_accuracy, certified_miou, class_attacks):
        with pytest.raises(ValueError, match="picture 1 has no labelled pixel"):
            certificate(logits, labels, 0.1)
    with pytest.raises(ValueError, match="one map of classes a picture"):
        certified_miou(torch.zeros(1, 3), torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match="no pictures"):
        certified_pooled_miou([])
    with pytest.raises(ValueError, match="independent"):
        certified_pixel_accuracy(logits, labels, 0.1, bound="best")


@pytest.mark.parametrize("certify", [certified_pixel_accuracy, certified_miou])
@pytest.mark.parametrize("dtype", WHOLE)
def test_a_mask_is_the_same_in_every_whole_type(certify, dtype):
    """A network with more than 156 classes: 156 is -100 in eight bits without a sign."""
    logits = torch.randn(2, 160, 3, 3, generator=generator(0)).double()
    masks = logits.argmax(1) % 120 if torch.iinfo(dtype).max < 156 else logits.argmax(1).clamp(min=150)
    ignored = 5 if torch.iinfo(dtype).max < 156 else -100
    expected = certify(logits, masks, [0.0, 0.1], ignore_index=ignored)
    assert torch.equal(certify(logits, masks.to(dtype), [0.0, 0.1], ignore_index=ignored), expected)


@pytest.mark.parametrize("certify", [certified_pixel_accuracy, certified_miou])
def test_no_pictures_have_no_certified_score(certify):
    with pytest.raises(ValueError, match="no pictures is undefined"):
        certify(torch.zeros(0, 2, 4, 4), torch.zeros(0, 4, 4, dtype=torch.long), 0.1)

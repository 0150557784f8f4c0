"""The certificates: published radii, brute force on tiny pictures, attacks that must fail, conditions to be met."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipguide.robustness.certificates import (
    certified_accuracy,
    certified_miou,
    certified_pixel_accuracy,
    certified_pooled_miou,
    checked_logits,
    class_attacks,
    radius,
)

SQRT2 = math.sqrt(2)
seeds = st.integers(0, 10**6)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def lipschitz_network(seed: int, inputs: int = 12, classes: int = 4) -> nn.Sequential:
    """A 1-Lipschitz network of orthogonal maps and absolute values, tight enough for attacks to come close."""
    first, second = nn.Linear(inputs, inputs, dtype=torch.float64), nn.Linear(inputs, classes, dtype=torch.float64)
    for layer in (first, second):
        nn.init.orthogonal_(layer.weight, generator=generator(seed))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), first, Absolute(), second).eval()


# --- radius and certified accuracy


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


# --- pictures: pixel accuracy and mIoU


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


# --- bad input, and models that are not what they are taken for

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
        ((GOOD[0], torch.tensor([1.0])), "class indices"),
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
    logits, labels = torch.randn(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)
    labels[1] = -100
    for certificate in (certified_pixel_accuracy, certified_miou, class_attacks):
        with pytest.raises(ValueError, match="picture 1 has no labelled pixel"):
            certificate(logits, labels, 0.1)
    with pytest.raises(ValueError, match="one map of classes a picture"):
        certified_miou(*GOOD, 0.1)
    with pytest.raises(ValueError, match="no pictures"):
        certified_pooled_miou([])
    with pytest.raises(ValueError, match="independent"):
        certified_pixel_accuracy(logits, labels, 0.1, bound="best")


def images(n: int = 8) -> Tensor:
    return torch.rand(n, 3, 2, 2, generator=generator(0))


def test_checked_logits_are_the_models_own():
    model = lipschitz_network(0).float()
    logits = checked_logits(model, images(50), batch_size=16)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), model(images(50)).detach(), atol=1e-5, rtol=0)
    assert next(model.parameters()).dtype == torch.float32


def test_normalisation_outside_the_model_is_caught():
    with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
        checked_logits(lipschitz_network(0).float(), (images() - 0.5) / 0.2)


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.2


def test_normalisation_inside_the_model_is_caught_unless_it_is_a_part_of_the_constant():
    model = nn.Sequential(Normalise(), lipschitz_network(0).float()).eval()
    with pytest.raises(ValueError, match="refuted by picture"):
        checked_logits(model, images())
    checked_logits(model, images(), lipschitz=5.0)


def test_head_of_larger_norm_is_caught_unless_its_rows_are_given():
    model = lipschitz_network(0).float()
    head = nn.Linear(4, 3, bias=False)
    nn.init.constant_(head.weight, 0.0)
    head.weight.data[0, 0], head.weight.data[1, 1] = 10.0, 10.0
    whole = nn.Sequential(model, head).eval()
    with pytest.raises(ValueError, match="refuted"):
        checked_logits(whole, images())
    checked_logits(whole, images(), rows=head.weight)


def test_constant_of_a_segmentation_network_is_probed_too():
    network = nn.Conv2d(3, 4, 1, bias=False).eval()
    nn.init.orthogonal_(network.weight.data.view(4, 3))
    assert checked_logits(network, images()).shape == (8, 4, 2, 2)
    network.weight.data *= 3
    with pytest.raises(ValueError, match="refuted"):
        checked_logits(network, images())


def test_training_mode_is_caught_and_dropout_named():
    model = nn.Sequential(lipschitz_network(0).float(), nn.Dropout(0.5)).eval()
    checked_logits(model, images())
    model[1].train()
    with pytest.raises(ValueError, match=r"'1' \(Dropout\) is in training mode"):
        checked_logits(model, images())


class TensorFloat(nn.Linear):
    """What TF32 does on a GPU: inputs and weights keep 10 bits of their fraction, sums are in float32."""

    def forward(self, x):
        if x.dtype == torch.float64:
            return super().forward(x)
        x, weight = ((v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (x.contiguous(), self.weight))
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("seed", range(5))
def test_tf32_is_caught_and_plain_float32_is_not(seed):
    torch.manual_seed(seed)
    for layer, caught in ((nn.Linear, False), (TensorFloat, True)):
        layers = [nn.Flatten(), *(nn.utils.parametrizations.orthogonal(layer(n, m)) for n, m in ((48, 32), (32, 10)))]
        model = nn.Sequential(*layers).eval()
        images = torch.rand(8, 3, 4, 4)
        if caught:
            with pytest.raises(ValueError, match="reduced precision"):
                checked_logits(model, images)
        else:
            checked_logits(model, images)


def test_reduced_precision_is_caught():
    model = lipschitz_network(0).float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="reduced precision"):
        checked_logits(model, images())

    class CoarseWeights(nn.Linear):  # what TF32 does: float32 in and out, ten bits of mantissa in between
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float32:
                return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).float()
            return nn.functional.linear(x, self.weight)

    coarse = CoarseWeights(12, 12, bias=False)
    nn.init.orthogonal_(coarse.weight)
    with pytest.raises(ValueError, match="reduced precision"):
        checked_logits(nn.Sequential(nn.Flatten(), coarse).eval(), images())


@pytest.mark.parametrize("bad", [torch.zeros(0, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)])
def test_images_of_another_kind_are_refused(bad):
    with pytest.raises(ValueError, match="images must be"):
        checked_logits(lipschitz_network(0).float(), bad)


@pytest.mark.parametrize("certify", [certified_pixel_accuracy, certified_miou])
def test_no_pictures_have_no_certified_score(certify):
    with pytest.raises(ValueError, match="no pictures is undefined"):
        certify(torch.zeros(0, 2, 4, 4), torch.zeros(0, 4, 4, dtype=torch.long), 0.1)

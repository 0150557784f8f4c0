"""The multibox loss against the recipe written out, and on scenes that are empty."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lipguide.tasks.detection.boxes import encode, match, pad_targets
from lipguide.tasks.detection.losses import DetectionStep, Multibox
from tests.tasks.detection.test_boxes import BY_HAND, PRIORS, random_scenes, targets_by_hand


def by_hand(logits, offsets, targets, negatives=3):
    """Sum of both parts of every scene, and the number of positives."""
    classes, boxes = match(targets, PRIORS)
    sums, counts = [], []
    for z, o, c, b in zip(logits, offsets, classes, boxes, strict=True):
        positive = (c != 10).nonzero()[:, 0].tolist()
        losses = F.cross_entropy(z, c, reduction="none")
        hard = sorted((float(losses[p]) for p in range(len(c)) if p not in positive), reverse=True)
        total = float(losses[positive].sum()) + sum(hard[: negatives * max(len(positive), 1)])
        total += float((o[positive] - encode(b[positive], PRIORS[positive])).abs().sum()) / 4
        sums.append(total)
        counts.append(len(positive))
    return sums, counts


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(0, 10_000))
def test_loss_is_the_recipe(seed):
    targets = pad_targets(*random_scenes(seed))
    g = torch.Generator().manual_seed(seed)
    output = torch.randn(5, len(PRIORS), 11, generator=g), torch.randn(5, len(PRIORS), 4, generator=g)
    sums, counts = by_hand(*output, targets)
    assert Multibox(PRIORS)(output, targets).item() == pytest.approx(sum(sums) / max(sum(counts), 1), rel=1e-4)
    each = Multibox(PRIORS, reduction="none")(output, targets)
    assert each.tolist() == pytest.approx([s / max(n, 1) for s, n in zip(sums, counts, strict=True)], rel=1e-4)


def test_a_batch_without_objects_has_a_finite_loss_that_lowers_its_alarms():
    targets = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2)
    logits = torch.randn(2, len(PRIORS), 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    offsets = torch.randn(2, len(PRIORS), 4).requires_grad_()
    loss = Multibox(PRIORS)((logits, offsets), targets)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (offsets.grad == 0).all()
    assert ((logits.grad != 0).any(2).sum(1) == 3).all()


def test_gradients_are_finite_whatever_boxes_the_background_is_given():
    targets = pad_targets(*random_scenes(1))
    logits, offsets = (
        torch.zeros(5, len(PRIORS), 11, requires_grad=True),
        torch.zeros(5, len(PRIORS), 4, requires_grad=True),
    )
    Multibox(PRIORS)((logits, offsets), targets).backward()
    assert logits.grad.isfinite().all() and offsets.grad.isfinite().all()


def test_step_takes_bytes_and_floats_alike():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    targets = pad_targets(*[part[:2] for part in random_scenes(2)])

    class Model(torch.nn.Module):
        def forward(self, x):
            z = x.mean((1, 2, 3))[:, None, None]
            return z.expand(-1, len(PRIORS), 11), z.expand(-1, len(PRIORS), 4)

    step = DetectionStep(Multibox(PRIORS))
    assert torch.equal(step(Model(), (images, *targets)), step(Model(), (images.float() / 255, *targets)))


@pytest.mark.parametrize("case", BY_HAND)
def test_targets_built_by_hand_are_refused_with_the_scene(case):
    """A label out of range passed for background, or was an IndexError; a box without area made the loss infinite."""
    box, label, message = BY_HAND[case]
    output = torch.zeros(2, len(PRIORS), 11), torch.zeros(2, len(PRIORS), 4)
    for reduction in ("mean", "none"):
        with pytest.raises(ValueError, match=message):
            Multibox(PRIORS, reduction=reduction)(output, targets_by_hand(box, label))


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match='"mean" or "none"'):
        Multibox(PRIORS, reduction="sum")

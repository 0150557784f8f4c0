"""Boxes: offsets and matching against brute force."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import box_convert, box_iou

from lipguide.tasks.detection.boxes import (
    Checked,
    Targets,
    check_targets,
    decode,
    encode,
    match,
    pad_targets,
    prior_boxes,
)
from lipguide.tasks.detection.losses import DetectionStep, Multibox
from tests.tasks.detection.counts import counts

SEEDS = st.integers(0, 10_000)
PRIORS = prior_boxes((6, 3), (0.25, 0.6), (0.85, 0.4))


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=generator).sort(1).values
    corners[:, 1] += 0.02
    return (corners / 1.02).flatten(1)


def random_scenes(seed: int, scenes: int = 5) -> tuple[list, list]:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (scenes,), generator=g).tolist()
    return [random_boxes(n, g) for n in counts], [torch.randint(0, 10, (n,), generator=g) for n in counts]


def test_priors_of_the_public_model():
    priors = prior_boxes((18, 9, 4, 2), (0.15, 0.35, 0.55, 0.725), (0.85, 0.6, 0.4, 0.25))
    assert priors.shape == (4 * (18**2 + 9**2 + 4**2 + 2**2), 4) == (1700, 4)
    assert torch.allclose(priors[0], torch.tensor([1 / 36, 1 / 36, 0.15 * math.sqrt(0.85), 0.15 / math.sqrt(0.85)]))
    assert torch.allclose(priors[-1], torch.tensor([0.75, 0.75, 0.725 / 2, 1.0]))  # 1.45 high, cut at 1
    assert (priors > 0).all() and (priors <= 1).all()


@settings(deadline=None, max_examples=20, derandomize=True)
@given(SEEDS)
def test_decode_undoes_encode(seed):
    g = torch.Generator().manual_seed(seed)
    boxes = random_boxes(len(PRIORS), g)
    assert torch.allclose(decode(encode(boxes, PRIORS), PRIORS), boxes, atol=1e-5)
    offsets = 3 * torch.randn(len(PRIORS), 4, generator=g)
    assert torch.allclose(encode(decode(offsets, PRIORS), PRIORS), offsets, atol=1e-3)


def matched_by_hand(boxes, labels, priors, threshold=0.5):
    """The rule, one pair at a time."""
    overlaps = box_iou(boxes, box_convert(priors, "cxcywh", "xyxy"))
    classes, owners = [10] * len(priors), [None] * len(priors)
    for p in range(len(priors)):
        if len(boxes) and overlaps[:, p].max() >= threshold:
            owners[p] = int(overlaps[:, p].argmax())
    free_objects, free_priors = set(range(len(boxes))), set(range(len(priors)))
    while free_objects:
        _, o, p = max((float(overlaps[o, p]), -o, -p) for o in free_objects for p in free_priors)
        owners[-p] = -o
        free_objects.remove(-o)
        free_priors.remove(-p)
    for p, owner in enumerate(owners):
        if owner is not None:
            classes[p] = int(labels[owner])
    return classes, owners


@settings(deadline=None, max_examples=15, derandomize=True)
@given(SEEDS)
def test_matching_is_that_of_brute_force(seed):
    boxes, labels = random_scenes(seed)
    found = match(pad_targets(boxes, labels), PRIORS)
    for scene, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        classes, owners = matched_by_hand(b, c, PRIORS)
        assert found.classes[scene].tolist() == classes
        for p, owner in enumerate(owners):
            if owner is not None:
                assert torch.equal(found.boxes[scene, p], b[owner])


@settings(deadline=None, max_examples=15, derandomize=True)
@given(SEEDS)
def test_every_object_has_a_prior(seed):
    boxes, _ = random_scenes(seed)
    names = [torch.arange(len(b)) for b in boxes]  # each object its own class, so that it can be told
    found = match(pad_targets(boxes, names), PRIORS)
    for scene, b in enumerate(boxes):
        assert set(range(len(b))) <= set(found.classes[scene].tolist())


def test_identical_boxes_get_priors_of_their_own():
    box = torch.tensor([[0.2, 0.2, 0.6, 0.8]])
    found = match(pad_targets([box.repeat(3, 1)], [torch.tensor([1, 2, 3])]), PRIORS)
    assert {1, 2, 3} <= set(found.classes[0].tolist())


def test_a_batch_without_objects_is_all_background():
    found = match(pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2), PRIORS)
    assert (found.classes == 10).all() and found.classes.shape == (2, len(PRIORS))


def test_padding_changes_nothing():
    boxes, labels = random_scenes(3)
    targets = pad_targets(boxes, labels)
    wider = Targets(
        torch.cat([targets.boxes, torch.zeros(5, 4, 4)], 1), torch.cat([targets.labels, torch.full((5, 4), -1)], 1)
    )
    assert torch.equal(match(targets, PRIORS).classes, match(wider, PRIORS).classes)


@pytest.mark.parametrize(
    "boxes, labels, message",
    [
        ([[0.1, 0.1, 0.1, 0.4]], [1], "scene 1: a box has no area"),
        ([[0.5, 0.1, 0.3, 0.4]], [1], "scene 1: a box has no area"),
        ([[-0.1, 0.1, 0.3, 0.4]], [1], "scene 1: a box lies outside the picture"),
        ([[0.1, 0.1, 0.3, float("nan")]], [1], "scene 1: a box lies outside the picture"),
        ([[0.1, 0.1, 0.3, 0.4]], [10], "scene 1: labels must be 0 to 9"),
        ([[0.1, 0.1, 0.3, 0.4]], [-1], "scene 1: labels must be 0 to 9"),
        ([[0.1, 0.1, 0.3, 0.4]], [1, 2], r"scene 1: boxes \(1, 4\) for 2 labels"),
        ([[0.1, 0.1, 0.3, 0.4]], [1.7], r"scene 1: labels must be whole numbers, not \[1.7"),
        ([[0.1, 0.1, 0.3, 0.4]], [float("nan")], "scene 1: labels must be whole numbers"),
    ],
)
def test_bad_targets_are_named(boxes, labels, message):
    good = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([3])
    with pytest.raises(ValueError, match=message):
        pad_targets([good[0], torch.tensor(boxes)], [good[1], torch.tensor(labels)])


def test_labels_may_be_floats_as_long_as_they_are_whole():
    assert pad_targets([torch.tensor([[0.1, 0.1, 0.3, 0.4]])], [torch.tensor([7.0])]).labels.tolist() == [[7]]


BY_HAND = {
    "10 passes for background": ([0.1, 0.1, 0.5, 0.5], 10, "scene 1: labels must be 0 to 9, not \\[10\\]"),
    "12 is an index out of range": ([0.1, 0.1, 0.5, 0.5], 12, "scene 1: labels must be 0 to 9, not \\[12\\]"),
    "-2 is no padding": ([0.1, 0.1, 0.5, 0.5], -2, "scene 1: labels must be 0 to 9"),
    "no area makes the loss infinite": ([0.1, 0.1, 0.1, 0.5], 3, "scene 1: a box has no area"),
    "outside": ([0.1, 0.1, 0.5, 1.5], 3, "scene 1: a box lies outside the picture"),
    "NaN": ([0.1, 0.1, 0.5, math.nan], 3, "scene 1: a box lies outside the picture"),
}


def targets_by_hand(box, label):
    """Two scenes of two columns; the second scene has padding first, and then the object in question."""
    good, nothing = [0.2, 0.2, 0.6, 0.8], [0.0] * 4
    return Targets(torch.tensor([[good, good], [nothing, box]]), torch.tensor([[1, 2], [-1, label]]))


@pytest.mark.parametrize("case", BY_HAND)
def test_targets_built_by_hand_are_checked_where_priors_are_matched_with_them(case):
    box, label, message = BY_HAND[case]
    for use in (check_targets, lambda targets: match(targets, PRIORS)):
        with pytest.raises(ValueError, match=message):
            use(targets_by_hand(box, label))


def test_targets_of_another_shape_or_kind_are_refused():
    boxes, labels = targets_by_hand([0.1, 0.1, 0.5, 0.5], 3)
    check_targets(Targets(boxes, labels))
    for wrong in (Targets(boxes[:1], labels), Targets(boxes[0], labels[0]), Targets(boxes, labels.float())):
        with pytest.raises(ValueError, match="targets must be boxes"):
            check_targets(wrong)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(SEEDS)
def test_what_pad_targets_makes_is_never_refused(seed):
    check_targets(pad_targets(*random_scenes(seed)))


class Answers(nn.Module):
    """A detector that always says the same."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def test_targets_are_looked_at_once_and_not_in_every_step_of_a_training():
    """What is read back from a GPU stops it: three times a step, for checks that had been made."""
    boxes, labels = random_scenes(3)
    known = check_targets(pad_targets(boxes, labels))
    assert check_targets(known) is known and check_targets(known.part(slice(2)), 10).labels.shape[0] == 2
    images = torch.zeros(len(boxes), 3, 2, 2)
    output = torch.zeros(len(boxes), len(PRIORS), 11, requires_grad=True), torch.zeros(len(boxes), len(PRIORS), 4)
    waits = []
    for checked in (None, known):
        step = DetectionStep(Multibox(PRIORS), checked)
        waits.append(counts(lambda step=step: step(Answers(output), (images, *known))).synchronisations)
    assert waits[0] > 0 and waits[1] == 0


def test_what_was_checked_for_more_classes_is_looked_at_again():
    known = check_targets(targets_by_hand([0.1, 0.1, 0.5, 0.5], 12), classes=None)
    assert isinstance(known, Checked) and known.classes == 13 and check_targets(known, 13) is known
    copies = pickle.loads(pickle.dumps(known)), copy.deepcopy(known)
    assert [one.classes for one in copies] == [13, 13]
    for one in (known, Checked(*known), *copies):  # who makes one of two tensors has checked nothing
        with pytest.raises(ValueError, match="scene 1: labels must be 0 to 9"):
            check_targets(one, 10)
    wrong = targets_by_hand([0.1, 0.1, 0.1, 0.5], 1)
    with pytest.raises(ValueError, match="scene 1: a box has no area"):
        check_targets(Checked(*wrong), None)

"""What detectors are asked with: numbers, labels, pictures and scenes that cannot be meant are errors, not answers."""

import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize

from lipguide import Unbounded, export, lipschitz_bound
from lipguide.tasks.detection import configurations
from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attack_l2, strongest
from lipguide.tasks.detection.boxes import (
    Targets,
    check_targets,
    encode,
    match,
    pad_targets,
    prior_boxes,
    single,
    unit_range,
)
from lipguide.tasks.detection.configurations import l2_normalised, naive, spectral_norm, standard_conv
from lipguide.tasks.detection.fcos import Brightless, assign, fcos, ordinary_fcos
from lipguide.tasks.detection.losses import Multibox
from lipguide.tasks.detection.scores import detections, hits, score
from lipguide.tasks.detection.suppression import detect
from lipguide.tasks.detection.tinier_ssd import STAGES, TinierSSD
from tests.tasks.detection.test_boxes import PRIORS, random_boxes, random_scenes


def narrow(make):
    """A configuration of one fixed width, with a quarter of its channels."""
    stages = tuple(tuple(item if isinstance(item, str) else item // 4 for item in stage) for stage in STAGES)
    with patch.object(configurations, "TinierSSD", partial(TinierSSD, stages=stages)):
        return make()


MAKERS = {
    "naive": lambda: narrow(naive),
    "spectral-norm": lambda: narrow(spectral_norm),
    "standard conv": lambda: standard_conv(4),
    "L2-normalised": lambda: l2_normalised(4),
    "FCOS": lambda: fcos(4),
    "ordinary FCOS": lambda: ordinary_fcos(4),
}
BOX = torch.tensor([[0.1, 0.1, 0.5, 0.6]])
TWO = pad_targets([BOX, BOX], [torch.tensor([7]), torch.tensor([2])])
EMPTY = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2)
PICTURES = torch.rand(2, 3, 74, 74, generator=torch.Generator().manual_seed(0))


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().eval()


DETECTOR = made("ordinary FCOS")
NO_NUMBERS = (math.nan, math.inf, -math.inf, "0.3", None, True)
NO_COUNTS = (math.nan, -1, 0, 2.5, "2", True)


def scored(**options):
    return detect(torch.rand(2, 5, 3), torch.rand(2, 5, 2).sort(2).values.repeat(1, 1, 2), **options)


def attacked(targets, **options):
    return attack_l2(DETECTOR, PICTURES, targets, **({"eps": 0.5, "name": "vanish", "steps": 1} | options))


USES = [
    *(("min_score", lambda v: scored(min_score=v), v) for v in NO_NUMBERS),
    *(("overlap", lambda v: scored(overlap=v), v) for v in (*NO_NUMBERS, -0.1, 1.1)),
    *(("most", lambda v: scored(most=v), v) for v in NO_COUNTS),
    *(("first", lambda v: scored(first=v), v) for v in (math.nan, -1, 2.5)),
    *(("min_score", lambda v: detections(DETECTOR, PICTURES, min_score=v), v) for v in NO_NUMBERS),
    *(("batch_size", lambda v: detections(DETECTOR, PICTURES, batch_size=v), v) for v in NO_COUNTS),
    *(("min_score", lambda v: strongest(DETECTOR, PICTURES, TWO, {"a": PICTURES}, v), v) for v in NO_NUMBERS),
    *(("eps", lambda v: attacked(TWO, eps=v), v) for v in (*NO_NUMBERS, -0.1)),
    *(("eps", lambda v: attacked(EMPTY, eps=v), v) for v in (*NO_NUMBERS, -0.1)),
    *(("steps", lambda v: attacked(EMPTY, steps=v), v) for v in NO_COUNTS),
    *(("restarts", lambda v: attacked(EMPTY, restarts=v), v) for v in NO_COUNTS),
    *(("batch_size", lambda v: attacked(EMPTY, batch_size=v), v) for v in NO_COUNTS),
    *(("threshold", lambda v: match(TWO, PRIORS, threshold=v), v) for v in (*NO_NUMBERS, -0.1, 1.1)),
    *(("classes", lambda v: match(TWO, PRIORS, v), v) for v in NO_COUNTS),
    *(("classes", lambda v: pad_targets([BOX], [torch.tensor([0])], v), v) for v in NO_COUNTS),
    *(("classes", lambda v: assign(TWO, PRIORS[:, :2], v), v) for v in NO_COUNTS),
    *(("radius", lambda v: assign(TWO, PRIORS[:, :2], radius=v), v) for v in (*NO_NUMBERS, -1.0)),
    *(("negatives", lambda v: Multibox(PRIORS, negatives=v), v) for v in (math.nan, -1, 2.5, True)),
    *(("scale and ratio", lambda v: prior_boxes([2], [v], [1.0]), v) for v in (math.nan, math.inf, 0.0, -1.0)),
    *(("scale and ratio", lambda v: prior_boxes([2], [0.5], [v]), v) for v in (math.nan, math.inf, 0.0, -1.0)),
    *(("side", lambda v: prior_boxes([v], [0.5], [1.0]), v) for v in (0, -1, 2.5)),
]


@pytest.mark.parametrize(
    "name, use, value", USES, ids=[f"{name}-{value}-{i}" for i, (name, _, value) in enumerate(USES)]
)
def test_a_number_that_cannot_be_meant_is_named(name, use, value):
    with pytest.raises(ValueError, match=name):
        use(value)


@pytest.mark.parametrize("boxes", [torch.full((1, 4), math.nan), torch.tensor([[0.1, 0.1, 0.1, 0.5]])])
def test_no_offset_leads_to_a_box_without_area(boxes):
    prior = torch.tensor([[0.3, 0.3, 0.4, 0.4]])
    with pytest.raises(ValueError, match="no area"):
        encode(boxes, prior)
    with pytest.raises(ValueError, match="no area"):
        encode(BOX, prior * torch.tensor([1.0, 1.0, 0.0, 1.0]))


WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(0, 10_000))
def test_labels_of_every_whole_type_mean_the_same(seed):
    boxes, labels = random_scenes(seed)
    boxes, labels = [torch.cat([b, BOX]) for b in boxes], [torch.cat([c, torch.tensor([3])]) for c in labels]
    wanted = pad_targets(boxes, labels)
    full = [b[-1:] for b in boxes], [c[-1:] for c in labels]  # one object a scene: no padding, which needs a sign
    known = Targets(*pad_targets(*full))
    found = [{"boxes": b, "scores": torch.rand(len(c)), "labels": c} for b, c in zip(boxes, labels, strict=True)]
    for dtype in WHOLE:
        narrow = pad_targets(boxes, [c.to(dtype) for c in labels])
        assert narrow.labels.dtype == torch.int64 and torch.equal(narrow.labels, wanted.labels)
        by_hand = Targets(known.boxes, known.labels.to(dtype))
        for each, same in zip(match(by_hand, PRIORS), match(known, PRIORS), strict=True):
            assert torch.equal(each, same)
        for each, same in zip(assign(by_hand, PRIORS[:, :2]), assign(known, PRIORS[:, :2]), strict=True):
            assert torch.equal(each, same) and each.dtype == same.dtype
        seen = [one | {"labels": one["labels"].to(dtype)} for one in found]
        assert score(seen, by_hand) == score(found, known) and hits(seen, by_hand) == hits(found, known)


@pytest.mark.parametrize("name", [TRAINING_LOSS, *ATTACKS])
def test_an_attack_reads_labels_of_every_whole_type(name):
    wanted = attack_l2(DETECTOR, PICTURES, TWO, 0.5, name, 2)
    for dtype in WHOLE:
        narrow = Targets(TWO.boxes, TWO.labels.to(dtype))
        assert torch.equal(attack_l2(DETECTOR, PICTURES, narrow, 0.5, name, 2), wanted)


def test_a_label_of_255_in_bytes_is_a_label_and_no_padding():
    """In eight bits without a sign, -1 is 255."""
    targets = Targets(BOX[None], torch.tensor([[255]], dtype=torch.uint8))
    assert check_targets(targets, 256).labels.tolist() == [[255]]
    nothing = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}]
    right = [{"boxes": BOX, "scores": torch.ones(1), "labels": torch.tensor([255])}]
    assert score(right, targets).recall == 100 and score(nothing, targets).recall == 0
    for use in (lambda: match(targets, PRIORS), lambda: assign(targets, PRIORS[:, :2])):
        with pytest.raises(ValueError, match=r"scene 0: labels must be 0 to 9, not \[255\]"):
            use()


@pytest.mark.parametrize("labels", [torch.tensor([[True]]), torch.tensor([[1.0]]), torch.tensor([[1j]])])
def test_labels_that_are_no_whole_numbers_are_refused(labels):
    targets = Targets(BOX[None], labels)
    right = [{"boxes": BOX, "scores": torch.ones(1), "labels": torch.tensor([1])}]
    for use in (check_targets, lambda targets: score(right, targets), lambda targets: match(targets, PRIORS)):
        with pytest.raises(ValueError, match="targets must be boxes"):
            use(targets)


GOOD = {"boxes": BOX, "scores": torch.tensor([0.9]), "labels": torch.tensor([7])}
BAD = {
    "NaN among the boxes": {"boxes": BOX * math.nan},
    "an infinite box": {"boxes": BOX * math.inf},
    "NaN among the scores": {"scores": torch.tensor([math.nan])},
    "a label that is no whole number": {"labels": torch.tensor([7.5])},
    "a label that is a truth": {"labels": torch.tensor([True])},
    "a negative label": {"labels": torch.tensor([-1])},
    "a score too many": {"scores": torch.tensor([0.9, 0.8])},
    "boxes of one number": {"boxes": BOX[:, :1]},
}


@pytest.mark.parametrize("case", BAD)
def test_detections_that_are_none_are_not_scored(case):
    for use in (score, hits):
        with pytest.raises(ValueError, match="scene 1: "):
            use([GOOD, GOOD | BAD[case]], TWO)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, -0.5])
def test_targets_that_are_none_are_not_scored(value):
    boxes = TWO.boxes.clone()
    boxes[1, 0, 2] = value
    for use in (score, hits):
        with pytest.raises(ValueError, match="scene 1: a box lies outside the picture"):
            use([GOOD, GOOD], Targets(boxes, TWO.labels))


def test_an_infinite_box_is_not_cut_at_the_picture_and_taken_for_a_detection():
    class Far(type(DETECTOR)):
        def boxes(self, output):
            boxes = super().boxes(output).clone()
            boxes[1, 3, 2] = math.inf
            return boxes

    torch.manual_seed(0)
    detector = ordinary_fcos(4).eval()
    detector.__class__ = Far
    with pytest.raises(ValueError, match="scene 1: the detector's scores or boxes are not finite"):
        detections(detector, PICTURES, min_score=0.0)


@pytest.mark.parametrize("images", [(255 * PICTURES).byte(), PICTURES[0], PICTURES > 0.5])
def test_pictures_that_a_detector_cannot_read_are_named(images):
    for targets in (TWO, EMPTY):
        with pytest.raises(ValueError, match="pictures must be"):
            attack_l2(DETECTOR, images, targets, 0.5, "vanish", 1)
    with pytest.raises(ValueError, match="pictures must be"):
        detections(DETECTOR, images)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64])
def test_only_bytes_are_divided(dtype):
    with pytest.raises(ValueError, match="pictures are bytes"):
        unit_range(torch.ones(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("name", ["naive", "FCOS"])
def test_pictures_of_another_size_are_named(name):
    model, larger = made(name), torch.rand(2, 3, 80, 80)
    with pytest.raises(ValueError, match="of one size|74×74"):
        detections(model, larger)
    with pytest.raises(ValueError, match="of one size"):
        model.training_loss()(model(larger), TWO)
    one = Targets(TWO.boxes[:1], TWO.labels[:1])
    with pytest.raises(ValueError, match="output is of 2 scenes, but there are targets of 1"):
        model.training_loss()(model(PICTURES), one)


@pytest.mark.parametrize("scores, boxes", [((2, 5, 3), (2, 4, 4)), ((1, 5, 3), (2, 5, 4)), ((5, 3), (5, 4))])
def test_scores_and_boxes_that_do_not_belong_together_are_named(scores, boxes):
    with pytest.raises(ValueError, match="scores must be"):
        detect(torch.rand(scores), torch.rand(boxes))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [0, 1])
def test_one_scene_and_none_are_batches_too(name, count):
    model, targets = made(name), Targets(TWO.boxes[:count], TWO.labels[:count])
    x = PICTURES[:count]
    assert len(detections(model, x)) == count
    assert len(score(detections(model, x), targets)) == 4
    moved = {attack: attack_l2(model, x, targets, 0.5, attack, 1) for attack in (TRAINING_LOSS, *ATTACKS)}
    assert strongest(model, x, targets, moved).shape == x.shape
    if count:
        together = detections(model, PICTURES, min_score=0.0)[0]
        (alone,) = detections(model, x, min_score=0.0)
        torch.testing.assert_close(alone["scores"], together["scores"])


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_detector_in_half_precision_detects_and_can_be_attacked(name, dtype):
    model, x = made(name).to(dtype), PICTURES.to(dtype)
    found = detections(model, x, min_score=0.01)
    assert all(one["scores"].dtype == torch.float32 and one["boxes"].dtype == torch.float32 for one in found)
    score(found, TWO)
    assert model.training_loss()(model(x), TWO).isfinite()
    for attack in (TRAINING_LOSS, *ATTACKS):
        assert attack_l2(model, x, TWO, 0.5, attack, 1).dtype == dtype


def test_half_precision_takes_the_detections_of_single_precision():
    """Thresholds are compared in single precision: 0.2 itself lies between two halves."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.rand(3, 40, 4, generator=g).to(dtype)
        boxes = torch.stack([random_boxes(40, g) for _ in range(3)]).to(dtype)
        scores[0, 0] = torch.tensor(0.2, dtype=dtype)
        for half, wide in zip(detect(scores, boxes), detect(single(scores), single(boxes)), strict=True):
            assert all(torch.equal(half[key], wide[key]) for key in wide)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("first", ["without a gradient", "with one"])
def test_cached_weights_change_nothing(name, first):
    """Whatever put the weights into the cache, and in whichever mode."""
    model = made(name)
    wanted = detections(model, PICTURES, min_score=0.0)
    moved = {attack: attack_l2(model, PICTURES, TWO, 0.5, attack, 2) for attack in (TRAINING_LOSS, *ATTACKS)}
    with parametrize.cached():
        with torch.set_grad_enabled(first == "with one"):
            model(PICTURES)
        found = detections(model, PICTURES, min_score=0.0)
        again = {attack: attack_l2(model, PICTURES, TWO, 0.5, attack, 2) for attack in moved}
        strongest(model, PICTURES, TWO, again)
    for one, other in zip(wanted, found, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    for attack in moved:
        torch.testing.assert_close(again[attack], moved[attack])


def test_the_constant_of_a_part_is_not_that_of_what_is_made_of_it():
    class Fourfold(Brightless):
        def forward(self, x):
            return 4 * super().forward(x)

    assert lipschitz_bound(Brightless().eval(), (3, 8, 8)).value == 1
    for model in (Fourfold(), torch.nn.Sequential(Fourfold())):
        try:
            bound = lipschitz_bound(model.eval(), (3, 8, 8)).value
        except Unbounded:
            continue
        assert bound >= 4 - 1e-6


def test_the_plain_twin_of_brightless_is_it():
    twin, x = export(torch.nn.Sequential(Brightless())), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(twin(x), Brightless()(x))
    assert "lipguide" not in type(twin[0]).__module__ and lipschitz_bound(twin, (3, 8, 8)).value == 1

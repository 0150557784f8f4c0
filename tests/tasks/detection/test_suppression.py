"""What is read off a detector: suppression against torchvision's, scene by scene and class by class."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms, nms

from lipguide.tasks.detection.suppression import detect
from tests.tasks.detection.counts import counts
from tests.tasks.detection.test_boxes import random_boxes

SEEDS = st.integers(0, 10_000)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(SEEDS)
def test_suppression_is_torchvisions_class_by_class(seed):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.stack([random_boxes(40, g) for _ in range(3)])
    scores = torch.rand(3, 40, 4, generator=g) ** 2
    for scene, found in enumerate(detect(scores, boxes, 0.3, 0.4, most=15)):
        expected = []
        for c in range(4):
            able = (scores[scene, :, c] > 0.3).nonzero()[:, 0]
            kept = able[nms(boxes[scene, able], scores[scene, able, c], 0.4)]
            expected += [(round(float(scores[scene, k, c]), 6), c, int(k)) for k in kept]
        expected = sorted(expected, reverse=True)[:15]
        assert [(round(float(s), 6), int(c)) for s, c in zip(found["scores"], found["labels"], strict=True)] == [
            (s, c) for s, c, _ in expected
        ]
        assert torch.equal(found["boxes"], boxes[scene, [k for *_, k in expected]])


def test_many_scenes_at_once_are_those_of_one_at_a_time():
    """Suppression takes the scenes in parts, whose edges must not show, nor where a scene stands within its part."""
    g = torch.Generator().manual_seed(0)
    boxes, scores = torch.stack([random_boxes(9, g) for _ in range(70)]), torch.rand(70, 9, 3, generator=g)
    scores[31:34] = 0  # nothing is found on either side of an edge
    together = detect(scores, boxes)
    for scene, found in enumerate(together):
        (alone,) = detect(scores[scene : scene + 1], boxes[scene : scene + 1])
        assert all(torch.equal(found[key], alone[key]) for key in alone)
    assert not len(together[32]["labels"]) and len(together[69]["labels"])


@pytest.mark.parametrize("most", [3, 20, 200])
def test_suppression_of_a_crowd_is_torchvisions(most):
    """More boxes of a class than are kept, and scores that tie: of equals the first prior is the better one."""
    g = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_boxes(150, g) for _ in range(6)])
    scores = (20 * torch.rand(6, 150, 2, generator=g)).ceil() / 20
    for scene, found in enumerate(detect(scores, boxes, 0.2, 0.3, most)):
        prior, label = (scores[scene] > 0.2).nonzero(as_tuple=True)
        value = scores[scene, prior, label]
        kept = batched_nms(boxes[scene, prior].double(), value.double(), label, 0.3)[:most]
        assert torch.equal(found["scores"], value[kept]) and torch.equal(found["labels"], label[kept])
        assert torch.equal(found["boxes"], boxes[scene, prior[kept]])


def test_suppression_costs_as_many_operators_for_many_scenes_as_for_few():
    """A GPU is not asked scene by scene. In parts of a thousand boxes, as torchvision likes them, it was."""
    g = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(60, g).expand(4, -1, -1), torch.rand(60, 3, generator=g).expand(4, -1, -1)
    few, many = (counts(lambda n=n: detect(scores.repeat(n, 1, 1), boxes.repeat(n, 1, 1))) for n in (1, 32))
    assert few == many and many.synchronisations < 60


def test_no_detection_at_all_is_an_empty_result():
    found = detect(torch.zeros(2, 5, 3), torch.rand(2, 5, 4))
    assert [tuple(part.shape) for part in found[1].values()] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["scores", "boxes"])
def test_a_broken_detector_is_not_one_that_finds_nothing(part, value):
    """NaN is above no threshold: it came out as "nothing found", which is an honest answer of another detector."""
    g = torch.Generator().manual_seed(0)
    inputs = {"scores": torch.rand(40, 5, 3, generator=g), "boxes": torch.rand(40, 5, 4, generator=g)}
    inputs[part][37, 2, 1] = inputs[part][39, 0, 0] = value
    with pytest.raises(ValueError, match="scene 37: the detector's scores or boxes are not finite, in 2 of 40 scenes"):
        detect(**inputs)

"""Scores of detections, and attacks on detectors, on cases that can be told by hand."""

import pytest
import torch
from torch import nn

from lipguide.detection.attacks import ATTACKS, attack_l2, objective, strongest
from lipguide.detection.boxes import encode, pad_targets, prior_boxes
from lipguide.detection.evaluate import hits, score
from lipguide.detection.tinier_ssd import Output, TinierSSD

BOXES = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]])
TARGETS = pad_targets([BOXES, torch.zeros(0, 4)], [torch.tensor([1, 2]), torch.tensor([])])


def found(boxes, labels, scores):
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels).long(),
        "scores": torch.tensor(scores),
    }


NONE = found([], [], [])


def test_one_object_is_found_once():
    twice = found([[0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.39]], [1, 1], [0.6, 0.9])
    assert hits([twice, NONE], TARGETS) == [1, 0]
    result = score([twice, NONE], TARGETS)
    assert (result.recall, result.false_positives, result.detections) == (50.0, 0.5, 1.0)


def test_wrong_class_and_loose_boxes_are_no_hits():
    wrong = found([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.71, 0.9]], [2, 2], [0.9, 0.8])
    assert hits([wrong, NONE], TARGETS) == [1, 0]  # the second covers a little more than half of its object
    loose = found([[0.5, 0.5, 0.69, 0.9]], [2], [0.9])
    assert hits([loose, NONE], TARGETS) == [0, 0]


def test_alarms_in_an_empty_scene_are_counted_and_cost_precision():
    right = found(BOXES.tolist(), [1, 2], [0.8, 0.7])
    alarm = found([[0.0, 0.0, 0.5, 0.5]], [1], [0.9])
    assert score([right, NONE], TARGETS).map50 == 100
    with_alarm = score([right, alarm], TARGETS)
    assert with_alarm.map50 == pytest.approx(75) and with_alarm.false_positives == 0.5


def test_nothing_found_and_nothing_there_is_zero_and_not_nan():
    assert score([NONE, NONE], TARGETS).map50 == 0
    empty = pad_targets([torch.zeros(0, 4)], [torch.tensor([])])
    assert tuple(score([NONE], empty)) == (0.0, 0.0, 0.0, 0.0)


def test_another_number_of_scenes_is_refused():
    with pytest.raises(ValueError, match="detections of 1 scenes, but targets of 2"):
        score([NONE], TARGETS)


class Brightness(TinierSSD):
    """Finds a digit of class 1 at each prior whose part of the picture is bright, of class 0 if it is very bright."""

    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer("priors", prior_boxes([2], [0.5], [1.0]))

    def forward(self, x):
        light = nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        one, zero, nothing = 8 * light, 16 * light - 6, torch.full_like(light, 3.2)
        logits = torch.stack([zero, one, nothing], 2)
        return Output(logits, 0 * logits[..., :1].expand(-1, -1, 4))


def scene():
    """The upper left quarter is bright, and holds the object."""
    x = torch.zeros(1, 3, 8, 8)
    x[..., :4, :4] = 0.5
    return x, pad_targets([torch.tensor([[0.0, 0.0, 0.5, 0.5]])], [torch.tensor([1])])


@pytest.mark.parametrize("name", ["training loss", *ATTACKS])
def test_attack_stays_in_its_ball_and_ascends_its_objective(name):
    model, (x, targets) = Brightness(), scene()
    moved = attack_l2(model, x, targets, eps=0.5, name=name, steps=10)
    aim = objective(name, model)
    assert (moved - x).norm() <= 0.5 + 1e-5 and moved.min() >= 0 and moved.max() <= 1
    assert (aim(model(moved), targets) > aim(model(x), targets)).all()


def test_each_attack_does_what_it_is_called_after():
    model, (x, targets) = Brightness(), scene()
    light = {name: model(attack_l2(model, x, targets, 2.0, name, 20)).logits[0].softmax(1) for name in ATTACKS}
    clean = model(x).logits[0].softmax(1)
    assert light["vanish"][0, 1] < clean[0, 1] - 0.2
    assert light["mislabel"][0, 0] > light["mislabel"][0, 1] and clean[0, 0] < clean[0, 1]
    assert (light["fabricate"][1:, :2].amax(1) > 2 * clean[1:, :2].amax(1)).all()
    assert torch.allclose(light["fabricate"][0], clean[0], atol=1e-3)  # the object itself is left alone


def test_an_attack_on_an_empty_scene_is_defined():
    model, x = Brightness(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = pad_targets([torch.zeros(0, 4)] * 2, [torch.tensor([])] * 2)
    moved = attack_l2(model, x, targets, 0.5, "fabricate", 5)
    alarms = [model(pictures).logits.softmax(2)[..., :2].amax(2).sum(1) for pictures in (x, moved)]
    assert moved.isfinite().all() and (alarms[1] > alarms[0]).all()


def test_strongest_takes_for_each_picture_the_attack_that_hurts_most():
    model, (x, targets) = Brightness(), scene()
    x = torch.cat([x, x])
    targets = pad_targets([targets.boxes[0]] * 2, [targets.labels[0]] * 2)
    dark = x * 0
    candidates = {"a": torch.stack([x[0], dark[1]]), "b": torch.stack([dark[0], x[1]])}
    assert torch.equal(strongest(model, x, targets, candidates), dark)


def test_unknown_attack_is_named():
    with pytest.raises(ValueError, match="attack must be one of training loss, vanish, fabricate, mislabel"):
        objective("erase", Brightness())


def test_offsets_of_the_toy_detector_leave_the_priors_where_they_are():
    model = Brightness()
    assert torch.allclose(encode(torch.tensor([[0.0, 0.0, 0.5, 0.5]]), model.priors[:1]), torch.zeros(1, 4), atol=1e-6)

"""The ends of the windows learnt once more: what is asked of their margins, and that nothing below them moves."""

import pytest
import torch

from lipguide.layers.export import without_parametrizations
from lipguide.tasks.detection.boxes import pad_targets
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.reader_ends import EndLoss, EndStep, _seen
from lipguide.tasks.detection.reader_loss import ReaderOutput
from lipguide.tasks.detection.recipes import LARGE
from lipguide.tasks.detection.windows import assign


def small(seed=0):
    torch.manual_seed(seed)
    model = Detector((8, 8, 8), 16, residual=True, block=True)
    model.tau, model.offset = 5.0, 0.1
    return model


def scene():
    picture = torch.zeros(1, 3, 74, 74)
    picture[:, 0, 12:62, 25:47] = 1.0
    return picture, *pad_targets([torch.tensor([[25.0, 12, 47, 62]]) / 74], [torch.tensor([3])])


def test_every_window_of_every_level_is_seen_as_the_detector_sees_it(monkeypatch):
    model = small().eval()
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([0, 0]))
    images, boxes, labels = scene()
    below, wanted = _seen(model, (images, boxes, labels))
    with torch.no_grad():
        assert torch.allclose(below, model.windows(images)[0], atol=1e-6)
    there = assign((boxes, labels), *model.places(), model.reach)
    assert torch.equal(wanted.labels, there.labels[0])
    assert torch.allclose(wanted.distance, there.distance[0], atol=1e-5)
    assert torch.allclose(wanted.sides, there.sides[0], atol=1e-5)


def test_without_a_move_the_loss_is_that_of_all_windows():
    model = small()
    below, wanted = _seen(model, scene())
    output = model.answer(below)
    of_ends, speaks = EndLoss(model, within=0.0).of_features(model, below, output, wanted)
    plain, too = model.training_loss().of_windows(*output, *wanted)
    assert torch.allclose(of_ends, plain, atol=1e-6) and torch.equal(speaks, too)


def test_what_may_fall_further_is_asked_for_a_wider_lead():
    model = small()
    below, wanted = _seen(model, scene())
    output = model.answer(below)
    values = [EndLoss(model, within).of_features(model, below, output, wanted)[0] for within in (0.0, 0.1, 0.5)]
    heard = wanted.distance <= 1
    assert heard.any()
    assert (values[0][heard] < values[1][heard]).all() and (values[1][heard] < values[2][heard]).all()


def test_a_wrong_answer_is_raised_by_its_own_fall_where_it_is_the_nearest_one():
    """In a block that passes everything on, the lead over the nearest answer falls by ‖w_k − w_j‖ times the move."""
    model = small()
    without_parametrizations(model)
    model.end.weight.data.zero_()
    below, wanted = _seen(model, scene())
    output = ReaderOutput(*model.answer(below))
    heard = (wanted.distance <= 1).nonzero()[:, 0]
    loss = EndLoss(model, within=0.2)
    values, _ = loss.of_features(model, below, output, wanted)
    rows = model.class_head.weight
    for window in heard.tolist():
        label = wanted.labels[window]
        raised = 0.1 + 0.2 * (rows[label] - rows).norm(dim=1)
        raised[label] = 0
        entropy = -(5.0 * (output.logits[window] + raised)).log_softmax(0)[label]
        box = loss.of_boxes(output.sides[None, window], *(part[None, window] for part in wanted[1:]))
        assert float(values[window].detach()) == pytest.approx(float((entropy + box).detach()), rel=1e-4)


def test_only_the_ends_learn_and_they_do(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([0, 0]))
    model = small(1).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step, adam = EndStep(EndLoss(model, within=0.05)), torch.optim.Adam(model.parameters(), 2e-2)
    values = []
    for _ in range(80):
        adam.zero_grad()
        value = step(model, scene())
        value.backward()
        adam.step()
        values.append(float(value.detach()))
    changed = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"end", "class_head", "box_head"}
    assert values[-1] < 0.7 * values[0]


def test_a_scene_without_objects_has_a_loss():
    model = small().train()
    none = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2)
    value = EndStep(EndLoss(model, within=0.1))(model, (torch.rand(2, 3, 74, 74), *none))
    value.backward()
    assert value > 0 and value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_recipe_goes_on_from_a_reader_and_has_its_network():
    recipe = LARGE["detection-ended-reader"]
    assert recipe.start == "detection-reader" and recipe.within > 0
    step = recipe.training_step(small(), None)
    assert isinstance(step, EndStep) and step.loss.within == recipe.within

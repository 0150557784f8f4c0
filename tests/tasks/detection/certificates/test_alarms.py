"""The bounds of detections and of false alarms against brute force, and mistakes in them that it catches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipguide.tasks.detection.boxes import pad_targets
from lipguide.tasks.detection.certificates import Answers, certified_ap, certify
from lipguide.tasks.detection.certificates import objects as objects_module
from lipguide.tasks.detection.certificates import scene as scene_module
from lipguide.tasks.detection.certificates.alarms import cover, falsely
from lipguide.tasks.detection.certificates.overlap import overlap
from lipguide.tasks.detection.decision import heard
from lipguide.tasks.detection.scores import right as rightly
from lipguide.tasks.detection.scores import score
from tests.tasks.detection.certificates.tiny import around, corners, tiny


def possible(scores, drift, graph):
    """Below which threshold each detection of the only class is possible."""
    low, up = around(scores, drift)
    found = cover(low, up, graph)
    assert (found.label == 0).all()
    return found.highest(up)[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0.05, 0.15, 0.3)), st.sampled_from((0.0, 0.2, 0.6)))
def test_there_are_never_more_detections_than_the_bound_says(seed, drift, least):
    scores, graph, _ = tiny(seed)
    allowed = int((possible(scores, drift, graph) > least).sum())
    for move in corners(6, drift * (1 - 1e-6)):
        assert int(heard(scores + move[:, None], graph, least).sum()) <= allowed


def test_who_is_beaten_by_one_that_may_be_silenced_may_be_reported():
    """Three in a line: the best silences the middle one, and the last one, which that beats surely, is heard."""
    line = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    scores = torch.tensor([[0.9], [0.5], [0.1]])
    assert heard(scores, line, 0.0)[:, 0].tolist() == [True, False, True]
    assert len(possible(scores, 0.1, line)) == 2
    assert len(possible(scores, 0.1, torch.ones(3, 3).bool())) == 1
    higher = torch.tensor([[0.1], [0.9], [0.1]])
    assert len(possible(higher, 0.1, line)) == 1  # nobody may silence the middle one


def test_who_is_surely_silent_silences_nobody():
    """Four in a line with falling scores: the first is heard, so not the second; so the third is, and not the last."""
    line = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    scores = torch.tensor([[1.6], [1.2], [0.8], [0.4]])
    assert len(possible(scores, 0.1, line)) == int(heard(scores, line, 0.0).sum()) == 2


def test_the_bound_on_alarms_is_exact_on_apart_windows_and_on_rivals():
    scores = torch.tensor([[0.5], [0.4], [-0.1]])
    assert len(possible(scores, 0.2, torch.eye(3).bool())) == 3
    assert len(possible(scores, 0.2, torch.ones(3, 3).bool())) == 1
    assert len(possible(scores, 0.05, torch.eye(3).bool())) == 2


def crowded_answers(seed, scenes=8):
    """Two objects, of one class in most scenes, which overlap. Boxes stand at one of them or between; many windows are
    no rivals."""
    generator = torch.Generator().manual_seed(seed)
    apart = 0.12 + 0.2 * torch.rand(1, generator=generator)
    first = torch.tensor([0.1, 0.2, 0.5, 0.8])
    truth = torch.stack([first, first + torch.cat([apart, 0 * apart, apart, 0 * apart])])
    labels = [torch.tensor([0, int(number % 4 == 0)]) for number in range(scenes)]
    whose = torch.randint(2, (scenes, 10), generator=generator)
    spread = torch.where(torch.rand(scenes, 10, 1, generator=generator) < 0.5, 0.005, 0.04)
    boxes = truth[whose] + spread * torch.randn(scenes, 10, 4, generator=generator)
    between = torch.rand(scenes, 10, 1, generator=generator)
    boxes = torch.where(between < 0.2, truth[0] + 5 * between * (truth[1] - truth[0]), boxes)
    place = torch.rand(10, generator=generator)
    graph = (place[:, None] - place).abs() < 0.3
    scores = -0.2 + 0.8 * torch.rand(scenes, 10, 2, generator=generator)
    given = Answers(scores, boxes, graph, 1.0, torch.full((10,), 0.3), torch.full((2,), 1.1))
    return given, pad_targets([truth] * scenes, labels, 2)


def worst_move(given, targets, eps, generator):
    """The answers after a move that the constants allow. A window's box spends a share of the budget on the direction
    in which it loses most of its object, of some, and its scores what is left, up or down."""
    share = torch.rand(given.scores.shape[:2], generator=generator)
    share = torch.where(torch.rand(share.shape, generator=generator) < 0.4, share.round(), share)[..., None]
    left = (given.together**2 - share**2).sqrt().clamp(max=1)
    sign = torch.where(torch.rand(given.scores.shape, generator=generator) < 0.25, -1.0, 1.0)
    sides = torch.nn.functional.normalize(torch.randn(16, 4, generator=generator), dim=1)
    boxes = given.boxes[:, :, None] + (eps * share * given.reach[:, None])[:, :, None] * sides  # (N, P, 16, 4)
    overlaps = overlap(boxes[..., None, :], targets.boxes[:, None, None])  # (N, P, 16, objects)
    worst = overlaps.amax(3).argmin(2)[..., None, None].expand(-1, -1, 1, 4)
    return given._replace(scores=given.scores + eps * left * sign, boxes=boxes.gather(2, worst).squeeze(2))


def beyond(seed):
    """How often some move makes more false alarms above some threshold than the bound allows, leaves a lower average
    precision, and how often the bound is reached."""
    given, targets = crowded_answers(seed)
    generator, more, less, reached = torch.Generator().manual_seed(seed), 0, 0, 0
    for eps in (0.0, 0.05, 0.15, 0.3):
        certificate = certify(given, targets, eps)
        ap = certified_ap(certificate)
        assert ap >= certified_ap(certificate, of_all=True)
        for _ in range(40):
            found = worst_move(given, targets, eps * (1 - 1e-6), generator).detections()
            less += ap > score(found, targets).map50 + 1e-4
            for scene, (made, well) in enumerate(zip(found, rightly(found, targets), strict=True)):
                for label in (0, 1):
                    own = (certificate.alarm_scene == scene) & (certificate.alarm_label == label)
                    allowed = certificate.alarms[own].sort(descending=True).values
                    false = made["scores"][~well & (made["labels"] == label)]
                    within = len(false) <= len(allowed) and bool((false <= allowed[: len(false)]).all())
                    more += not within
                    reached += within and len(false) > 0 and bool((false > allowed[: len(false)] - 0.02).any())
    return more, less, reached


@pytest.mark.parametrize("seed", range(6))
def test_there_are_never_more_false_alarms_than_the_bound_says(seed):
    more, less, reached = beyond(seed)
    assert more == less == 0 and reached > 100


def every_right_window(scores, up, rise, labels, graph):
    false = up.clone()
    for label, risen in zip(labels.tolist(), rise, strict=True):
        false[:, label] = torch.minimum(false[:, label], scores[:, label] + risen)
    return false


def half_a_rise(scores, up, rise, labels, graph):
    return falsely(scores, up, torch.where(rise.isfinite(), rise / 2, rise), labels, graph)


@pytest.mark.parametrize(
    "name, wrong",
    [("falsely", every_right_window), ("falsely", half_a_rise), ("needed", lambda t, own: t[:, 0] * 0 + 0.5)],
)
def test_a_mistake_in_the_bound_of_false_alarms_is_caught(monkeypatch, name, wrong):
    for module in (scene_module, objects_module):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, wrong)
    assert sum(beyond(seed)[0] for seed in range(6)) > 0


def test_the_second_right_window_of_an_object_may_be_an_alarm_if_both_may_be_reported():
    scores, right_anyway = torch.tensor([[0.5], [0.4]]), torch.full((1, 2), -torch.inf)
    one, up = torch.tensor([0]), scores + 0.1
    for graph, highest in ((torch.ones(2, 2), [-torch.inf, -torch.inf]), (torch.eye(2), [-torch.inf, 0.5])):
        assert falsely(scores, up, right_anyway, one, graph.bool())[:, 0].tolist() == highest

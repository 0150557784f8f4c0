"""Certificates against brute force: every move of a tiny case, and what an evaluator makes of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from lipguide.tasks.detection.boxes import Targets, pad_targets
from lipguide.tasks.detection.certificates import (
    Answers,
    Certificate,
    certified_ap,
    certified_precision,
    certified_recall,
    certify,
    object_radii,
)
from lipguide.tasks.detection.certificates.objects import heights, needed, right
from lipguide.tasks.detection.certificates.overlap import overlap, room
from lipguide.tasks.detection.decision import heard, together
from lipguide.tasks.detection.scores import score
from tests.tasks.detection.certificates.tiny import around, corners, tiny


def random_boxes(count, spread=1.0):
    low = torch.rand(count, 2).double() * spread
    return torch.cat([low, low + 0.1 + torch.rand(count, 2).double() * spread], 1)


def sphere(count):
    directions = torch.randn(count, 4).double()
    return directions / directions.norm(dim=1, keepdim=True)


def worst_in_ball(box, radius, truth):
    """The least overlap that a random search finds: an upper bound of the true least one."""
    moves = radius * sphere(4000)
    values = overlap(box + moves, truth)
    for scale in (0.3, 0.1, 0.03):
        best = moves[values.argsort()[:20]]
        tried = best[:, None] + scale * radius * torch.randn(20, 50, 4).double()
        tried = tried.flatten(0, 1)
        moves = torch.cat([best, radius * tried / tried.norm(dim=1, keepdim=True)])
        values = overlap(box + moves, truth)
    return float(values.min())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0.3, 0.5, 0.8)))
def test_no_box_in_its_room_overlaps_less_and_beyond_it_one_does(seed, least):
    torch.manual_seed(seed)
    truth = random_boxes(1)[0]
    box = truth + 0.1 * torch.rand(()) * torch.randn(4).double()
    free = room(box, truth, torch.tensor(least).double())
    assert (free >= 0) == bool(overlap(box, truth) >= least)
    if free >= 0:
        assert worst_in_ball(box, free, truth) >= least - 1e-9
        assert worst_in_ball(box, 1.05 * free + 1e-3, truth) < least
        assert room(box, truth, torch.tensor(least).double()) >= free


def test_the_room_of_a_square_box_is_twice_that_of_the_corners_of_a_cube():
    square, half = torch.tensor([0.0, 0.0, 1.0, 1.0]).double(), torch.tensor(0.5).double()
    in_cube = (1 - 0.5**0.5) / 2  # where each side moves by so much, by itself
    assert float(room(square, square, half)) == pytest.approx(2 * in_cube, rel=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_overlap_is_torchvisions(seed):
    torch.manual_seed(seed)
    one, other = random_boxes(5), random_boxes(4)
    assert torch.allclose(overlap(one[:, None], other), box_iou(one, other))


def test_a_box_turned_inside_out_overlaps_nothing():
    assert float(overlap(torch.tensor([0.6, 0.0, 0.4, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))) == 0
    flat = torch.tensor([0.45, 0.0, 0.55, 1.0])
    assert not room(flat, flat, torch.tensor(0.01)) >= 0.2
    assert room(torch.tensor([0.6, 0.0, 0.4, 1.0]), flat, torch.tensor(0.01)) == -torch.inf


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_a_box_is_right_for_one_object_of_a_class_only(seed):
    torch.manual_seed(seed)
    truth = random_boxes(2, 0.4)
    labels = torch.tensor([1, 1])
    boxes = truth.repeat(40, 1) + 0.1 * torch.randn(80, 4).double()
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    good = right(boxes, torch.zeros(len(boxes)).double(), truth, labels)
    assert not good.all(0).any()
    own = overlap(boxes, truth[:, None])
    assert not (good[0] & (own[1] >= own[0])).any()
    assert torch.allclose(needed(truth, torch.tensor([1, 2])), torch.tensor([0.5, 0.5]).double())


def found(scores, good, graph, drift):
    """Heights before and after suppression, where a window is right in any case or need not be."""
    rise = torch.where(good, -torch.inf, torch.inf)
    return heights(scores, *around(scores, drift), rise, torch.tensor([0]), graph)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0.05, 0.15, 0.3)))
def test_whoever_wins_is_right_however_the_scores_move(seed, drift):
    scores, graph, good = tiny(seed)
    before, after = found(scores, good, graph, drift)
    assert after <= before
    for move in corners(6, drift * (1 - 1e-6)):
        moved = scores + move[:, None]
        if before > 0:
            assert (moved[good[0]] > 0).any()
        if after > 0:
            least = float(after) - 1e-4
            assert (heard(moved, graph, least)[:, 0] & good[0]).any()


def test_most_tiny_cases_that_hold_are_certified():
    """The lemma is no empty one: of the cases that no corner breaks, it proves nearly all."""
    stand = proved = 0
    for seed in range(300):
        scores, graph, good = tiny(seed)
        if not good.any():
            continue
        moves = corners(6, 0.15, 0)
        holds = all((heard(scores + move[:, None], graph, 0.0)[:, 0] & good[0]).any() for move in moves)
        stand += holds
        proved += holds and bool(found(scores, good, graph, 0.15)[1] > 0)
    assert stand > 50
    assert proved > 0.7 * stand


def test_one_right_window_is_enough_whoever_else_might_win():
    """A wrong window beside another right one that may be the best does no harm to the first."""
    line = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    scores = torch.tensor([[0.8], [0.2], [0.9], [0.85]])
    good = torch.tensor([[True, False, True, False]])
    assert found(scores, good, line, 0.1)[1] == pytest.approx(0.7)


@pytest.mark.parametrize("above, holds", [(0.01, False), (-0.01, True)])
def test_a_wrong_rival_does_no_harm_from_twice_the_drift_on(above, holds):
    scores = torch.tensor([[0.8], [0.8 - 2 * 0.2 + above]])
    good, all_ = torch.tensor([[True, False]]), torch.ones(2, 2).bool()
    assert bool(found(scores, good, all_, 0.2)[1] > 0) == holds
    worst = scores + torch.tensor([[-0.2], [0.2]])
    assert bool(heard(worst, all_, 0.0)[0]) == holds


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0.15, 0.3)))
def test_whoever_wins_is_right_where_some_are_right_only_if_they_rise(seed, drift):
    scores, graph, good = tiny(seed)
    rise = torch.where(good, -torch.inf, torch.where(torch.rand(1, 6) < 0.5, 1.5 * drift * torch.rand(1, 6), torch.inf))
    _, after = heights(scores, *around(scores, drift), rise, torch.tensor([0]), graph)
    assert after >= found(scores, good, graph, drift)[1]
    if after > 0:
        for move in corners(6, drift * (1 - 1e-6), 300):
            right_now = move + 1e-6 >= rise[0]
            assert (heard(scores + move[:, None], graph, float(after) - 1e-4)[:, 0] & right_now).any()


def window(seed, shared):
    """One window: how its score and its box move with its features, and the answers that say so.

    Args:
        shared: whether the score grows in directions in which the box moves.
    """
    torch.manual_seed(seed)
    rows, sides = torch.randn(3, 9).double(), torch.linalg.qr(torch.randn(9, 4).double())[0].mT
    if not shared:
        rows -= rows @ sides.mT @ sides
    directions = torch.stack([(rows[0] - rows[k]) / (rows[0] - rows[k]).norm() for k in (1, 2)])
    ahead = torch.rand(2, 1).double()  # of each other class

    def moved(steps):
        score = (ahead + directions @ steps.mT).amin(0) - ahead.amin()
        return score, (0.4 * steps @ sides.mT).norm(dim=1)

    still, whole, reach = torch.zeros(1, 1, 4), torch.ones(1, 1).bool(), torch.full((1,), 0.4)
    given = Answers(still[..., :2], still, whole, 1.0, reach, together(rows, sides))
    return given, moved, directions, sides


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from((0.1, 0.4)))
def test_a_box_whose_score_has_risen_has_so_much_less_left(seed, shared, eps):
    given, moved, directions, sides = window(seed, shared)
    within = 0.4 * eps * torch.rand(1, 1).double()
    rise = float(given.rises(eps, within, torch.tensor([0])))
    mixtures = torch.randn(4000, 6).double() @ torch.cat([directions, sides])
    steps = eps * mixtures / mixtures.norm(dim=1, keepdim=True)
    score, box = moved(steps)
    assert (box[score >= rise] <= within).all()


def test_the_price_of_a_rise_is_exact_where_score_and_box_have_nothing_in_common():
    for seed in range(20):
        given, moved, directions, sides = window(seed, False)
        within, eps = torch.full((1, 1), 0.4 * 0.3).double(), 0.4
        rise = float(given.rises(eps, within, torch.tensor([0])))
        assert rise == pytest.approx((0.4**2 - 0.3**2) ** 0.5, abs=1e-3)
        towards = directions.sum(0) / directions.sum(0).norm() if seed % 2 else directions[0]
        steps = 0.26 * towards + (0.4**2 - 0.26**2) ** 0.5 * sides[0]  # a little less
        assert float(moved(steps[None])[1]) > float(within)
    unknown = given._replace(together=torch.full((2,), 2**0.5))
    assert float(unknown.rises(eps, within, torch.tensor([0]))) > eps  # more than it can rise: nothing is gained


def random_answers(seed, scenes=12):
    """Windows in a row, an object at some of them, boxes near it, scores that mostly say so."""
    generator = torch.Generator().manual_seed(seed)
    windows, classes = 9, 2
    x = torch.arange(windows) / 10
    base = torch.stack([x, torch.full_like(x, 0.3), x + 0.15, torch.full_like(x, 0.8)], 1)
    boxes, labels, found, scores = [], [], [], []
    for _ in range(scenes):
        where = torch.tensor([1, 6])
        label = torch.randint(classes, (2,), generator=generator)
        boxes.append(base[where])
        labels.append(label)
        own = -0.5 + 0.6 * torch.rand(windows, classes, generator=generator)
        for place, c in zip(where.tolist(), label.tolist(), strict=True):
            own[place, c] += 0.9
        scores.append(own)
        found.append(base + 0.01 * torch.randn(windows, 4, generator=generator))
    graph = (x[:, None] - x).abs() < 0.25
    near = torch.full((windows,), 0.1)
    given = Answers(torch.stack(scores), torch.stack(found), graph, 1.0, near, torch.full((classes,), 1.1))
    return given, pad_targets(boxes, labels, classes)


@pytest.mark.parametrize("seed", range(3))
def test_certified_ap_is_below_the_ap_under_any_move(seed):
    given, targets = random_answers(seed)
    positive = 0
    for eps in (0.0, 0.05, 0.15, 0.3):
        certificate = certify(given, targets, eps)
        certified = certified_ap(certificate)
        positive += certified > 1
        assert certified_precision(certificate) <= 100
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            sign = torch.randint(2, given.scores.shape, generator=generator) * 2.0 - 1
            side = torch.randn(given.boxes.shape, generator=generator)
            side = side / side.norm(dim=-1, keepdim=True) * given.reach[:, None]
            moved = given._replace(scores=given.scores + eps * sign, boxes=given.boxes + eps * side)
            attacked = score(moved.detections(), targets)
            assert certified <= attacked.map50 + 1e-4
            assert certified_recall(certificate) <= attacked.recall + 1e-4
    assert positive >= 3


def test_certificates_fall_with_eps_and_an_objects_radius_is_where_they_end():
    given, targets = random_answers(0)
    grid = [0.05, 0.1, 0.2, 0.4]
    recalls = [certified_recall(certify(given, targets, eps)) for eps in grid]
    assert recalls == sorted(recalls, reverse=True) and recalls[0] > recalls[-1]
    radii = object_radii(given, targets, grid)
    for eps in grid:
        assert 100 * float((radii >= eps).double().mean()) >= certified_recall(certify(given, targets, eps)) - 1e-4


def test_an_alarm_that_is_possible_costs_precision_and_ap():
    never = -torch.inf

    def of(births, alarms):
        heights = torch.tensor([0.5, 0.4])
        births, alarms = torch.tensor(births), torch.tensor(alarms)
        zeros = [torch.zeros(len(part), dtype=torch.long) for part in (heights, births)]
        return Certificate(0.1, 0.0, zeros[0], zeros[0], heights, heights, births, alarms, zeros[1], zeros[1])

    clean = of([0.7, 0.6], [never, never])
    assert certified_ap(clean) == certified_ap(clean, of_all=True) == pytest.approx(100)
    assert certified_precision(clean) == 100
    between = of([0.7, 0.6, 0.45], [never, never, 0.45])
    # Up to recall 1/2 one is surely right and none false, of 2 detections; at recall 1 two are and one is, of 3.
    first, second = 51 * max(1 / 1, 2 / 3), 50 * 2 / 3
    assert certified_ap(between) == pytest.approx(100 * (first + second) / 101)
    assert certified_ap(between, of_all=True) == pytest.approx(200 / 3)
    assert certified_precision(between) == pytest.approx(200 / 3)
    worse = of([0.7, 0.6, 0.45], [0.7, 0.6, 0.45])
    assert certified_ap(worse) < certified_ap(between)
    for function in (certified_recall, certified_precision):
        with pytest.raises(ValueError, match="least"):
            function(between, -0.1)


def test_a_scene_with_more_detections_than_an_evaluator_takes_certifies_nothing():
    scores = torch.full((1, 120, 1), 0.9)
    box = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    given = Answers(scores, box.repeat(120, 1)[None], torch.eye(120).bool(), 1.0, torch.zeros(120), torch.ones(1))
    assert certified_recall(certify(given, pad_targets([box], [torch.tensor([0])]), 0.1)) == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steepness": float("nan")}, "steepness is nan"),
        ({"steepness": -1.0}, "steepness is -1.0"),
        ({"reach": torch.full((9,), torch.nan)}, "the reach of a window's box"),
        ({"reach": torch.full((9,), -0.1)}, "the reach of a window's box"),
        ({"together": torch.full((2,), torch.nan)}, "what bounds both together"),
        ({"scores": torch.full((12, 9, 2), torch.nan)}, "scores or boxes are not finite"),
        ({"boxes": torch.full((12, 9, 4), torch.inf)}, "scores or boxes are not finite"),
        ({"graph": torch.ones(9, 9).bool().tril()}, "not symmetric"),
    ],
)
def test_answers_that_prove_nothing_are_refused(wrong, message):
    given, targets = random_answers(0)
    with pytest.raises(ValueError, match=message):
        certify(given._replace(**wrong), targets, 0.1)


def test_objects_of_other_scenes_and_of_unknown_classes_are_refused():
    given, targets = random_answers(0)
    with pytest.raises(ValueError, match="answers to 11 pictures, but the objects of 12 scenes"):
        certify(given.part(slice(11)), targets, 0.1)
    with pytest.raises(ValueError, match="there is no scene to certify"):
        certify(given.part(slice(0)), Targets(*(part[:0] for part in targets)), 0.1)
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        certify(given, Targets(targets.boxes, targets.labels + 1), 0.1)

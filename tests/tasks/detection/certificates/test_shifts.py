"""Which boxes stay right, by a look: no move of the features pushes one off, and more stay than constants say."""

import math
from dataclasses import replace

import pytest
import torch

from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.certificates import Answers, answers, certified_recall, certify
from lipguide.tasks.detection.certificates.inside import BoxHead, Inside
from lipguide.tasks.detection.certificates.overlap import faces, overlap, room
from lipguide.tasks.detection.certificates.shifts import Asked, stay
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.harness import trained
from lipguide.tasks.weights import TEST_SEED
from tests.robustness.common import generator
from tests.tasks.detection.certificates.test_inside import (
    CLASSES,
    FEATURES,
    SCENES,
    WINDOWS,
    drift_of,
    every_score,
    score,
    some,
)

CORNERS = torch.tensor([0.3, 0.2, 0.6, 0.8], dtype=torch.float64)


def boxed(seed: int) -> Inside:
    """With a head of orthonormal rows for the boxes."""
    rows = torch.linalg.qr(torch.randn(FEATURES, 4, generator=generator(seed), dtype=torch.float64)).Q.mT
    return replace(some(seed), boxes=BoxHead(rows, 0.06 + 0.02 * torch.arange(WINDOWS, dtype=torch.float64)))


def corners(inside: Inside, u: torch.Tensor, window: int) -> torch.Tensor:
    """The boxes of some features u (..., D) of a window."""
    return CORNERS + inside.boxes.scale[window] * (inside.block(u) @ inside.boxes.rows.mT)


def answered(inside: Inside) -> Answers:
    boxes = torch.stack([corners(inside, inside.features[:, window], window) for window in range(WINDOWS)], 1)
    scores = torch.zeros(SCENES, WINDOWS, CLASSES)
    steepness = drift_of(inside, 1.0)
    one = torch.ones(CLASSES)
    return Answers(
        scores, boxes.float(), torch.eye(WINDOWS).bool(), steepness, steepness * inside.boxes.scale, one, inside
    )


def questions(inside: Inside, rise: float) -> Asked:
    """Of every window for every label: does its box stay on an object that lies a little beside it?"""
    scene, window, label = every_score()
    boxes = answered(inside).boxes[scene, window].double()
    truth = boxes + 0.01 * torch.randn(boxes.shape, generator=generator(5), dtype=torch.float64)
    least = 0.85 * overlap(boxes, truth)
    return Asked(scene, window, label, truth, least, torch.full((len(scene),), rise))


def pushed_off(inside: Inside, asked: Asked, number: int, reach: float) -> bool:
    """Whether a search within `reach` finds features whose box overlaps by too little, the score having risen."""
    scene, window, label, truth, least, rise = (column[number] for column in asked)
    u = inside.features[scene, window]
    now = score(inside, u[None], int(label))
    move = torch.randn(32, FEATURES, generator=generator(number), dtype=torch.float64)
    for step in range(40):
        move = (reach * move / move.norm(dim=1, keepdim=True).clamp(min=reach)).requires_grad_()
        short = (rise + now - score(inside, u + move, int(label))).clamp(min=0)
        over = overlap(corners(inside, u + move, int(window)), truth)
        if ((short <= 0) & (over < least)).any():
            return True
        slope = torch.autograd.grad((over + 5 * short.nan_to_num(0)).sum(), move)[0]
        slope = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
        move = (move - reach * (1 - step / 40) * slope).detach()
    return False


def wrong(seed: int, rise: float, eps: float, change=lambda inside: inside) -> tuple[int, int]:
    """How many boxes are said to stay, and how many of these do not."""
    inside = boxed(seed)
    asked = questions(inside, rise)
    said = stay(answered(inside)._replace(inside=change(inside)), asked, eps, "dual")
    fallen = [pushed_off(inside, asked, number, eps * inside.below) for number in said.nonzero()[:, 0].tolist()]
    return len(fallen), sum(fallen)


RISES = (-math.inf, 0.0, 0.1, 0.25)


@pytest.mark.parametrize("seed, eps", [(0, 0.3), (1, 0.6), (2, 0.5), (3, 0.45)])
@pytest.mark.parametrize("rise", RISES)
def test_no_move_pushes_off_what_stays(seed, eps, rise):
    said, fallen = wrong(seed, rise, eps)
    assert said > 0 and fallen == 0


def half_as_far(inside):
    return replace(inside, below=inside.below / 2)


def kinks_elsewhere(inside):
    return replace(inside, block=replace(inside.block, bias=inside.block.bias + 5))


def another_head(inside):
    return replace(inside, boxes=inside.boxes._replace(rows=inside.boxes.rows.flip(0)))


@pytest.mark.parametrize("planted", [half_as_far, kinks_elsewhere, another_head])
def test_planted_errors_are_caught(planted):
    assert sum(wrong(seed, -math.inf, eps, planted)[1] for eps in (0.6, 0.9) for seed in range(8)) > 0


def test_a_rise_that_is_not_there_is_caught():
    """What stays where the score has risen need not stay elsewhere."""
    caught = 0
    for seed in range(6):
        inside = boxed(seed)
        given, asked = answered(inside), questions(inside, 0.35)
        in_any_case = asked._replace(rise=torch.full_like(asked.rise, -math.inf))
        gained = stay(given, asked, 0.6, "dual") & ~stay(given, in_any_case, 0.6, "dual")
        caught += sum(pushed_off(inside, in_any_case, k, 0.6 * inside.below) for k in gained.nonzero()[:, 0].tolist())
    assert caught > 0


def test_more_stay_by_a_look_than_by_constants_and_more_of_those_that_have_risen():
    by_constants, by_look, risen = 0, 0, 0
    for seed in range(6):
        inside = boxed(seed)
        given, asked = answered(inside), questions(inside, -math.inf)
        boxes = given.boxes[asked.scene, asked.window].double()
        by_constants += int((room(boxes, asked.truth, asked.least) >= given.moves(0.6)[1][asked.window]).sum())
        by_look += int(stay(given, asked, 0.6, "dual").sum())
        risen += int(stay(given, asked._replace(rise=torch.full_like(asked.rise, 0.3)), 0.6, "dual").sum())
    assert by_constants < by_look < risen


def test_where_no_face_is_negative_the_box_is_right():
    given = generator(0)
    truth = torch.tensor([0.2, 0.3, 0.5, 0.9], dtype=torch.float64)
    boxes = truth + 0.05 * torch.randn(4000, 4, generator=given, dtype=torch.float64)
    least = 0.3 + 0.5 * torch.rand(4000, generator=given, dtype=torch.float64)
    value, slope, bend, bears, stays = faces(boxes, truth, least)
    assert torch.equal((value >= 0).all(1) & (stays >= 0), overlap(boxes, truth) >= least)
    move = 0.1 * torch.randn(4000, 4, generator=given, dtype=torch.float64)
    length = move.norm(dim=1)
    below = value + (slope @ move[:, :, None])[:, :, 0] - bend * length[:, None].square() / 2
    moved = faces(boxes + move, truth, least).value
    assert (below <= moved + 1e-12).all() and (below > moved - 0.1).any()
    sure = (below >= 0).all(1) & (stays >= length)
    assert ((bears >= length[:, None]) <= (moved >= -1e-12)).all()
    assert sure.any() and (overlap(boxes + move, truth) >= least)[sure].all()


def test_a_look_at_boxes_finds_more_of_what_ships():
    model, _ = trained("detection-reader")
    scenes = load_split("test", 40, TEST_SEED, torch.device("cpu"))
    given = answers(model, unit_range(scenes.images), look=True)
    blind = given._replace(inside=replace(given.inside, boxes=None))
    with_boxes, without = (certify(each, scenes.targets, 0.5, model.least) for each in (given, blind))
    assert (with_boxes.heights >= without.heights).all()
    assert certified_recall(with_boxes) > certified_recall(without) + 2

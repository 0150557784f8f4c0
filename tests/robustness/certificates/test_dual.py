"""What holds in a whole ball: never beyond the true distance to another class, at least what `local_radius` says."""

import math

import pytest
import torch

from lipguide.robustness.certificates import dual, holds_within, local_radius
from lipguide.robustness.certificates.block import Block
from lipguide.robustness.certificates.local import opened
from lipguide.tasks import TEST_SEED, trained
from lipguide.tasks.classification.data import pictures
from tests.robustness.certificates.test_local import Twice, distance, images, stands, tiny
from tests.robustness.common import generator

TRIED = [0.03 * k for k in range(1, 13)]


def in_the_plane(seed: int, scale: float = 0.7) -> list[tuple[float, float, float]]:
    """For each of some pictures: what `local_radius` says, the largest distance tried that holds, and the true one."""
    model, x = tiny(seed, scale=scale), images(8, seed)
    labels, near = model(x).argmax(1).tolist(), local_radius(model, x).tolist()
    held = torch.stack([holds_within(model, x, eps) for eps in TRIED])
    largest = (torch.tensor(TRIED, dtype=torch.float64)[:, None] * held).amax(0).tolist()
    true = [distance(model, picture, label, 0.5) for picture, label in zip(x, labels, strict=True)]
    return list(zip(near, largest, true, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_between_the_local_radius_and_the_true_distance(seed):
    for near, most, true in in_the_plane(seed):
        assert min(near, TRIED[-1]) - 0.0301 <= most <= true * (1 + 1e-6)


def test_it_proves_much_of_what_the_local_radius_leaves_open():
    """At half the way from the local radius to the true distance."""
    proved = asked = 0
    for seed in range(4):
        model, x = tiny(seed, scale=0.95), images(8, seed)
        for picture, near in zip(x, local_radius(model, x).tolist(), strict=True):
            true = distance(model, picture, int(model(picture[None]).argmax()), 0.5)
            if 1.02 * near < true < 0.5:
                asked += 1
                proved += bool(holds_within(model, picture[None], (near + true) / 2))
    assert asked > 10 and proved > asked / 3


@pytest.mark.parametrize("seed", range(4))
def test_a_v_above_one_is_counted(seed):
    for _, most, true in in_the_plane(seed, scale=1.1 + 0.2 * (seed % 2)):
        assert most <= true * (1 + 1e-6)


def lowest(end, picture: int, rival: int, reach: float, steps: int = 40) -> float:
    """The smallest gap in units of ‖w‖ that a descent on the features finds within `reach`, from eight beginnings."""
    y, u, (filters, bias) = end.labels[picture], end.features[picture], (end.block.filters, end.block.bias)
    w = end.rows[y] - end.rows[rival]
    shift = end.logits[picture, y] - end.logits[picture, rival]

    def gap(move):
        def part(at):
            return w @ (at - 2 * filters.mT @ (filters @ at + bias).relu())

        return shift + torch.func.vmap(part)(u + move) - part(u)

    move = torch.randn(8, len(u), dtype=torch.float64, generator=generator(picture))
    best = math.inf
    for _ in range(steps):
        move = reach * move / move.norm(dim=1, keepdim=True)
        move.requires_grad_()
        gaps = gap(move)
        best = min(best, float(gaps.detach().min()))
        move = (move - reach * torch.autograd.grad(gaps.sum(), move)[0]).detach()
    return best / float(w.norm())


@pytest.mark.parametrize("steps", [1, 12, 100])
def test_no_descent_gets_below_the_bound_wherever_the_search_ends(steps, monkeypatch):
    monkeypatch.setattr(dual, "STEPS", steps)
    model, x = tiny(5, inputs=6, inner=9, classes=4, scale=0.9), images(5, 5, inputs=6)
    end = opened(model, x, None, 100)
    for reach in (0.05, 0.3, 1.0):
        for picture in range(len(x)):
            y = end.labels[picture]
            for rival in (k for k in range(4) if k != y):
                w = end.rows[y] - end.rows[rival]
                gap = end.logits[picture, y] - end.logits[picture, rival]
                unit = (gap / w.norm())[None], (w / w.norm())[None]
                least = dual.least_gap(*unit, end.features[picture, None], end.block, reach)
                assert least <= lowest(end, picture, rival, reach) + 1e-9


@pytest.mark.parametrize("reach", [0.0, 1e-9, 1e-8, 1e-6, 1e-4, 1e-3])
def test_no_rounding_lifts_a_bound_above_the_gap_itself(reach):
    """Near distance zero λ is large, and what is added up cancels. The features are as long as those of a detector."""
    g = generator(0)
    filters = torch.randn(32, 32, generator=g, dtype=torch.float64)
    block = Block(0.95 * filters / torch.linalg.matrix_norm(filters, 2), torch.randn(32, generator=g).double())
    u, w = 30 * torch.randn(200, 32, generator=g).double(), torch.randn(200, 32, generator=g).double()
    w = w / w.norm(dim=1, keepdim=True)
    gap = (w * block(u)).sum(1)
    least = dual.least_gap(gap, w, u, block, reach)
    assert (least <= gap - 0.1 * reach).all(), "units of length 1 fall by more than that"
    assert (least >= gap - reach * (1 + 1e-9)).all(), "nor is it below what constants say"


def test_a_search_that_goes_astray_proves_nothing(monkeypatch):
    """Single precision may end in what is no number; the bound is then minus infinity, and never too high."""
    monkeypatch.setattr(dual, "_start", lambda it: tuple(torch.full_like(part, math.nan) for part in (it.c, it.there)))
    model, x = tiny(1), images(12, 1)
    assert not (holds_within(model, x, 0.05) & (local_radius(model, x) <= 0.05)).any()


def test_where_no_unit_can_switch_the_bound_is_the_distance_itself():
    """Far from its kinks the block is a matrix and the network linear."""
    model, x = tiny(3, inner=1, classes=2, scale=0.3), images(5, 3)
    with torch.no_grad():
        model[-2].bias.fill_(10.0)
    for picture, near in zip(x, local_radius(model, x).tolist(), strict=True):
        assert holds_within(model, picture[None], near * 0.999)
        assert not holds_within(model, picture[None], near * 1.001)


def test_wrong_labels_never_hold_and_batches_change_nothing():
    model, x = tiny(1), images(12, 1)
    wrong = (model(x).argmax(1) + 1) % 3
    assert not holds_within(model, x, 0.0, wrong).any()
    assert torch.equal(holds_within(model, x, 0.05, batch_size=5), holds_within(model, x, 0.05))
    assert holds_within(model, x, 0.05).any() and not holds_within(model, x, 3.0).any()


def test_gradients_may_be_off_and_are_not_left_behind():
    model, x = tiny(1), images(12, 1)
    asked = holds_within(model, x, 0.05)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(holds_within(model, x, 0.05), asked)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_what_is_no_distance_is_refused(eps):
    with pytest.raises(ValueError, match=f"eps is {eps}, and a distance is a number, 0 or more"):
        holds_within(tiny(0), images(2, 0), eps)


def test_networks_are_refused_as_for_the_local_radius():
    model = tiny(0)
    model[-2].__class__ = Twice
    with pytest.raises(ValueError, match="this ends in .*Twice.*: use radius"):
        holds_within(model, images(2, 0), 0.1)


def half_the_reach(gap, w, u, block, reach):
    """Planted."""
    return dual.honest(gap, w, u, block, reach / 2)


def filters_forgotten(gap, w, u, block, reach):
    """Planted: the units are taken to stay as they are, and the gap to be linear."""
    on = (block.before(u) > 0).to(u)
    return gap - reach * (w - 2 * (on * (w @ block.filters.mT)) @ block.filters).norm(dim=1)


@pytest.mark.parametrize("planted", [half_the_reach, filters_forgotten])
def test_planted_errors_are_caught(planted, monkeypatch):
    monkeypatch.setattr(dual, "honest", dual.least_gap, raising=False)
    monkeypatch.setattr(dual, "least_gap", planted)
    with pytest.raises(AssertionError):
        for seed in range(12):
            test_between_the_local_radius_and_the_true_distance(seed)


def test_no_attack_inside_on_house_numbers():
    model, _ = trained("classification-local", "cpu")
    x, y = pictures("house-numbers", "test", 30, TEST_SEED)
    near, eps = local_radius(model, x, y), 108 / 255
    sure = holds_within(model, x, eps, y)
    assert sure[near > eps].all() and sure.sum() > (near > eps).sum()
    new = sure & (near <= eps)
    assert stands(model, x[new], y[new], eps, steps=30)

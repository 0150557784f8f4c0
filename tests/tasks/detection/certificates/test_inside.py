"""Bounds of scores by a look into the last block: no move of the features gets out of them, and they are closer."""

import math
from dataclasses import replace

import pytest
import torch

from lipguide.robustness.certificates.block import Block
from lipguide.tasks.detection.certificates import answers, certified_recall, certify, hunt
from lipguide.tasks.detection.certificates.inside import Inside
from lipguide.tasks.detection.certificates.scene import Scene, moved
from lipguide.tasks.detection.reader import Detector
from tests.tasks.detection.certificates.test_hunt import PIXELS, REACH, Toy, scenes

SCENES, WINDOWS, FEATURES, FILTERS, CLASSES = 2, 5, 6, 8, 3


def some(seed: int, scale: float = 0.95) -> Inside:
    """A block whose V has norm `scale`, and windows whose features lie near its kinks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    filters, rows = normal(FILTERS, FEATURES), normal(CLASSES + 1, FEATURES)
    filters *= scale / torch.linalg.matrix_norm(filters, 2)
    rows /= rows.norm(dim=1, keepdim=True)
    features = 0.4 * normal(SCENES, WINDOWS, FEATURES)
    return Inside(features, Block(filters, 0.2 * normal(FILTERS)), rows, 0.1 * normal(CLASSES + 1), 0.8)


def drift_of(inside: Inside, eps: float) -> float:
    square = float(torch.linalg.matrix_norm(inside.block.filters, 2)) ** 2
    return eps * inside.below * max(1.0, 2 * square - 1)


def score(inside: Inside, u: torch.Tensor, label: int) -> torch.Tensor:
    """Of windows with features u (K, D) for one label, by its definition."""
    filters, bias = inside.block.filters, inside.block.bias
    z = (u - 2 * (u @ filters.mT + bias).relu() @ filters) @ inside.rows.mT + inside.shift
    others = [other for other in range(CLASSES + 1) if other != label]
    return torch.stack([(z[:, label] - z[:, j]) / (inside.rows[label] - inside.rows[j]).norm() for j in others]).amin(0)


def reached(inside: Inside, u: torch.Tensor, label: int, reach: float, steps: int = 15) -> tuple[float, float]:
    """The lowest and the highest score that a search from sixteen beginnings finds within `reach`."""
    ends = []
    for sign in (1, -1):
        move = torch.randn(16, len(u), dtype=torch.float64, generator=torch.Generator().manual_seed(label))
        best = math.inf
        for _ in range(steps):
            move = (reach * move / move.norm(dim=1, keepdim=True)).requires_grad_()
            values = sign * score(inside, u + move, label)
            best = min(best, float(values.detach().min()))
            move = (move - reach * torch.autograd.grad(values.sum(), move)[0]).detach()
        ends.append(sign * best)
    return ends[0], ends[1]


def every_score() -> tuple[torch.Tensor, ...]:
    every = torch.cartesian_prod(*(torch.arange(many) for many in (SCENES, WINDOWS, CLASSES)))
    return tuple(every.unbind(1))


def between(inside: Inside, look: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    low = inside.falls(every_score(), eps, drift_of(inside, eps), look)
    return low, inside.rises(every_score(), eps, look)


def nothing_gets_out(look: str, seed: int, scale: float, eps: float, change=lambda inside: inside) -> None:
    inside = some(seed, scale)
    bounds = between(change(inside), look, eps)
    for scene, window, label, least, most in zip(*(x.tolist() for x in (*every_score(), *bounds)), strict=True):
        lowest, highest = reached(inside, inside.features[scene, window], label, eps * inside.below)
        assert least <= lowest + 1e-9 and highest - 1e-9 <= most


LOOKS = pytest.mark.parametrize("look", ["box", "dual"])


@LOOKS
@pytest.mark.parametrize("seed, scale, eps", [(0, 0.95, 0.1), (1, 0.95, 0.4), (2, 1.2, 0.3), (3, 0.5, 0.3)])
def test_no_move_of_the_features_gets_out(look, seed, scale, eps):
    nothing_gets_out(look, seed, scale, eps)


def half_as_far(inside):
    return replace(inside, below=inside.below / 2)


def kinks_elsewhere(inside):
    return replace(inside, block=replace(inside.block, bias=inside.block.bias + 5))


@LOOKS
@pytest.mark.parametrize("planted", [half_as_far, kinks_elsewhere])
def test_planted_errors_are_caught(look, planted):
    with pytest.raises(AssertionError):
        for seed in range(4):
            nothing_gets_out(look, seed, 0.95, 0.3, planted)


def test_the_box_is_closer_than_constants_and_the_dual_closer_than_the_box():
    inside, eps = some(0), 0.2
    box, dual = ((most - least) / 2 for least, most in (between(inside, look, eps) for look in ("box", "dual")))
    assert (box <= drift_of(inside, eps) + 1e-9).all()
    assert dual.mean() < 0.98 * box.mean() < 0.9 * drift_of(inside, eps)


@LOOKS
def test_scores_may_be_none(look):
    none = (torch.zeros(0, dtype=torch.long),) * 3
    assert some(0).falls(none, 0.1, 0.1, look).shape == some(0).rises(none, 0.1, look).shape == (0,)


class Bent(Toy):
    """The toy with an SLL block behind its features."""

    def __init__(self):
        super().__init__()
        filters = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
        self.register_buffer("filters", 0.95 * filters / torch.linalg.matrix_norm(filters, 2))
        self.register_buffer("kinks", torch.full((6,), 0.02))

    def forward(self, x):
        u = self.features(x)
        features = u - 2 * (u @ self.filters.mT + self.kinks).relu() @ self.filters
        return features @ self.rows.mT, self.base + REACH * features @ self.sides

    def constants(self):
        return super().constants()  # the block stretches nothing

    def inside(self, images, batch_size, below, deep):
        ends = (self.filters, self.kinks, self.rows, torch.zeros(len(self.rows)))
        filters, bias, rows, shift = (end.double() for end in ends)
        return [self(images)], Inside(self.features(images), Block(filters, bias), rows, shift, below)


def bent(count=20):
    model = Bent()
    return model, *scenes(model, count)


def test_a_look_certifies_more_and_no_object_less():
    model, images, targets = bent()
    plain, looked = (answers(model, images, look=look) for look in (False, True))
    recalls = []
    for eps in (0.05, 0.1):
        far, near = certify(plain, targets, eps), certify(looked, targets, eps)
        assert (near.heights >= far.heights).all() and (near.before >= far.before).all()
        recalls.append((certified_recall(far), certified_recall(near)))
    assert sum(near for _, near in recalls) > 1.3 * sum(far for far, _ in recalls) > 0
    first = certify(looked.part(slice(5)), type(targets)(*(part[:5] for part in targets)), 0.2)
    assert torch.equal(first.heights, certify(looked, targets, 0.2).heights[: len(first.heights)])


def test_no_random_move_of_the_pictures_gets_a_score_out():
    """Of what the certificates rest on after all looks, which is closer than constants on both sides."""
    model, images, (boxes, labels) = bent(12)
    given, eps = answers(model, images, look=True), 0.1
    scenes = [
        Scene.of(given, n, eps, -1.0, box, label) for n, (box, label) in enumerate(zip(boxes, labels, strict=True))
    ]
    (low, up), _ = moved(given, scenes, eps, -1.0)
    drift, _ = given.moves(eps)
    assert (low > given.scores - drift).double().mean() > 0.05 and (up < given.scores + drift).double().mean() > 0.3
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        move = torch.randn(images.shape, generator=generator)
        move *= eps / move.flatten(1).norm(dim=1)[:, None, None, None]
        scores = answers(model, images + move).scores
        assert (scores >= low - 1e-6).all() and (scores <= up + 1e-6).all()


def test_the_hunt_brings_none_of_them_down_but_those_of_a_block_that_moves_half_as_far():
    model, images, targets = bent(30)
    given = answers(model, images, look=True)
    honest = hunt(model, images, targets, certify(given, targets, 0.1), steps=8)
    assert honest.hunted >= 5 and sum(honest.fallen.values()) == 0 and honest.overrun == 0
    planted = given._replace(inside=half_as_far(given.inside))
    assert sum(hunt(model, images, targets, certify(planted, targets, 0.2), steps=8).fallen.values()) > 0


def test_a_look_is_taken_at_readers_that_end_in_a_block_alone():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 74, 74)
    given = answers(Detector((8, 8, 8), 16, residual=True, block=True).eval(), x, look=True)
    assert given.inside.features.shape == (2, 343, 16) and given.inside.below == given.steepness
    with pytest.raises(ValueError, match="the windows end in GroupSort2.*block=True"):
        answers(Detector((8, 8, 8), 16).eval(), x, look=True)
    with pytest.raises(ValueError, match="Toy cannot be certified: it has no method inside"):
        answers(Toy().eval(), torch.rand(2, 3, PIXELS, PIXELS), look=True)


def test_what_is_no_number_is_asked_and_bounds_nothing():
    inside = some(0)
    inside.features[1, 2] = math.nan
    low, up = between(inside, "dual", 0.1)
    broken = (every_score()[0] == 1) & (every_score()[1] == 2)
    assert (low[broken] == -math.inf).all() and (up[broken] == math.inf).all()
    assert low[~broken].isfinite().all() and up[~broken].isfinite().all()

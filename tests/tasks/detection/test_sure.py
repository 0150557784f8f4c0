"""What is surely found by a Tinier SSD: no move that the constants allow loses it."""

import pytest
import torch
from torch import nn

from lipguide.tasks.detection.boxes import Targets, decode
from lipguide.tasks.detection.configurations import naive
from lipguide.tasks.detection.scores import hits
from lipguide.tasks.detection.suppression import _overlaps, detect
from lipguide.tasks.detection.sure import Rates, _found, _most_overlap, _radius, _scores, rates, surely_found
from lipguide.tasks.detection.tinier_ssd import TinierSSD
from lipguide.tasks.detection.unlearnt import unlearnt

PRIORS = torch.tensor([[0.3, 0.5, 0.3, 0.6], [0.33, 0.5, 0.3, 0.6], [0.7, 0.5, 0.3, 0.6], [0.5, 0.5, 0.3, 0.6]])
OBJECTS = torch.tensor([[0.15, 0.2, 0.45, 0.8], [0.55, 0.2, 0.85, 0.8]])


class Toy:
    """The part of a detector that stands behind its outputs: four priors, three classes and the background."""

    tau, priors, classes = 4.0, PRIORS, 3

    def log_scores(self, output):
        return (self.tau * output[0]).log_softmax(2)[..., :-1]

    def boxes(self, output):
        return decode(output[1], self.priors)


def within(norm, *shape, g):
    """Random vectors along the last dimension, of exactly that norm."""
    v = torch.randn(shape, generator=g)
    return norm * v / v.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("spoilt", [None, "gaps", "offsets"])
def test_nothing_that_is_surely_found_is_ever_lost(spoilt):
    """Scenes with random answers, each moved sixty times as far as the constants allow. A certificate
    from a tenth of the true constants is caught."""
    g = torch.Generator().manual_seed(0)
    true = Rates(torch.full((4, 4, 4), 2.0**0.5), torch.full((4,), 2.0))
    claimed = true._replace(**{spoilt: getattr(true, spoilt) / 10}) if spoilt else true
    counts, lost, eps = [0, 0], 0, 0.25
    for _ in range(80):
        labels = torch.randint(3, (2,), generator=g)
        logits = 0.7 * torch.randn(1, 4, 4, generator=g)
        for prior, label in ((0, labels[0]), (2, labels[1])):
            logits[0, prior, label] += 1.5
        output = logits, 0.7 * torch.randn(1, 4, 4, generator=g)
        before, after = _found(Toy(), output, claimed, OBJECTS, labels, eps)
        assert not (after & ~before).any()
        counts = [counts[0] + int(before.sum()), counts[1] + int(after.sum())]
        if after.any():
            many = [part + within(move, 60, 4, 4, g=g) for part, move in zip(output, (eps, 2 * eps), strict=True)]
            boxes = Toy().boxes(many).clamp(0, 1)
            made = detect(Toy().log_scores(many).exp(), boxes)
            own = OBJECTS[after].expand(60, -1, -1), labels[after].expand(60, -1)
            lost += sum(hit < int(after.sum()) for hit in hits(made, Targets(*own)))
    assert (lost == 0) == (spoilt is None)
    assert counts[0] > counts[1] > 20


def test_probabilities_stay_between_their_bounds():
    g = torch.Generator().manual_seed(0)
    logits, radius = torch.randn(50, 6, generator=g).double(), 0.8
    low, high = _scores(logits, torch.full((50, 6, 6), 2**0.5 * radius, dtype=torch.float64))
    for _ in range(200):
        seen = (logits + within(radius, 50, 6, g=g)).softmax(1)[:, :-1]
        assert (low <= seen).all() and (seen <= high).all()


def test_boxes_stay_in_their_balls_and_their_overlaps_below_the_bound():
    g = torch.Generator().manual_seed(0)
    offsets, moves = torch.randn(4, 4, generator=g).double(), torch.tensor([0.2, 0.5, 1.0, 2.0]).double()
    radius, placed = _radius(offsets, PRIORS.double(), moves), decode(offsets, PRIORS.double())
    most, nearest = _most_overlap(placed[0], radius[0], placed, radius), 0.0
    for _ in range(500):
        seen = decode(offsets + moves[:, None] * within(1.0, 4, 4, g=g), PRIORS.double())
        distance = (seen - placed).norm(dim=1)
        assert (distance <= radius).all()
        nearest = max(nearest, float((distance / radius).max()))
        cut = seen.clamp(0, 1)
        assert (_overlaps(cut[:1].expand(4, -1), cut)[1:] <= most[1:]).all()
    assert nearest > 0.9  # and the balls are no larger than they have to be


class Louder(TinierSSD):
    def forward(self, x):
        return super().forward(2 * x)


def louder(model):
    model.__class__ = Louder


def hooked(model):
    model.box_heads[0].register_forward_hook(lambda module, args, output: 2 * output)


def copying_pixels(model):
    """A filter that is padded with copies adds up more than its own entries."""
    model.class_heads[0] = nn.Conv2d(8, 55, 3, padding=1, padding_mode="replicate")


@pytest.mark.parametrize(
    "change, message", [(louder, "Louder is no"), (hooked, "a hook"), (copying_pixels, "a head is")]
)
def test_rates_of_a_model_that_was_changed_are_not_known(change, message):
    model = unlearnt("spectral-norm", width=4).eval()
    change(model)
    with pytest.raises(ValueError, match=message):
        rates(model)


def asked(eps=0.1, dtype=torch.float32, tau=1.0):
    model = naive().eval()
    model.tau = tau
    return surely_found(model.to(dtype), STILL, torch.rand(1, 3, 74, 74).to(dtype), SCENE, eps)


STILL = Rates(torch.zeros(1700, 11, 11, dtype=torch.float64), torch.zeros(1700, dtype=torch.float64))
SCENE = Targets(OBJECTS[None], torch.tensor([[0, 1]]))
WRONG = [
    ({"eps": -0.1}, "eps is -0.1"),
    ({"eps": float("nan")}, "eps is nan"),
    ({"dtype": torch.float16}, "pictures of torch.float16"),
    ({"dtype": torch.bfloat16}, "pictures of torch.bfloat16"),
    ({"tau": -1.0}, "tau must lie strictly between"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_what_bounds_do_not_speak_of_is_refused(wrong, message):
    assert asked()[1] <= asked()[0] <= 100
    with pytest.raises(ValueError, match=message):
        asked(**wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rates_are_of_single_precision(dtype):
    with pytest.raises(ValueError, match="weights .* are too coarse"):
        rates(unlearnt("spectral-norm", width=4).eval().to(dtype))


def test_answers_that_are_no_numbers_find_nothing_surely():
    model = naive().eval()
    with torch.no_grad():
        model.priors[0] = torch.nan
    with pytest.raises(ValueError, match="scene 0: the detector's scores or boxes are not finite"):
        surely_found(model, STILL, torch.rand(1, 3, 74, 74), SCENE, 0.1)

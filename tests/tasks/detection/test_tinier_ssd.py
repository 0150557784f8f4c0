"""Tinier SSD and its four configurations: sizes, bounds, and that they can learn."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lipguide.bounds.network import lipschitz_bound, lipschitz_lower_bound
from lipguide.tasks.detection.boxes import pad_targets
from lipguide.tasks.detection.configurations import l2_normalised, naive, spectral_norm, standard_conv
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.unlearnt import unlearnt
from lipguide.training import fit

SMALL = {
    "naive": naive,
    "spectral-norm": spectral_norm,
    "standard conv": lambda: standard_conv(8),
    "L2-normalised": lambda: l2_normalised(8),
}
PICTURE = (3, 74, 74)


def made(name):
    torch.manual_seed(0)
    return SMALL[name]()


def test_naive_has_the_parameters_of_the_public_model():
    assert sum(p.numel() for p in naive().parameters()) == 337_968


def test_wide_configuration_has_seven_million_parameters():
    """Its parameters are a parabola in the width: three narrow ones, quickly made, tell those of width 256."""
    widths = np.array([8, 16, 24])
    counts = [sum(p.numel() for p in standard_conv(int(w)).parameters()) for w in widths]
    assert round(np.polyval(np.polyfit(widths, counts, 2), 256)) == 7_054_064


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_a_positive_number(tau):
    with pytest.raises(ValueError, match="tau must lie strictly between 0 and inf"):
        unlearnt("together", tau=tau, width=4)


@pytest.mark.parametrize("name", SMALL)
def test_outputs_stand_in_the_order_of_the_priors(name):
    """The head of the map of side 9 answers for priors 4 · 18² onwards, cell by cell: only one cell is touched here."""
    model = made(name).eval()
    with torch.no_grad():
        before = model(torch.full((1, *PICTURE), 0.5))
        bias = [m for m in model.box_heads[1].modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][-1].bias
        bias[4 * 2 + 1] += 1.0  # y offset of the third ratio
        after = model(torch.full((1, *PICTURE), 0.5))
    moved = (after.offsets - before.offsets).abs()[0] > 1e-4
    rows, columns = moved.nonzero(as_tuple=True)
    assert (columns == 1).all() and rows.tolist() == [4 * 18**2 + 4 * cell + 2 for cell in range(81)]
    assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("name", ["spectral-norm", "standard conv", "L2-normalised"])
def test_no_search_beats_the_bound_after_training_at_a_high_rate(name):
    model = made(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.rand(2, *PICTURE, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        sum(part.square().mean() for part in model(x)).neg().backward()
        optimizer.step()
    bound = lipschitz_bound(model.eval(), PICTURE)
    assert set(bound.heads) == {"logits", "offsets"}
    assert all(0 < head <= bound.value for head in bound.heads.values())
    assert lipschitz_lower_bound(model, x, steps=10) <= bound.value * (1 + 1e-5)


def test_spectral_norm_is_one_at_every_layer_and_two_over_four_maps():
    bound = lipschitz_bound(made("spectral-norm").eval(), PICTURE)
    assert all(layer.total <= 1 + 1e-4 for layer in bound.layers)
    assert bound.heads["logits"] == pytest.approx(math.sqrt(4), rel=1e-4)  # one unit for each of the four maps


@pytest.mark.parametrize("name", ["naive", "standard conv", "L2-normalised"])
def test_one_picture_is_learnt_by_heart(name):
    """The configurations that can learn reach an mAP of 100 on a scene of two digits."""
    g = torch.Generator().manual_seed(0)
    image = torch.rand(1, *PICTURE, generator=g)
    boxes = torch.tensor([[0.2, 0.2, 0.5, 0.8], [0.5, 0.25, 0.8, 0.85]])
    targets = pad_targets([boxes], [torch.tensor([4, 7])])
    model = made(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(model, (image, *targets), DetectionStep(model.training_loss()), optimizer, 80, 1, schedule="constant")
    model.eval()
    result = score(detections(model, image), targets)
    assert result.map50 == 100 and result.recall == 100


def test_training_of_every_configuration_lowers_the_loss():
    g = torch.Generator().manual_seed(1)
    images = torch.rand(4, *PICTURE, generator=g)
    boxes = [torch.tensor([[0.1 * i, 0.2, 0.1 * i + 0.4, 0.9]]) for i in range(4)]
    targets = pad_targets(boxes, [torch.tensor([i]) for i in range(4)])
    for name in SMALL:
        model = made(name)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        step = DetectionStep(model.training_loss())
        history = fit(model, (images, *targets), step, optimizer, 20, 4, schedule="constant", log_every=5)
        assert history[-1]["loss"] < history[0]["loss"], name

"""Corruptions: how far each goes, and that it is the worst of what it tries."""

import math

import pytest
import torch
from torch import Tensor, nn

from lipguide.robustness import attacks
from tests.robustness.attacks.problems import CORRUPTIONS, Scale
from tests.robustness.common import linear


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_of_no_severity_changes_nothing_and_a_stronger_one_stays_in_the_box(name, models, test_set):
    x, y = test_set[0][:20], test_set[1][:20]
    torch.testing.assert_close(CORRUPTIONS[name](models["ordinary"], x, y, 0.0), x, atol=1e-6, rtol=0)
    moved = CORRUPTIONS[name](models["ordinary"], x, y, 1.0)
    assert moved.shape == x.shape and (moved >= 0).all() and (moved <= 1).all()
    before, after = (attacks.margin(models["ordinary"](z), y) for z in (x, moved))
    assert (after >= before).all() and (after > before).any()


def test_severity_means_what_it_says():
    """A model that likes pictures dark, or flat, or smooth, shows how far each corruption goes."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(1, 2, 8, 8, generator=generator)
    y = torch.tensor([0])

    def darkness(output: Tensor, y: Tensor) -> Tensor:
        return -output.flatten(1).mean(1)

    def flatness(output: Tensor, y: Tensor) -> Tensor:
        return -output.flatten(1).std(1)

    def change(output: Tensor, y: Tensor) -> Tensor:
        return (output - x).flatten(1).norm(dim=1)

    same = nn.Identity()
    torch.testing.assert_close(attacks.brightness(same, x, y, 0.3, score=darkness), x - 0.3)
    flat = attacks.contrast(same, x, y, 1.0, score=flatness)
    torch.testing.assert_close(flat, x.mean().expand_as(x))
    noisy = attacks.noise(same, x, y, 0.1, draws=1, score=change)
    assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.2)
    impulse = torch.zeros(1, 1, 15, 15)
    impulse[0, 0, 7, 7] = 1.0
    blurred = attacks.blur(same, impulse, y, 1.5, score=flatness)
    offsets = torch.arange(15.0) - 7
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    spread = (blurred[0, 0].sum(0) * offsets.square()).sum().sqrt()
    assert spread.item() == pytest.approx(1.5, rel=0.03)


def test_blur_of_a_constant_picture_is_itself_even_when_the_kernel_is_larger():
    x = torch.full((1, 3, 2, 2), 0.7)
    moved = attacks.blur(linear(torch.randn(2, 12)), x, torch.tensor([0]), 4.0)
    torch.testing.assert_close(moved, x)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_score_that_hides_nan_does_not_hide_it(name, models, test_set):
    """The argmax of NaN is class 0, a label like any other."""
    x, y = test_set[0][:4], torch.zeros(4, dtype=torch.long)
    broken = nn.Sequential(models["ordinary"], Scale(math.nan)).eval()
    for score in (attacks.margin, lambda z, y: (z.argmax(1) != y).float()):
        with pytest.raises(ValueError, match="NaN for 4 of 4 samples under attack, first for sample 0"):
            CORRUPTIONS[name](broken, x, y, 0.2, score=score)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_keep_their_type(name, dtype):
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = linear(torch.randn(3, 16)).to(dtype)
    moved = CORRUPTIONS[name](model, x, torch.tensor([0, 1]), 0.3)
    assert moved.dtype == dtype and (moved >= 0).all() and (moved <= 1).all()


def test_wrong_strengths_are_named(models, test_set):
    (x, y), model = (test_set[0][:3], test_set[1][:3]), models["ordinary"]
    with pytest.raises(ValueError, match="negatives"):
        attacks.contrast(model, x, y, 1.5)
    for draws in (0, -1):
        with pytest.raises(ValueError, match=f"draws is {draws}: without a draw"):
            attacks.noise(model, x, y, 0.1, draws=draws)
    for corruption in CORRUPTIONS.values():
        with pytest.raises(ValueError, match="must be finite"):
            corruption(model, x, y, math.inf)

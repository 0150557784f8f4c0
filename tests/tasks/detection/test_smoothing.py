"""Median smoothing: its order statistics against a binomial oracle, its bounds against a detector that is linear."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from lipguide.tasks.detection.smoothing import Smoothed, order_statistics, smoothed, surely_found


@settings(max_examples=30, deadline=None)
@given(st.integers(50, 3000), st.floats(0.0, 0.4), st.sampled_from((1e-2, 1e-3, 1e-5)))
def test_the_order_statistic_is_the_last_that_is_wrong_seldom_enough(draws, eps, alpha):
    share = norm.cdf(-eps / 0.25)
    bounds = order_statistics(draws, eps, 0.25, alpha)
    first_wrong = binom.cdf(0, draws, share)
    if bounds is None:
        assert first_wrong > alpha * 0.999
        return
    low, high = bounds
    assert low + high == draws - 1
    assert binom.cdf(low, draws, share) <= alpha * 1.001
    assert binom.cdf(low + 1, draws, share) > alpha * 0.999


def slider(weight):
    """One box whose place is linear in the picture: all its percentiles are known."""

    def detect(images):
        place = 0.3 + (images.flatten(1) @ weight)
        zero = torch.zeros_like(place)
        boxes = torch.stack([place, zero, place + 0.2, zero + 1], 1)
        return [{"boxes": box[None], "labels": torch.tensor([0]), "scores": torch.ones(1)} for box in boxes]

    return detect


def test_the_median_of_every_moved_picture_lies_between():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, generator=generator)
    weight = 0.01 * weight / weight.norm()
    bounds = smoothed(slider(weight), torch.zeros(3, 2, 2), eps=0.2, sigma=0.25, draws=400, classes=1)
    slot = int(bounds.middle[0, :, 0].isfinite().int().argmax())
    low, high = bounds.low[0, slot, 0], bounds.high[0, slot, 0]
    assert low <= 0.3 - 0.002 and high >= 0.3 + 0.002  # what an attack of norm 0.2 does to the true median
    assert high - low < 0.02
    assert surely_found(bounds, torch.tensor([[0.3, 0.0, 0.5, 1.0]]), torch.tensor([0])).all()


def test_what_half_of_the_copies_lose_is_not_certified():
    box = torch.tensor([0.0, 0.0, 0.3, 1.0])
    nowhere = torch.full((1, 1, 4), torch.inf)
    lost = Smoothed(box.expand(1, 1, 4), box.expand(1, 1, 4), nowhere)
    assert not surely_found(lost, box[None], torch.tensor([0])).any()
    still = Smoothed(*[box.expand(1, 1, 4)] * 3)
    twice = surely_found(still, box.expand(2, 4), torch.tensor([0, 0]))
    assert twice.tolist() == [True, False]


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="more draws"):
        smoothed(slider(torch.zeros(12)), torch.zeros(3, 2, 2), eps=0.5, sigma=0.1, draws=20, classes=1)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_an_alpha_that_is_no_probability_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha is a probability between 0 and 1"):
        order_statistics(1000, 0.1, 0.25, alpha)


def test_percentiles_too_far_out_for_a_number_are_bounded_by_no_draws():
    assert order_statistics(1000, 10.0, 0.25) is None

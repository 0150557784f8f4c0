"""Randomized smoothing: the binomial test, Holm's correction, and the certificate held against the truth."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn

from lipguide.robustness.smoothing import (
    ABSTAIN,
    Votes,
    _binomial_tail,
    holm,
    segcertify,
    smoothed_miou,
    smoothing_radius,
    votes,
)
from tests.robustness.common import UNSIGNED, WHOLE


@settings(max_examples=40, deadline=None, derandomize=True)
@given(draws=st.integers(1, 2000), chance=st.floats(0.501, 0.999))
def test_binomial_tail_is_that_of_scipy_and_never_below_it(draws, chance):
    ours = _binomial_tail(draws, chance)
    theirs = torch.from_numpy(binom.sf(range(-1, draws), draws, chance))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-100)
    assert (ours >= theirs * (1 - 1e-12))[theirs > 1e-100].all()  # far smaller than any alpha, scipy has few digits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=6), alpha=st.floats(0.01, 0.5))
def test_holm_is_the_closed_bonferroni_test(p, alpha):
    """A hypothesis falls exactly if every set that holds it is refused by Bonferroni's test of the set."""
    sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    refused = {s: min(p[i] for i in s) <= alpha / len(s) for s in sets}
    expected = [all(refused[s] for s in sets if i in s) for i in range(len(p))]
    assert holm(torch.tensor([p], dtype=torch.float64), alpha)[0].tolist() == expected


def test_false_labels_are_given_as_rarely_as_promised():
    """All pixels sit at the null, probability tau: the chance of one label or more in a picture is alpha at most."""
    generator, tau, alpha = torch.Generator().manual_seed(0), 0.75, 0.2
    hits = torch.binomial(torch.full((2000, 4, 4), 50.0), torch.full((2000, 4, 4), tau), generator=generator).long()
    given = segcertify(Votes(torch.zeros_like(hits), hits, 50, 0.25), tau, alpha) != ABSTAIN
    share = given.flatten(1).any(1).double().mean().item()
    assert 0.02 < share < alpha + 0.03


class Threshold(nn.Module):
    """Class 1 where the pixel is above 1/2: smoothed, its label keeps exactly up to |x − 1/2|."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_labels_are_given_where_the_true_radius_is_large_enough_and_nowhere_else(sigma):
    x = torch.linspace(0, 1, 21).reshape(1, 1, 3, 7)
    cast = votes(Threshold().eval(), x, sigma, guesses=50, draws=2000)
    tau = 0.75
    labels, true_radius = segcertify(cast, tau), (x[:, 0] - 0.5).abs()
    given, reach = labels != ABSTAIN, smoothing_radius(sigma, tau)
    assert (true_radius[given] >= reach - 1e-6).all()
    assert given[true_radius > reach + 0.15 * sigma].all()
    assert (labels[given] == (x[:, 0] > 0.5)[given].long()).all()
    assert given.any() or reach > 0.4


def test_radius_is_sigma_times_the_quantile():
    assert smoothing_radius(0.25, 0.75) == pytest.approx(0.25 * NormalDist().inv_cdf(0.75))
    assert smoothing_radius(0.5, 0.95) > smoothing_radius(0.5, 0.75) > 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_smoothed_miou_is_below_every_way_to_fill_what_was_abstained_from(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (1, 1, 6), generator=generator)
    masks = torch.randint(0, 3, (1, 1, 6), generator=generator)
    if seed % 2:
        masks[..., 0] = -100
    bound = smoothed_miou(labels, masks, classes=3).item()
    free = (labels == ABSTAIN).flatten().nonzero().flatten().tolist()
    for fill in itertools.product(range(3), repeat=len(free)):
        filled = labels.clone().flatten()
        filled[free] = torch.tensor(fill, dtype=torch.long)
        m = masks.flatten()
        ious = []
        for c in set(m[m >= 0].tolist()):
            mine, claimed = m == c, (filled == c) & (m >= 0)
            ious.append(((mine & claimed).sum() / (mine | claimed).sum()).item())
        assert bound <= sum(ious) / len(ious) + 1e-6


def test_votes_repeat_keep_to_their_numbers_and_do_not_depend_on_the_batch():
    x = torch.rand(2, 1, 3, 3)
    one, two = (votes(Threshold().eval(), x, 0.3, draws=30, batch_size=7) for _ in range(2))
    assert torch.equal(one.hits, two.hits) and (one.hits <= 30).all() and (one.hits >= 0).all()


def test_wrong_use_is_named():
    x, model = torch.rand(1, 1, 2, 2), Threshold()
    with pytest.raises(ValueError, match="training mode"):
        votes(model.train(), x, 0.1)
    for sigma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma must be positive and finite"):
            votes(model.eval(), x, sigma)
    with pytest.raises(ValueError, match="0 pictures"):
        votes(model.eval(), x[:0], 0.1)
    cast = votes(model.eval(), x, 0.1, draws=5)
    for tau in (0.5, 0.2, 1.0):
        with pytest.raises(ValueError, match="between 1/2 and 1"):
            segcertify(cast, tau)
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="alpha is a probability"):
            segcertify(cast, alpha=alpha)
    with pytest.raises(ValueError, match="agree in shape"):
        smoothed_miou(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long(), 2)


def test_a_smoothed_score_refuses_unknown_labels_and_a_picture_without_any():
    given = torch.tensor([[[0, ABSTAIN]]])
    with pytest.raises(ValueError, match="masks hold label 255"):
        smoothed_miou(given, torch.tensor([[[0, 255]]]), classes=2)
    with pytest.raises(ValueError, match="picture 0 has no labelled pixel"):
        smoothed_miou(given, torch.full((1, 1, 2), -100), classes=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["network", "picture"])
def test_what_is_no_number_gets_no_votes(bad, where):
    """The argmax of NaN is class 0 in every draw: unanimous, and worth nothing."""
    x = torch.rand(2, 1, 3, 3)
    model = Threshold().eval()
    if where == "picture":
        x[1, 0, 0, 0] = bad
        broken = model
    else:

        def broken(x):
            return model(x) * bad

    with pytest.raises(ValueError, match="NaN or infinite"):
        votes(broken, x, 0.1, draws=5)


def test_a_radius_of_bad_arguments_is_refused():
    for sigma in (-0.25, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma must be positive and finite"):
            smoothing_radius(sigma, 0.75)
    for tau in (0.5, 1.0, math.nan):
        with pytest.raises(ValueError, match="between 1/2 and 1"):
            smoothing_radius(0.25, tau)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="alpha is a probability"):
            holm(torch.tensor([[0.01]]), alpha)
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            votes(Threshold().eval(), torch.rand(1, 1, 2, 2), 0.1, batch_size=size)


@pytest.mark.parametrize("dtype", WHOLE)
def test_a_label_is_the_same_in_every_whole_type(dtype):
    """255 is a label that the classes do not have, and no abstention, although -1 in eight bits is 255."""
    labels = torch.tensor([[[0, 0, 1, 1]]])
    masks = torch.tensor([[[0, 0, 0, 1]]])
    expected = smoothed_miou(labels, masks, 2)
    assert torch.equal(smoothed_miou(labels.to(dtype), masks.to(dtype), 2), expected)
    if dtype in UNSIGNED:
        abstained = torch.tensor([[[0, ABSTAIN, 1, 1]]]).to(dtype)
        with pytest.raises(ValueError, match="predictions hold label"):
            smoothed_miou(abstained, masks, 2)

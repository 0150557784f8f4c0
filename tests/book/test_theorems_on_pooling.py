"""Claims of the chapter on pooling that carry weight, checked beyond the chapter's own examples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.layers.pooling import GlobalAvgPool2d, GlobalL2NormPool2d, ScaledAvgPool2d, ScaledL2NormPool2d

few = settings(deadline=None, max_examples=20, derandomize=True)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def singular_values(layer, x):
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
    return torch.linalg.svdvals(jacobian)


@few
@given(size=st.integers(1, 4), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("kind", ["max", "L2", "average", "global max", "global L2", "global average"])
def test_disjoint_windows_keep_every_gradient(kind, size, seed):
    """JJᵀ = I for the average and the maximum too, not for L2 pooling alone."""
    layer = {
        "max": nn.MaxPool2d(size),
        "L2": ScaledL2NormPool2d(size),
        "average": ScaledAvgPool2d(size),
        "global max": nn.AdaptiveMaxPool2d(1),
        "global L2": GlobalL2NormPool2d(),
        "global average": GlobalAvgPool2d(),
    }[kind]
    sigma = singular_values(layer, randn(1, 2, 2 * size, 3 * size, seed=seed))
    torch.testing.assert_close(sigma, torch.ones_like(sigma))


@few
@given(size=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_torchs_average_shrinks_every_gradient_by_its_size(size, seed):
    sigma = singular_values(nn.AvgPool2d(size), randn(1, 2, 2 * size, 2 * size, seed=seed))
    torch.testing.assert_close(sigma, torch.full_like(sigma, 1 / size))


@few
@given(size=st.integers(1, 4), stride=st.integers(1, 4), padded=st.booleans(), seed=st.integers(0, 10**6))
def test_overlapping_windows_stretch_by_no_more_than_the_root_of_their_number(size, stride, padded, seed):
    """c √m with m = ⌈k/s⌉²: the factor by which the chapter tells readers to divide."""
    bound = math.ceil(size / stride)
    maximum = nn.MaxPool2d(size, stride, padding=size // 2 if padded else 0)
    a, b = randn(1, 1, 9, 9, seed=seed), randn(1, 1, 9, 9, seed=seed + 1)
    for layer in (maximum, nn.LPPool2d(2, size, stride)):
        assert singular_values(layer, a)[0] <= bound * (1 + 1e-12)
        assert (layer(a) - layer(b)).norm() <= bound * (a - b).norm() * (1 + 1e-12)


@pytest.mark.parametrize("size, stride", [(2, 1), (3, 1), (3, 2), (5, 2), (4, 3)])
def test_a_single_bright_pixel_attains_that_root(size, stride):
    """So dividing by less would break the bound."""
    reached = []
    for i in range(8, 8 + stride):
        dot = torch.zeros(1, 1, 24, 24)
        dot[0, 0, i, i] = 1
        reached.append(nn.MaxPool2d(size, stride)(dot).norm().item())
    assert max(reached) == pytest.approx(math.ceil(size / stride))

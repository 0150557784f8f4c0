"""Claims of the chapter on activations that carry weight, checked beyond the chapter's own examples."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lipguide.book.ledger import read
from lipguide.layers.activations import GroupSort2, Householder, MaxMin, MaxMinDouble

RESULTS = Path(__file__).resolve().parents[2] / "book" / "results"
few = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 10**6)


def rotation(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@few
@given(seed=seeds)
@pytest.mark.parametrize("activation", [F.relu, nn.LeakyReLU(0.1), F.elu], ids=["relu", "leaky", "elu"])
def test_gradients_of_norm_one_are_all_the_same_vector(activation, seed):
    """The theorem after Anil et al.: look where every unit is in its linear part, from many sides."""
    generator = torch.Generator().manual_seed(seed)
    w1, w2, w3 = rotation(4, generator), rotation(4, generator), rotation(4, generator)[:1]
    x = torch.randn(400, 4, generator=generator, dtype=torch.float64).requires_grad_()
    y = activation(activation(x @ w1.T + 1) @ w2.T + 3) @ w3.T
    (gradients,) = torch.autograd.grad(y.sum(), x)
    assert gradients.norm(dim=1).max() <= 1 + 1e-12
    steep = gradients[gradients.norm(dim=1) > 1 - 1e-12]
    assert 1 < len(steep) < 400
    torch.testing.assert_close(steep, (w3 @ w2 @ w1).expand_as(steep))


@few
@given(seed=seeds)
def test_sorting_networks_have_many_gradients_of_norm_one(seed):
    """The theorem's conclusion must fail for GroupSort2, or sorting would not be worth its price."""
    generator = torch.Generator().manual_seed(seed)
    w1, w2 = rotation(4, generator), rotation(4, generator)[:1]
    x = torch.randn(400, 4, generator=generator, dtype=torch.float64).requires_grad_()
    (gradients,) = torch.autograd.grad((GroupSort2()(x @ w1.T) @ w2.T).sum(), x)
    torch.testing.assert_close(gradients.norm(dim=1), torch.ones(400, dtype=torch.float64))
    assert torch.linalg.matrix_rank(gradients - gradients[0]) >= 2


@few
@given(seed=seeds, doubled=st.booleans())
def test_one_hidden_layer_bends_no_more_than_the_exercise_says(seed, doubled):
    """Slopes differ by at most 1 with ReLU, √2 doubled: f(1) + f(−1) − 2 f(0) is bounded by that."""
    generator = torch.Generator().manual_seed(seed)
    u, b = F.normalize(torch.randn(8, generator=generator), dim=0), torch.randn(8, generator=generator) / 4
    w = F.normalize(torch.randn(16 if doubled else 8, generator=generator), dim=0)
    activation = MaxMinDouble() if doubled else F.relu

    def f(x):
        return (activation((u * x + b)[None]) * w).sum()

    assert f(1.0) + f(-1.0) - 2 * f(0.0) <= (math.sqrt(2) if doubled else 1.0) + 1e-5


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_the_doubling_form_makes_the_slope_of_the_exercise(layers):
    """s_n = √(1 − 2^(−n)), by the construction of the solution."""

    def build(x, n):  # s_n |x| out of x, by maps of norm 1
        pair = MaxMinDouble()(x)
        if n == 1:
            return pair @ torch.tensor([[1.0], [1.0]], dtype=x.dtype) / math.sqrt(2)
        total, difference = (
            pair.sum(1, keepdim=True) / math.sqrt(2),
            pair @ x.new_tensor([[1.0], [-1.0]]) / math.sqrt(2),
        )
        s = math.sqrt(1 - 2.0 ** -(n - 1))
        return (total + s * build(difference, n - 1)) / math.hypot(1, s)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(build(x, layers), math.sqrt(1 - 2.0**-layers) * x.abs())


@few
@given(seed=seeds)
def test_orthogonal_neighbours_absorb_householders_angle(seed):
    """Householder(θ) = Q · MaxMin, its halves exchanged, · Qᵀ, with Q a rotation of each pair."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    layer = Householder(6).double()
    layer.theta.data = 2 * math.pi * torch.rand(3, generator=generator, dtype=torch.float64)
    delta = (layer.theta.detach() - math.pi / 2) / 2
    q = torch.cat(
        [
            torch.cat([delta.cos().diag(), -delta.sin().diag()], 1),
            torch.cat([delta.sin().diag(), delta.cos().diag()], 1),
        ]
    )
    low_first = MaxMin()(z @ q).roll(3, 1)
    torch.testing.assert_close(layer(z), low_first @ q.T)


def test_the_five_that_sort_or_reflect_have_the_same_row_in_the_chapter():
    """Its table of singular values gives one row for all five."""
    jacobian = read(RESULTS / "activations.quick.json")["results"]["jacobian"]
    for name in ("GroupSort2", "GroupSort8", "MaxMin", "FullSort", "Householder"):
        assert all(f"{value:.2f}" == "1.00" for value in jacobian[name].values()), name

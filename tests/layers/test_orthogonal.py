"""Orthogonal matrices and kernels: all singular values of the true Jacobian are 1 where nothing is cut off."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.layers import orthogonal as orthogonal_layer
from lipguide.layers.affine import orthogonal
from lipguide.layers.orthogonal import orthonormal, orthonormal_by_products, polar
from tests.kernels import WEIGHTS, fill_
from tests.oracles import singular_values

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def complete_circles(draw):
    """Convolutions on a circle with all of its padding, and the transposed ones that tile the plane."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 12))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (1, 3), (3, 2)]))
    sides = [s * draw(st.integers(1, 4)) for s in stride]
    if draw(st.integers(0, 3)) == 0:
        layer = nn.ConvTranspose2d(inputs, outputs, stride, stride, groups=groups)
    elif stride == (1, 1):
        kernel = [draw(st.integers(1, 2 * n)) for n in sides]
        dilation = [draw(st.integers(1, 2)) if n > 2 * k else 1 for n, k in zip(sides, kernel, strict=True)]
        layer = nn.Conv2d(inputs, outputs, kernel, 1, "same", dilation, groups, padding_mode="circular")
    else:
        # Padding by ⌈(k − s)/2⌉ is complete; an even kernel on a stride of 1 would need one side more than the other.
        kernel = [
            s + draw(st.sampled_from([0, 2] if s == 1 else [0, 1, 2])) * (n > s)
            for s, n in zip(stride, sides, strict=True)
        ]
        padding = [math.ceil((k - s) / 2) for k, s in zip(kernel, stride, strict=True)]
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, 1, groups, padding_mode="circular")
    fill_(layer.weight.data, draw(st.sampled_from(WEIGHTS)))
    return layer, (inputs, *sides)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@SETTINGS
@given(complete_circles())
def test_orthogonal_on_every_complete_circle(case):
    """Kernels larger than the circle, even ones, strides that differ, any groups, weights without full rank."""
    layer, shape = case
    try:
        layer(torch.zeros(1, *shape))
    except RuntimeError:  # torch pads a circle once around at most
        return
    layer = orthogonal(layer).eval()
    for _ in range(2):
        values = singular_values(layer, shape)
        assert abs(values[0] - 1) <= 1e-4 and abs(values[-1] - 1) <= 1e-4, (layer, shape, values[[0, -1]])
        layer.weight = torch.randn_like(layer.weight)  # assigned, it is made orthogonal again


@SETTINGS
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(WEIGHTS), st.integers(0, 99))
def test_orthonormal_and_polar_have_orthonormal_rows_or_columns(rows, columns, kind, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    fill_(weight, kind)
    for q in (orthonormal(weight), polar(weight)):
        assert q.dtype == torch.float32
        gram = q @ q.mT if rows <= columns else q.mT @ q
        torch.testing.assert_close(gram, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)


def test_polar_leaves_a_nearest_matrix():
    """No other orthogonal matrix is nearer."""
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    nearest = (weight - polar(weight)).norm()
    for _ in range(50):
        assert nearest <= (weight - orthonormal(torch.randn(4, 4))).norm()


def test_the_nearest_weight_is_taken_where_the_kernel_is_its_own_block():
    torch.manual_seed(0)
    layer = orthogonal(nn.Conv2d(3, 12, 2, stride=2))
    before = layer.weight.detach().clone()
    layer.weight = before
    torch.testing.assert_close(layer.weight, before)


@SETTINGS
@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    decades=st.sampled_from([0, 1, 2]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_products_find_the_factor_of_qr_and_its_gradient(groups, rows, columns, decades, size, dtype, seed):
    torch.manual_seed(seed)
    longer, shorter = max(rows, columns), min(rows, columns)
    singular = torch.logspace(0, -decades, shorter, dtype=torch.float64)
    v = torch.linalg.qr(torch.randn(groups, longer, shorter, dtype=torch.float64)).Q * singular
    v = v @ torch.linalg.qr(torch.randn(groups, shorter, shorter, dtype=torch.float64)).Q
    v = (size * (v if rows >= columns else v.mT)).to(dtype)
    direction = torch.randn(v.shape, dtype=torch.float64)
    found = []
    for function, raw in ((orthonormal, v.double()), (orthonormal_by_products, v)):
        raw = raw.clone().requires_grad_()
        q = function(raw)
        (size * q.double() * direction).sum().backward()
        found.append((q.detach().double(), raw.grad.double()))
    (q, gradient), (near_q, near_gradient) = found
    torch.testing.assert_close(near_q, q, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(near_gradient, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-6)


@pytest.mark.parametrize("n, rank", [(6, 1), (64, 1), (64, 20), (200, 150)])
def test_products_of_dependent_columns_stay_finite_and_near_norm_1(n, rank):
    torch.manual_seed(0)
    for v in (torch.randn(n, rank) @ torch.randn(rank, n), torch.ones(n, n)):
        q = orthonormal_by_products(v)
        assert q.isfinite().all() and torch.linalg.matrix_norm(q, 2) < 1.1


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 9), lambda: nn.Conv2d(4, 12, 3, padding=1, groups=2)])
def test_only_training_goes_by_products(make, monkeypatch):
    layer = orthogonal(make())
    with torch.no_grad():
        for raw in layer.parametrizations.weight.parameters():
            raw.normal_()
    proved = layer.eval().weight.detach()
    monkeypatch.setattr(orthogonal_layer, "BY_PRODUCTS", {"cpu"})
    assert torch.equal(layer.eval().weight, proved)
    trained = layer.train().weight.detach()
    assert not torch.equal(trained, proved)
    torch.testing.assert_close(trained, proved, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 24, 2, stride=2),
        lambda: nn.Conv2d(3, 24, 1),
        lambda: nn.Conv2d(3, 12, 2, stride=2),
        lambda: nn.Conv2d(6, 4, 2, stride=2),
        lambda: nn.Conv2d(4, 40, (1, 3), stride=(1, 3), groups=2),
        lambda: nn.ConvTranspose2d(24, 3, 2, stride=2),
        lambda: nn.Linear(5, 24),
    ],
    ids=["lifted", "lifted, 1×1", "square", "wide", "groups", "transposed", "dense"],
)
def test_an_orthogonal_weight_of_one_block_is_kept_as_it_is(make):
    """What one layer has learnt can be given to another: also where there are more outputs than a block has values."""
    torch.manual_seed(0)
    learnt, other = orthogonal(make()), orthogonal(make())
    with torch.no_grad():
        for raw in learnt.parametrizations.weight.parameters():
            raw.add_(torch.randn_like(raw))
    weight = learnt.weight.detach().clone()
    other.weight = weight
    torch.testing.assert_close(other.eval().weight, weight, atol=2e-6, rtol=0)

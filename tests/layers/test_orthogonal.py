"""Orthogonal matrices and kernels: all singular values of the true Jacobian are 1 where nothing is cut off."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.layers.affine import orthogonal
from lipguide.layers.orthogonal import orthonormal, polar
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

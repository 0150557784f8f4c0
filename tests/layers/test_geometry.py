"""The geometry of a convolution: phases, dilation and circles, each held against what torch's convolution does."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lipguide.layers.geometry import Geometry, chained
from tests.oracles import jacobian

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
numbers = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def geometries(draw):
    return Geometry(draw(numbers), draw(numbers), draw(numbers), draw(st.sampled_from([1, 1, 2, 3])))


@SETTINGS
@given(geometries(), st.integers(0, 10_000))
def test_a_strided_convolution_is_one_of_stride_1_on_interleaved_pictures(geometry, seed):
    torch.manual_seed(seed)
    groups, (s1, s2) = geometry.groups, geometry.stride
    weight = torch.randn(2 * groups, 3, *geometry.kernel, dtype=torch.float64)
    rows, columns = (5 * s + r for s, r in zip(geometry.stride, geometry.reach, strict=True))
    rows, columns = math.ceil(rows / s1) * s1, math.ceil(columns / s2) * s2
    x = torch.randn(1, 3 * groups, rows, columns, dtype=torch.float64)
    expected = F.conv2d(x, weight, None, geometry.stride, 0, geometry.dilation, groups)

    phases = x.reshape(1, 3 * groups, rows // s1, s1, columns // s2, s2).permute(0, 1, 3, 5, 2, 4)
    phases = phases.reshape(1, -1, rows // s1, columns // s2)
    kernel = geometry.polyphase(weight)
    assert kernel.shape[3:] == geometry.phased_kernel
    found = F.conv2d(phases, kernel.flatten(0, 1), groups=groups)
    height, width = (min(a, b) for a, b in zip(found.shape[2:], expected.shape[2:], strict=True))
    assert min(height, width) >= 3
    torch.testing.assert_close(found[..., :height, :width], expected[..., :height, :width])


@SETTINGS
@given(geometries())
def test_merging_undoes_the_phases(geometry):
    weight = torch.randn(2 * geometry.groups, 3, *geometry.kernel)
    assert torch.equal(geometry.merged(geometry.polyphase(weight)), weight)


@SETTINGS
@given(st.sampled_from([(1, 1), (3, 1), (3, 3), (5, 3)]), numbers, st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_dilation_splits_a_picture_into_smaller_ones_with_the_same_norm(kernel, dilation, size):
    """The true Jacobians: with zero padding, outputs as many as inputs."""
    torch.manual_seed(0)
    geometry = Geometry(kernel, dilation=dilation)
    weight = torch.randn(2, 2, *kernel)
    norms = []
    for shape, sides in ((geometry, size), (geometry.undilated(), geometry.apart(size))):
        assert shape.stride == (1, 1)
        layer = nn.Conv2d(2, 2, kernel, padding="same", dilation=shape.dilation)
        layer.weight.data = weight
        norms.append(torch.linalg.matrix_norm(jacobian(layer, (2, *sides)), ord=2).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


NONE = ((0, 0), (0, 0))
READ = {
    nn.Conv1d(2, 2, 3, 2, 1, padding_mode="reflect"): Geometry((1, 3), (1, 2), mode="reflect", copied=((0, 0), (1, 1))),
    nn.ConvTranspose1d(2, 2, 4, stride=3): Geometry((1, 4), (1, 3), transposed=True),
    nn.Conv2d(4, 4, (3, 2), 1, (1, 0), (1, 3), 2): Geometry((3, 2), (1, 1), (1, 3), 2, "zeros", NONE),
    nn.Conv2d(1, 1, 4, padding="same", padding_mode="circular"): Geometry(
        (4, 4), mode="circular", copied=((1, 2), (1, 2))
    ),
}


@pytest.mark.parametrize("layer", READ, ids=str)
def test_it_reads_the_layer(layer):
    assert Geometry.of(layer) == READ[layer]


def test_it_describes_the_layer_as_it_is_now():
    layer = nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="replicate")
    layer.stride, layer.dilation, layer.padding_mode = 1, 2, "circular"
    layer.padding = (5, 5)  # which a forward that copies pixels does not look at
    layer.weight = nn.Parameter(torch.zeros(2, 2, 5, 1))
    assert Geometry.of(layer, layer.weight) == Geometry((5, 1), (1, 1), (2, 2), 1, "circular", ((1, 1), (1, 1)))


@SETTINGS
@given(numbers, numbers, st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_taps_meet_where_two_of_them_fall_on_one_pixel(kernel, dilation, sides):
    met = False
    for n, k, d in zip(sides, kernel, dilation, strict=True):
        places = [d * t % n for t in range(k)]
        met |= len(set(places)) < k
    assert Geometry(kernel, dilation=dilation, mode="circular").taps_meet(sides) == met
    assert not Geometry(kernel, dilation=dilation, mode="zeros").taps_meet(sides)


@SETTINGS
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(2, 9))
def test_on_a_circle_every_row_is_the_first_one_turned(kernel, stride, dilation, padding, side):
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, (1, kernel), (1, stride), (0, padding), (1, dilation), padding_mode="circular")
    try:
        width = layer(torch.zeros(1, 1, 1, side)).shape[-1]
    except RuntimeError:  # the picture is smaller than the kernel or than the padding
        return
    geometry = Geometry.of(layer)
    if not geometry.is_circle((1, side)) or width * stride != side:
        return
    matrix = jacobian(layer, (1, 1, side))
    for row in range(1, width):
        torch.testing.assert_close(matrix[row], matrix[0].roll(row * stride))


@pytest.mark.parametrize("first, then", list(itertools.product([(1, 1), (2, 3), (3, 1)], repeat=2)))
@pytest.mark.parametrize("groups", [1, 2])
def test_chained_taps_are_one_convolution_after_another(first, then, groups):
    torch.manual_seed(0)
    a = torch.randn(groups, *first, 3, 2, dtype=torch.float64)  # 2 inputs, 3 in the middle
    b = torch.randn(groups, *then, 4, 3, dtype=torch.float64)
    x = torch.randn(1, 2 * groups, 7, 7, dtype=torch.float64)

    def convolved(x, taps):  # a convolution proper: torch's turns the kernel around
        kernel = taps.flip(1, 2).permute(0, 3, 4, 1, 2).flatten(0, 1)
        return F.conv2d(x, kernel, groups=groups)

    torch.testing.assert_close(convolved(x, chained(a, b)), convolved(convolved(x, a), b))

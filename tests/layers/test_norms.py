"""conv_norm is an upper bound for every picture size and padding, and a tight one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.layers import torus
from lipguide.layers.affine import orthogonal
from lipguide.layers.norms import aol_norm, conv_norm, matrix_norm, picture_norm
from tests.kernels import fill_
from tests.oracles import largest_norm, largest_singular_value, singular_values

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def convolutions(draw):
    """A random convolution and a picture that it accepts."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 3)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    inputs, outputs = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    mode = draw(st.sampled_from(["zeros", "circular"]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, r // 2)) for r in reach)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, padding_mode=mode)
    if draw(st.booleans()):  # smooth kernels have their maximum at a corner of the torus, random ones anywhere
        layer.weight.data.abs_()
    sides = [s * draw(st.integers(math.ceil((r + 1) / s), 6 + r)) for r, s in zip(reach, stride, strict=True)]
    return layer, (
        inputs,
        *(
            min(n, 12) if min(n, 12) > r and min(n, 12) % s == 0 else n
            for n, r, s in zip(sides, reach, stride, strict=True)
        ),
    )


@SETTINGS
@given(convolutions())
def test_no_picture_beats_the_bound(case):
    layer, shape = case
    bound = conv_norm(layer.weight, layer.stride, layer.dilation, layer.groups)
    assert singular_values(layer, shape)[0] <= bound


@SETTINGS
@given(convolutions())
def test_transposed_convolution_obeys_the_same_bound(case):
    layer, (_, height, width) = case
    twin = nn.ConvTranspose2d(
        layer.out_channels,
        layer.in_channels,
        layer.kernel_size,
        layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    twin.weight.data = layer.weight.data
    bound = conv_norm(twin.weight, twin.stride, twin.dilation, twin.groups)
    assert singular_values(twin, (layer.out_channels, max(1, height // 3), max(1, width // 3)))[0] <= bound


@pytest.mark.parametrize("kernel, stride, groups", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (5, 1, 2), (4, 2, 1), (2, 2, 1)])
def test_the_bound_is_within_one_percent_on_a_large_circle(kernel, stride, groups):
    torch.manual_seed(kernel)
    layer = nn.Conv2d(4, 6, kernel, stride, 0, groups=groups)
    bound = conv_norm(layer.weight, layer.stride, layer.dilation, groups)
    circle = nn.Conv2d(4, 6, kernel, stride, kernel // 2 if kernel % 2 else 0, groups=groups, padding_mode="circular")
    circle.weight.data = layer.weight.data
    if kernel % 2 == 0 and kernel > stride:
        circle.padding, circle._reversed_padding_repeated_twice = (1, 1), [1, 1, 1, 1]
    assert 0.99 * bound <= largest_singular_value(circle, (4, 32, 32)) <= bound


def test_bound_is_exact_where_the_norm_is_known():
    blur = torch.ones(1, 1, 3, 3)
    assert 9.0 <= conv_norm(blur) <= 9.0 * 1.004
    assert 3.0 <= conv_norm(torch.ones(1, 1, 3, 3), stride=(3, 3)) <= 3.0 * 1.004
    assert conv_norm(torch.zeros(2, 2, 3, 3)) == 0.0


def test_reshaped_weight_is_no_bound():
    """The trap that the chapter shows: the matrix norm of the reshaped kernel certifies nothing."""
    blur = torch.ones(1, 1, 3, 3)
    assert matrix_norm(blur.reshape(1, 9)) < 3.001 < conv_norm(blur)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_neither_overflows_nor_underflows(scale):
    torch.manual_seed(0)
    weight = torch.randn(4, 4, 3, 3)
    assert conv_norm(weight * scale) == pytest.approx(scale * conv_norm(weight), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_weight_is_not_certified(value):
    weight = torch.randn(4, 4, 3, 3)
    weight[0, 1, 2, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        conv_norm(weight)


def test_adversarial_kernel_with_its_peak_between_grid_points():
    """Kernels tuned to peak at a chosen frequency: a bound read off a grid would miss it."""
    taps = torch.arange(3.0)
    for shift in torch.linspace(0, 0.3, 7):
        a, b = 1.1 + shift, 0.7 + shift / 3
        wave = torch.cos(a * taps[:, None] + b * taps[None, :])
        other = torch.sin(a * taps[:, None] + b * taps[None, :])
        weight = torch.stack([torch.stack([wave, other]), torch.stack([-other, wave])])
        peak = 9.0  # the symbol of this rotation reaches the number of taps exactly at (a, b)
        assert peak <= conv_norm(weight) <= peak * 1.0045


def test_aol_norm_is_above_the_tight_bound():
    for seed in range(10):
        torch.manual_seed(seed)
        kernel = torch.randn(2, 3, 4, 3, 2).double()
        assert aol_norm(kernel) >= conv_norm(kernel.flatten(0, 1), groups=2) / 1.004


def outputs(layer, shape):
    with torch.no_grad():
        return tuple(layer(torch.zeros(1, *shape)).shape[-2:])


@SETTINGS
@given(convolutions())
def test_no_picture_of_its_size_beats_the_bound_for_that_size(case):
    layer, shape = case
    arguments = layer.stride, layer.dilation, layer.groups
    if layer.padding_mode == "circular":
        circle = tuple(n // s for n, s in zip(shape[1:], layer.stride, strict=True))
        bound = picture_norm(layer.weight, circle, *arguments, circular=True)
    else:
        bound = picture_norm(layer.weight, outputs(layer, shape), *arguments)
    assert singular_values(layer, shape)[0] <= bound * (1 + 1e-9)
    assert bound <= conv_norm(layer.weight, *arguments) * (1 + 1e-6)


@pytest.mark.parametrize("side, slack", [(4, 1.12), (8, 1.02), (16, 1.003), (32, 1.001)])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_bound_for_a_size_is_tight_even_on_small_pictures(side, slack, smooth):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1)
    if smooth:
        layer.weight.data.abs_()
    true = largest_singular_value(layer, (6, side, side))
    assert true <= picture_norm(layer.weight, (side, side)) <= slack * true
    circle = nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular")
    circle.weight.data = layer.weight.data
    exact = picture_norm(layer.weight, (side, side), circular=True)
    assert exact == pytest.approx(largest_singular_value(circle, (6, side, side)), rel=1e-4)


@pytest.mark.parametrize("size", [(49, 48), (3, 900)])
def test_large_pictures_are_bounded_along_one_axis(size):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 7, padding=3)
    layer.weight.data.abs_()
    bound = picture_norm(layer.weight, size)
    assert largest_singular_value(layer, (2, *size)) <= bound < conv_norm(layer.weight)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 0.3, 5.0])
def test_any_tolerance_is_sound(tolerance):
    torch.manual_seed(0)
    weight = torch.randn(3, 3, 3, 3)
    fine = conv_norm(weight, tolerance=1e-5)
    assert fine / (1 + 1e-5) <= conv_norm(weight, tolerance=tolerance) <= fine * (1 + tolerance)


def test_many_groups_and_large_kernels_fit_into_memory():
    torch.manual_seed(0)
    weight = torch.randn(64, 1, 11, 11)
    each = max(conv_norm(w[None]) for w in weight[:4])
    assert conv_norm(weight, groups=64) >= each / 1.003


def test_matrix_norm_holds_for_every_shape_and_scale():
    torch.manual_seed(0)
    for shape in [(1, 1), (5, 3), (3, 5), (40, 40)]:
        for scale in (1e-30, 1.0, 1e30):
            matrix = torch.randn(shape, dtype=torch.float64) * scale
            true = float(torch.linalg.svdvals(matrix)[0])
            assert true <= matrix_norm(matrix) <= true * (1 + 1e-6)
    assert matrix_norm(torch.zeros(3, 3)) == 0


def symbol_norm(weight: torch.Tensor, stride: int = 1, grid: int = 96) -> float:
    """The norm of a convolution on a large circle, read off a dense grid of frequencies: a lower bound."""
    size = [1 if k == 1 else grid for k in weight.shape[2:]]
    if stride == 1:
        return largest_norm(torch.fft.rfft2(weight.double(), s=size).permute(2, 3, 0, 1))
    # Frequencies that fold onto each other stand side by side.
    symbol = torch.fft.fft2(weight.double(), s=size)
    symbol = symbol.reshape(*weight.shape[:2], stride, size[0] // stride, stride, size[1] // stride)
    return largest_norm(symbol.permute(3, 5, 0, 1, 2, 4).flatten(3) / stride)


@pytest.mark.parametrize("shape, stride", [
    ((2, 3, 2, 2), 1), ((2, 3, 4, 2), 1), ((2, 3, 7, 7), 1), ((1, 1, 11, 11), 1), ((3, 2, 1, 9), 1), ((3, 2, 6, 1), 1),
    ((3, 2, 5, 5), 2), ((2, 2, 4, 4), 3),
])  # fmt: skip
@pytest.mark.parametrize("tolerance", [3e-3, 0.05, 0.5])
def test_bound_covers_every_frequency_and_stays_within_its_tolerance(shape, stride, tolerance):
    """Even, large and one-dimensional kernels; a loose tolerance starts with large cells, a tight one splits them."""
    for seed in range(4):
        torch.manual_seed(seed)
        weight = torch.randn(shape)
        if seed:
            fill_(weight, ["smooth", "wave", "whole numbers"][seed - 1])
        bound, below = conv_norm(weight, (stride, stride), tolerance=tolerance), symbol_norm(weight, stride)
        degree = (max(shape[2:]) - 1) / 2
        between = math.cos(min(1.5, 2 * degree * math.pi / 96))  # what the grid may miss, half a step on either axis
        assert below <= bound <= below / between * (1 + tolerance) * (1 + 1e-6)


def searched_poorly(monkeypatch, share):
    """Let the first search come to a share of what it finds; returns its calls, to be cleared before each norm."""
    climb, calls = torus.climb, []

    def poor(*arguments):
        calls.append(arguments)
        return climb(*arguments) * (share if len(calls) == 1 else 1.0)

    monkeypatch.setattr(torus, "climb", poor)
    return calls


@pytest.mark.parametrize("shape, groups", [((3, 2, 3, 3), 1), ((2, 3, 4, 2), 1), ((6, 2, 5, 3), 3), ((2, 2, 1, 7), 1)])
@pytest.mark.parametrize("tolerance", [3e-3, 0.5])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_the_proof_does_not_rely_on_the_search(monkeypatch, shape, groups, tolerance, share):
    """Where the first search stays far below the maximum, no cell of frequencies that may hold it is given up."""
    calls = searched_poorly(monkeypatch, share)
    for seed in range(4):
        torch.manual_seed(seed)
        weight = torch.randn(shape)
        calls.clear()
        assert conv_norm(weight, groups=groups, tolerance=tolerance) >= max(map(symbol_norm, weight.chunk(groups)))
        assert calls


def rotating_wave(a, b, kernel):
    """A convolution of two channels whose taps turn them by a from row to row and by b from column to column."""
    taps = torch.arange(kernel).double()
    angle = a * taps[:, None] + b * taps
    return torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


@pytest.mark.parametrize("kernel", [2, 5, 7, 11])
def test_a_peak_anywhere_is_found(kernel):
    """The symbol of a rotating wave reaches the number of taps at its own frequency, wherever that lies."""
    for seed in range(6):
        a, b = 2 * math.pi * torch.rand(2, generator=torch.Generator().manual_seed(seed)).double()
        weight = rotating_wave(float(a), float(b), kernel)
        assert kernel**2 <= conv_norm(weight) <= 1.004 * kernel**2


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("share", [0.98, 0.99])
def test_what_lies_near_the_peak_is_not_given_up_where_the_search_fell_a_little_short(monkeypatch, kernel, share):
    """Without the cosine, or with half the radius, cells that hold the peak would count as proved."""
    calls = searched_poorly(monkeypatch, share)
    corners = torch.zeros(kernel, kernel)
    corners[:: kernel - 1, :: kernel - 1] = 1.0
    for seed in range(12):
        a, b = 2 * math.pi * torch.rand(2, generator=torch.Generator().manual_seed(seed)).double()
        calls.clear()
        assert conv_norm(corners * rotating_wave(float(a), float(b), kernel)) >= 4 * (1 - 1e-12)
        assert calls


@pytest.mark.parametrize("kernel", [2, 5, 7, 11])
def test_where_the_maximum_is_found_at_first_it_is_not_searched_again(kernel, monkeypatch):
    """A search is most of the time that the norm of a small kernel takes."""
    weight, calls = rotating_wave(1.0, 2.5, kernel), []
    monkeypatch.setattr(torus, "climb", lambda *arguments: calls.append(arguments) or float(kernel**2))
    assert kernel**2 <= torus.torus_norm(weight[None], 3e-3) <= 1.004 * kernel**2
    assert len(calls) == 1


def test_symbols_that_are_flat_or_nearly_flat_end_the_search():
    torch.manual_seed(0)
    flat = orthogonal(nn.Conv2d(6, 6, 5)).weight.detach().double()
    for noise in (0.0, 1e-9, 1e-5, 1e-2):
        weight = flat + noise * torch.randn_like(flat)
        below = symbol_norm(weight, grid=24)
        assert below <= conv_norm(weight) <= 1.006 * below


@pytest.mark.parametrize("scale", [1e-266, 1e-133, 1e133, 1e300])
def test_norms_of_extreme_doubles(scale):
    assert conv_norm(torch.ones(2, 2, 3, 3, dtype=torch.float64) * scale) == pytest.approx(18 * scale, rel=4e-3)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf, 1e-12])
def test_a_tolerance_that_no_proof_can_keep_is_an_error(tolerance):
    for weight in (torch.randn(2, 2, 3, 3), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 3, 3)):
        with pytest.raises(ValueError, match="tolerance is"):
            conv_norm(weight, tolerance=tolerance)

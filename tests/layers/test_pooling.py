"""What pooling promises: no pair of pictures is pulled apart, and the norm-preserving layers keep gradients whole."""

import copy
import math
import re

import deel.torchlip
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.layers.pooling import (
    GlobalAvgPool2d,
    GlobalL2NormPool2d,
    InvertibleDownSampling,
    InvertibleUpSampling,
    ScaledAvgPool2d,
    ScaledL2NormPool2d,
)

few = settings(deadline=None, max_examples=25, derandomize=True)
LOCAL = [ScaledL2NormPool2d, ScaledAvgPool2d]
POOLS = {
    "ScaledL2NormPool2d": lambda: ScaledL2NormPool2d(2),
    "ScaledAvgPool2d": lambda: ScaledAvgPool2d(2),
    "GlobalL2NormPool2d": GlobalL2NormPool2d,
    "GlobalAvgPool2d": GlobalAvgPool2d,
    "InvertibleDownSampling": lambda: InvertibleDownSampling(2),
    "InvertibleUpSampling": lambda: InvertibleUpSampling(2),
}
each = pytest.mark.parametrize("make", POOLS.values(), ids=POOLS.keys())
GNP = [name for name in POOLS if "Avg" not in name]
sizes = st.integers(1, 4)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian(fn, x):
    return torch.autograd.functional.jacobian(fn, x).reshape(-1, x.numel())


def singular_values(layer, x):
    return torch.linalg.svdvals(jacobian(layer, x))


@pytest.mark.parametrize("pool", LOCAL)
@few
@given(rows=sizes, columns=sizes, down=sizes, across=sizes, spare=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_local_pooling_is_exactly_1_lipschitz(pool, rows, columns, down, across, spare, seed):
    """σ_max of the true Jacobian, windows of any shape, pictures that do not divide evenly. A constant is worst."""
    assume(spare < min(rows, columns))
    layer = pool((rows, columns))
    shape = (1, 2, rows * down + spare, columns * across + spare)
    assert singular_values(layer, randn(*shape, seed=seed))[0] <= 1 + 1e-12
    assert singular_values(layer, torch.ones(shape, dtype=torch.float64))[0] == pytest.approx(1)


@pytest.mark.parametrize("pool", [GlobalL2NormPool2d, GlobalAvgPool2d])
@few
@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_global_pooling_is_exactly_1_lipschitz(pool, height, width, seed):
    assert singular_values(pool(), randn(1, 3, height, width, seed=seed))[0] <= 1 + 1e-12
    ones = torch.ones(1, 3, height, width, dtype=torch.float64)
    assert singular_values(pool(), ones)[0] == pytest.approx(1)


@pytest.mark.parametrize("name", GNP)
@few
@given(seed=st.integers(0, 10**6))
def test_gradients_keep_their_norm(name, seed):
    """Every singular value is 1 (JJᵀ = I): a gradient of any direction comes through whole."""
    sigma = singular_values(POOLS[name](), randn(1, 4, 4, 6, seed=seed))
    torch.testing.assert_close(sigma, torch.ones_like(sigma))


def test_averages_lose_the_norm_of_the_signal_where_l2_keeps_it():
    """A checkerboard is averaged away."""
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    assert ScaledAvgPool2d(2)(checkerboard).norm() == 0
    assert ScaledL2NormPool2d(2)(checkerboard).norm() == checkerboard.norm()


def test_overlapping_windows_would_break_the_bound():
    """Why the stride must be the size: torch's max pooling, 3 by 3 with stride 2, doubles one pixel's change."""
    a = torch.zeros(1, 1, 7, 7)
    b = a.clone()
    b[0, 0, 2, 2] = 1
    apart = nn.MaxPool2d(3, 2)(b) - nn.MaxPool2d(3, 2)(a)
    assert apart.norm() / (b - a).norm() == 2
    assert (nn.MaxPool2d(3, 3)(b) - nn.MaxPool2d(3, 3)(a)).norm() <= (b - a).norm()


@pytest.mark.parametrize("pool", LOCAL)
@pytest.mark.parametrize(("size", "stride"), [(2, 1), (2, 3), (3, 2), ((2, 3), (3, 2)), (2, (2, 1))])
def test_a_stride_that_differs_is_an_error_that_says_why(pool, size, stride):
    with pytest.raises(ValueError, match="not 1-Lipschitz any more"):
        pool(size, stride)
    assert pool(size, size).kernel_size == pool(size).kernel_size


def test_known_values():
    x = torch.tensor([[1.0, 2, 3, 4], [3, 4, 1, 2]]).repeat(2, 1)[None, None]
    assert ScaledAvgPool2d(2)(x).flatten().tolist() == [5, 5, 5, 5]
    torch.testing.assert_close(ScaledL2NormPool2d(2)(x), torch.full((1, 1, 2, 2), math.sqrt(30)))
    assert GlobalAvgPool2d()(x).tolist() == [[[[10]]]]
    torch.testing.assert_close(GlobalL2NormPool2d()(x), torch.full((1, 1, 1, 1), math.sqrt(120)))


@few
@given(k=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_agrees_with_torchlip(k, seed):
    x = randn(2, 9, 6, 6, seed=seed, dtype=torch.float32)
    lip = deel.torchlip
    torch.testing.assert_close(ScaledAvgPool2d(k)(x), lip.ScaledAvgPool2d(k)(x))
    torch.testing.assert_close(ScaledL2NormPool2d(k)(x), lip.ScaledL2NormPool2d(k)(x))
    torch.testing.assert_close(GlobalAvgPool2d()(x), lip.ScaledAdaptiveAvgPool2d((1, 1))(x))
    torch.testing.assert_close(GlobalL2NormPool2d()(x), lip.ScaledAdaptativeL2NormPool2d((1, 1))(x))
    assert torch.equal(InvertibleDownSampling(k)(x), lip.InvertibleDownSampling(k)(x))
    assert torch.equal(InvertibleUpSampling(3)(x), lip.InvertibleUpSampling(3)(x))


@few
@given(height=st.integers(2, 9), width=st.integers(2, 9), k=st.integers(1, 2))
def test_shapes_are_those_of_torch(height, width, k):
    """A drop-in replacement: what does not fill a window is dropped, as torch does."""
    x = torch.zeros(2, 3, height, width)
    expected = nn.MaxPool2d(k)(x).shape
    assert ScaledL2NormPool2d(k)(x).shape == ScaledAvgPool2d(k)(x).shape == expected
    assert GlobalL2NormPool2d()(x).shape == GlobalAvgPool2d()(x).shape == nn.AdaptiveAvgPool2d(1)(x).shape


@pytest.mark.parametrize("layer", [ScaledL2NormPool2d(2), GlobalL2NormPool2d()])
def test_the_norm_has_a_finite_slope_and_curvature_at_zero(layer):
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 1, 2, 2, dtype=dtype, requires_grad=True)
        assert layer(x).item() == 0
        (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        assert slope.abs().max() == 0
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert curvature.isfinite().all()


@pytest.mark.parametrize("layer", [ScaledL2NormPool2d(2), GlobalL2NormPool2d()])
@settings(deadline=None, max_examples=60, derandomize=True)
@given(exponent=st.integers(-45, 15), seed=st.integers(0, 10**6))
def test_the_norm_is_exact_and_never_too_steep_at_any_magnitude(layer, exponent, seed):
    """Squares of small numbers vanish: neither that nor its remedy may push the slope above 1."""
    x = (randn(1, 1, 2, 2, seed=seed) * 10.0**exponent).float().requires_grad_()
    y = layer(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.double().norm() <= 1 + 1e-6
    exact = x.detach().double().norm()
    assert abs(y.item() - exact) <= 2.0**-42 + 3e-7 * exact
    if exact > 1e-5:
        assert slope.double().norm() >= 1 - 1e-6


@pytest.mark.parametrize("layer", [ScaledL2NormPool2d(2), GlobalL2NormPool2d()])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 3e4), (torch.float16, 1e-5), (torch.bfloat16, 1e-30)])
def test_half_precision_neither_overflows_nor_vanishes(layer, dtype, value):
    x = torch.zeros(1, 1, 2, 2, dtype=dtype)
    x[0, 0, 0, 1] = value
    y = layer(x)
    assert y.dtype == dtype
    assert y.double().item() == pytest.approx(x.double().norm().item(), rel=1e-2, abs=2.0**-42)


def test_dropped_pixels_get_no_gradient():
    x = torch.ones(1, 1, 5, 5, requires_grad=True)
    ScaledL2NormPool2d(2)(x).sum().backward()
    assert (x.grad[..., 4, :] == 0).all() and (x.grad[..., :, 4] == 0).all() and (x.grad[..., :4, :4] == 0.5).all()


@few
@given(k=st.integers(1, 4), down=sizes, across=sizes, channels=sizes, seed=st.integers(0, 10**6))
def test_up_sampling_inverts_down_sampling(k, down, across, channels, seed):
    x = randn(2, channels, k * down, k * across, seed=seed)
    y = InvertibleDownSampling(k)(x)
    assert y.shape == (2, channels * k * k, down, across)
    assert torch.equal(InvertibleUpSampling(k)(y), x)
    assert torch.equal(y, nn.PixelUnshuffle(k)(x))
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)


@pytest.mark.parametrize(
    ("layer", "shape", "advice"),
    [
        (InvertibleDownSampling(3), (1, 1, 7, 8), "9×9 or crop it to 6×6"),
        (InvertibleUpSampling(2), (1, 6, 2, 2), "8 would do"),
        (ScaledL2NormPool2d(3), (1, 1, 2, 5), "2×5 holds no window of 3×3"),
        (ScaledAvgPool2d((1, 4)), (1, 1, 3, 3), "3×3 holds no window of 1×4"),
        (ScaledL2NormPool2d(2), (1, 4, 4), r"\(N, C, H, W\)"),
        (GlobalL2NormPool2d(), (1, 4), r"\(N, C, H, W\)"),
        (GlobalAvgPool2d(), (1, 4, 4), r"\(N, C, H, W\)"),
    ],
)
def test_wrong_shapes_are_errors_that_say_what_would_do(layer, shape, advice):
    with pytest.raises(ValueError, match=advice):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("make", [*LOCAL, InvertibleDownSampling, InvertibleUpSampling])
def test_empty_windows_are_errors(make):
    with pytest.raises(ValueError, match="one pixel or more"):
        make(0)


@pytest.mark.parametrize("make", [*LOCAL, InvertibleDownSampling, InvertibleUpSampling])
@pytest.mark.parametrize("size", [(2, 2, 2), (2,), 2.0, (2, 2.0), "2", True, None])
def test_sizes_of_the_wrong_kind_are_errors_that_repeat_them(make, size):
    with pytest.raises(ValueError, match=f"kernel_size is {re.escape(repr(size))}|kernel_size is 2.0"):
        make(size)


@pytest.mark.parametrize("make", [InvertibleDownSampling, InvertibleUpSampling])
def test_invertible_windows_are_square(make):
    with pytest.raises(ValueError, match=r"kernel_size is \(2, 2\): .* a whole number"):
        make((2, 2))


@each
def test_empty_batches_and_nan_pass_through(make):
    layer = make()
    assert layer(torch.zeros(0, 4, 4, 4)).shape[0] == 0
    x = torch.zeros(1, 4, 4, 4)
    x[0, 0, 1, 1] = math.nan
    assert layer(x).isnan().any()


@each
def test_survives_compile_and_deepcopy_and_has_no_state(make):
    layer, x = make(), randn(2, 4, 4, 4, dtype=torch.float32).requires_grad_()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not layer.state_dict()


@each
def test_works_on_channels_last_pictures(make):
    x = randn(2, 4, 4, 6, dtype=torch.float32)
    torch.testing.assert_close(make()(x.to(memory_format=torch.channels_last)), make()(x))

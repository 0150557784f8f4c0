"""Blocks keep the bound: by the true Jacobian, before and after training, whatever the size."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.layers.blocks import BatchCentering, Concat, PadChannels, Patches, Residual
from tests.oracles import randn, sigma_max, true_jacobian

few = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 10**6)


def orthogonal(features, seed=0):
    layer = nn.Linear(features, features, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(randn(features, features, seed=seed)).Q)
    return layer


# Residual, concatenation, patches, padding


@few
@given(seed=seeds)
def test_residual_and_concat_are_1_lipschitz_and_no_less(seed):
    """With 1-Lipschitz branches σ_max ≤ 1; with identities it is reached, and without the factors it is 2 and √2."""
    x = randn(2, 4, seed=seed)
    turn, other = orthogonal(4, seed), orthogonal(4, seed + 1)
    assert sigma_max(Residual(turn), x) <= 1 + 1e-12
    assert sigma_max(Concat(turn, other, nn.Identity()), x) == pytest.approx(1)
    assert sigma_max(Residual(nn.Identity()), x) == pytest.approx(1)
    assert sigma_max(lambda x: x + nn.Identity()(x), x) == pytest.approx(2)
    assert sigma_max(lambda x: torch.cat((x, turn(x)), 1), x) == pytest.approx(math.sqrt(2))


def test_concat_keeps_gradients_and_residual_need_not():
    x = randn(1, 6)
    j = true_jacobian(Concat(orthogonal(6), nn.Identity()), x)
    torch.testing.assert_close(j.T @ j, torch.eye(6, dtype=x.dtype))
    assert torch.linalg.svdvals(true_jacobian(Residual(orthogonal(6)), x)).min() < 0.9


def test_a_branch_that_would_broadcast_is_an_error():
    with pytest.raises(ValueError, match="must keep the shape"):
        Residual(nn.Linear(4, 1))(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one branch or more"):
        Concat()


@few
@given(size=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=seeds)
def test_patches_equal_a_loop_over_patches(size, rows, columns, seed):
    x = randn(2, 3, rows * size, columns * size, seed=seed)
    linear = nn.Linear(3 * size * size, 5, dtype=x.dtype)
    vectors = Patches(nn.Sequential(nn.Flatten(), linear), size)(x)
    pictures = Patches(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, dtype=x.dtype)), size)
    tiled = pictures(x)
    for i in range(rows):
        for j in range(columns):
            window = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            patch = x[:, :, window[0], window[1]]
            torch.testing.assert_close(vectors[:, :, i, j], linear(patch.flatten(1)))
            torch.testing.assert_close(tiled[:, :, window[0], window[1]], pictures.fn(patch))
    assert vectors.shape == (2, 5, rows, columns) and tiled.shape == (2, 4, *x.shape[2:])


@few
@given(seed=seeds)
def test_patches_are_as_lipschitz_as_their_function(seed):
    """Exactly as much, no more and no less, whatever the number of patches."""
    torch.manual_seed(seed)
    x = randn(1, 2, 6, 4, seed=seed)
    fn = nn.Linear(8, 3, dtype=x.dtype)
    layer = Patches(nn.Sequential(nn.Flatten(), fn), 2)
    assert sigma_max(layer, x) == pytest.approx(torch.linalg.matrix_norm(fn.weight, 2).item())


def test_patches_that_overlap_would_break_the_bound():
    """What the guide leaves unsaid: cut 2×2 patches at every pixel, and a pixel is counted four times."""
    x = randn(1, 1, 5, 5)
    assert sigma_max(lambda x: nn.functional.unfold(x, 2), x) == pytest.approx(2)


def test_patches_say_what_does_not_fit():
    with pytest.raises(ValueError, match="8×12"):
        Patches(nn.Identity(), 4)(torch.zeros(1, 1, 7, 10))
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        Patches(nn.Identity(), 4)(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="back in place"):
        Patches(nn.Flatten(2), 2)(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="size is 0"):
        Patches(nn.Identity(), 0)
    assert Patches(nn.Identity(), 2)(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_padding_channels_is_an_isometry():
    x = randn(1, 2, 3, 3)
    j = true_jacobian(PadChannels(5), x)
    torch.testing.assert_close(j.T @ j, torch.eye(x.numel(), dtype=x.dtype))
    assert torch.equal(PadChannels(2)(x), x)
    with pytest.raises(ValueError, match="can only add"):
        PadChannels(1)(x)


# Centering


@few
@given(batch=st.integers(2, 5), extra=st.sampled_from([(), (3,), (2, 2)]), seed=seeds)
def test_centering_in_training_projects_the_batch(batch, extra, seed):
    """1-Lipschitz as a map of the batch (a projection), in each sample, and an isometry between its samples."""
    layer = BatchCentering(2).double()
    x = randn(batch, 2, *extra, seed=seed)
    j = true_jacobian(layer, x)
    torch.testing.assert_close(j @ j, j)
    torch.testing.assert_close(j, j.T)
    one_sample = j.reshape(batch, x[0].numel(), batch, x[0].numel())[:, :, 0].flatten(0, 1)
    assert torch.linalg.matrix_norm(one_sample, 2) <= 1 + 1e-12
    y = layer(x)
    torch.testing.assert_close(y[0] - y[1], x[0] - x[1])
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).mean(1), torch.zeros(2, dtype=x.dtype), atol=1e-12, rtol=0)


def test_centering_in_eval_mode_is_a_shift():
    layer = BatchCentering(3).double()
    layer(randn(8, 3, 4, 4) + 5)
    layer.eval()
    x = randn(1, 3, 2, 2, seed=1)
    torch.testing.assert_close(true_jacobian(layer, x), torch.eye(12, dtype=x.dtype))
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_the_running_mean_is_the_plain_mean_at_first_and_forgets_later():
    layer = BatchCentering(1, momentum=0.25)
    for i, expected in enumerate([1.0, 1.5, 2.0, 2.5, 2.5 + (5 - 2.5) / 4], 1):
        layer(torch.tensor([[i - 1.0], [i + 1.0]]))
        assert layer.running_mean.item() == pytest.approx(expected)
    assert layer.batches.item() == 5


def test_centering_learns_its_bias_and_reloads_its_state():
    layer = BatchCentering(2)
    layer(randn(4, 2, dtype=torch.float32)).sum().backward()
    assert layer.bias.grad.tolist() == [4, 4]
    twin = BatchCentering(2)
    twin.load_state_dict(layer.state_dict())
    x = randn(3, 2, seed=1, dtype=torch.float32)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("shape", [(1, 2), (1, 2, 1, 1), (0, 2, 4, 4)])
def test_centering_refuses_to_wipe_out_a_batch_of_one_value(shape):
    with pytest.raises(ValueError, match="one value a channel"):
        BatchCentering(2)(torch.zeros(shape))
    assert BatchCentering(2).eval()(torch.zeros(shape)).shape == shape
    with pytest.raises(ValueError, match=r"BatchCentering\(3\)"):
        BatchCentering(3)(torch.zeros(4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_centering_works_in_half_precision(dtype):
    layer = BatchCentering(3).to(dtype)
    y = layer(randn(8, 3, 4, 4).to(dtype) + 2)
    assert y.dtype == dtype and y.double().mean().abs() < 0.02
    assert layer.running_mean.double().mean() == pytest.approx(2, abs=0.2)

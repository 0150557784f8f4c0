"""Blocks keep the bound: by the true Jacobian, by gradient search, before and after training, whatever the size."""

import copy
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthogonium.layers.conv.SLL.sll_layer import SDPBasedLipschitzDense
from torch import nn
from torch.nn.utils import parametrize

from lipguide.bounds.below import most_stretched_pair, stretch
from lipguide.layers.activations import Householder
from lipguide.layers.blocks import BatchCentering, Concat, PadChannels, Patches, Residual
from lipguide.layers.pooling import InvertibleDownSampling
from lipguide.layers.sll import SLL, SLLLinear

few = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 10**6)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian(fn, x):
    return torch.autograd.functional.jacobian(fn, x).reshape(-1, x.numel())


def sigma_max(fn, x):
    return torch.linalg.matrix_norm(jacobian(fn, x), 2).item()


def frozen(block):
    """The block with the weights that float32 gave it, evaluated in float64: what is measured is the bound alone.

    (remove_parametrizations on a copy would take `weight` from the original too: copies share their class.)
    """
    block = copy.deepcopy(block)
    for part in block.modules():
        if parametrize.is_parametrized(part):
            weight = part.weight.detach()
            del part.parametrizations
            part.__class__ = type(part).__base__
            part.weight = nn.Parameter(weight)
    return block.double()


def orthogonal(features, seed=0):
    layer = nn.Linear(features, features, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(randn(features, features, seed=seed)).Q)
    return layer


def disturb(block, seed=0, weight=1.0, log_q=0.0, bias=0.3):
    """Parameters far from their initial values."""
    with torch.no_grad():
        parameters = block.parametrizations.weight
        parameters.original.copy_(weight * randn(*parameters.original.shape, seed=seed))
        parameters[0].log_q.copy_(log_q * randn(*parameters[0].log_q.shape, seed=seed + 1))
        block.bias.copy_(bias * randn(*block.bias.shape, seed=seed + 2))
    return block


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
    j = jacobian(Concat(orthogonal(6), nn.Identity()), x)
    torch.testing.assert_close(j.T @ j, torch.eye(6, dtype=x.dtype))
    assert torch.linalg.svdvals(jacobian(Residual(orthogonal(6)), x)).min() < 0.9


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
    j = jacobian(PadChannels(5), x)
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
    j = jacobian(layer, x)
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
    torch.testing.assert_close(jacobian(layer, x), torch.eye(12, dtype=x.dtype))
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


# SLL


def test_sll_known_values():
    block = SLLLinear(2, 2, iterations=0)
    block.parametrizations.weight.original.data = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    for x, y in [((1, 2), (-1, -2)), ((1, -2), (1, -2)), ((2, -1), (4 / 3, -5 / 3))]:
        torch.testing.assert_close(block(torch.tensor([x]).float()), torch.tensor([y]).float(), rtol=2e-4, atol=0)
    scalar = SLLLinear(1, 1)
    for w, sign in [(0.7, -1), (-3.0, 1)]:
        nn.init.constant_(scalar.parametrizations.weight.original, w)
        x = torch.tensor([[-2.0], [1.5]])
        torch.testing.assert_close(scalar(x), sign * x.abs(), rtol=2e-4, atol=0)


@few
@given(seed=seeds)
def test_dense_sll_is_that_of_the_paper_with_its_q(seed):
    """orthogonium's dense block, whose q works: the same T without Gram iteration, the bias moved through T^(-1/2)."""
    theirs, ours = SDPBasedLipschitzDense(5, 5, 7), disturb(SLLLinear(5, 7, iterations=0), seed, log_q=1.0)
    with torch.no_grad():
        theirs.weight.copy_(ours.parametrizations.weight.original)
        theirs.q.copy_(ours.parametrizations.weight[0].log_q)
        theirs.bias.copy_(randn(1, 7, seed=seed))
        ours.bias.copy_(theirs.bias[0] * theirs.compute_t().sqrt())
        x = randn(9, 5, seed=seed, dtype=torch.float32)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_a_householder_activation_is_the_smallest_sll():
    activation = Householder(2)
    nn.init.constant_(activation.theta, 0.7)
    block = SLLLinear(2, 1)
    block.parametrizations.weight.original.data = torch.tensor([[math.sin(0.35), -math.cos(0.35)]])
    x = randn(20, 2, dtype=torch.float32)
    torch.testing.assert_close(block(x), activation(x), rtol=1e-3, atol=2e-4)


@few
@given(
    channels=st.integers(1, 4),
    inner=st.integers(1, 6),
    k_and_mode=st.sampled_from([*product((1, 3, 5), ("zeros", "circular")), (2, "zeros"), (4, "zeros")]),
    height=st.integers(2, 4),
    width=st.integers(2, 4),
    log_q=st.sampled_from([0.0, 8.0]),
    seed=seeds,
)
def test_the_true_jacobian_of_sll_never_exceeds_1(channels, inner, k_and_mode, height, width, log_q, seed):
    """It is symmetric, with eigenvalues in [−1, 1]: two convolutions that are each other's adjoint, at any border."""
    block = frozen(disturb(SLL(channels, inner, *k_and_mode), seed, log_q=log_q))
    j = jacobian(block, randn(1, channels, height, width, seed=seed))
    torch.testing.assert_close(j, j.T)
    assert torch.linalg.eigvalsh(j).abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_sll_works_on_a_picture_of_one_pixel(k):
    block = frozen(disturb(SLL(3, 4, k)))
    assert sigma_max(block, randn(1, 3, 1, 1)) <= 1 + 1e-12  # what the oracle itself rounds
    assert block(randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@few
@given(features=st.integers(1, 8), inner=st.integers(1, 12), log_q=st.sampled_from([0.0, 8.0]), seed=seeds)
def test_the_true_jacobian_of_dense_sll_never_exceeds_1(features, inner, log_q, seed):
    block = frozen(disturb(SLLLinear(features, inner), seed, log_q=log_q))
    assert sigma_max(block, randn(1, features, seed=seed)) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SLL(4, 6, 3), (8, 4, 5, 5)),
        (lambda: SLL(4, 4, 3, "circular"), (8, 4, 4, 4)),
        (lambda: SLL(4, 3, 5), (8, 4, 4, 4)),
        (lambda: SLL(4, 6, 2), (8, 4, 5, 4)),
        (lambda: SLLLinear(10, 14), (8, 10)),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_hundred_steps_at_a_high_rate_do_not_break_the_bound(make, shape, autocast):
    """Training that tries to break it: it maximises the stretch of a pair, which it learns as well."""
    torch.manual_seed(0)
    block = make()
    a, b = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    optimizer = torch.optim.Adam([*block.parameters(), a, b], lr=0.1, maximize=True)
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            apart = (block(a) - block(b)).float().norm() / (a - b).norm()
        apart.backward()
        optimizer.step()
    assert 0.9 < stretch(frozen(block), a.detach().double(), b.detach().double()) <= 1 + 1e-9
    assert sigma_max(frozen(block), a[:1].detach().double()) <= 1 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sll_with_half_precision_weights_keeps_the_bound(dtype):
    """The weights that half precision stores, measured in float64; the sums that it rounds are another matter."""
    block = disturb(SLL(4, 6, 3)).to(dtype)
    assert block(randn(2, 4, 5, 5).to(dtype)).dtype == dtype
    assert sigma_max(frozen(block), randn(1, 4, 5, 5)) <= 1 + 1e-9


def test_gradients_keep_their_norm_through_twenty_blocks_at_the_start():
    """Orthonormal filters reflect: no signal is lost, neither forwards nor backwards, nor at the border."""
    torch.manual_seed(0)
    for stack, shape in [
        (nn.Sequential(*[SLL(8, 8, 3) for _ in range(20)]), (2, 8, 6, 6)),
        (nn.Sequential(*[SLL(8, 5, 5) for _ in range(20)]), (2, 8, 6, 6)),
        (nn.Sequential(*[SLLLinear(16, 16) for _ in range(20)]), (2, 16)),
    ]:
        x = torch.randn(shape, requires_grad=True)
        y = stack(x)
        direction = torch.randn(shape)
        (gradient,) = torch.autograd.grad(y, x, direction)
        assert (gradient.norm() / direction.norm()).item() == pytest.approx(1, abs=3e-3)
        assert (y.norm() / x.norm()).item() == pytest.approx(1, abs=3e-3)


def test_a_stack_of_sll_learns_at_once_what_needs_neighbouring_pixels():
    """Horizontal or vertical stripes: the initial filters must see more than one pixel. It takes forty steps."""
    torch.manual_seed(0)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8)
    labels = torch.arange(64) % 2
    pictures = torch.stack([stripes if label else stripes.T for label in labels])[:, None]
    pictures = pictures * (2 * torch.randint(0, 2, (64, 1, 1, 1)) - 1) + 0.5 * torch.randn(64, 1, 8, 8)
    net = nn.Sequential(PadChannels(8), SLL(8, 8), SLL(8, 8), nn.Flatten(), nn.Linear(512, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(pictures), labels).backward()
        optimizer.step()
    assert (net(pictures).argmax(1) == labels).float().mean() > 0.95


def test_zero_filters_make_the_identity_and_can_still_be_trained():
    for block, x in [(SLL(3, 4), randn(2, 3, 4, 4).float()), (SLLLinear(3, 4), randn(2, 3).float())]:
        nn.init.zeros_(block.parametrizations.weight.original)
        nn.init.ones_(block.bias)
        assert torch.equal(block(x), x)
        block(x).square().sum().backward()
        gradient = block.parametrizations.weight.original.grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_channels_and_stride_change_without_a_loss():
    """Space to depth and padded channels are isometries: the whole stage keeps the norm of every gradient."""
    torch.manual_seed(0)
    stage = nn.Sequential(PadChannels(4), SLL(4, 4), InvertibleDownSampling(2), SLL(16, 16), PadChannels(20))
    j = jacobian(frozen(stage), randn(1, 3, 4, 4))
    torch.testing.assert_close(torch.linalg.svdvals(j), torch.ones(48, dtype=j.dtype), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: SLL(3, 5, 3), (2, 3, 6, 5)), (lambda: SLL(3, 5, 4), (2, 3, 6, 5)), (lambda: SLLLinear(6, 4), (2, 6))],
)
def test_sll_survives_caching_export_compile_deepcopy_and_state_dict(make, shape):
    block, x = disturb(make(), log_q=1.0), randn(*shape, dtype=torch.float32)
    y = block(x)
    with parametrize.cached():
        torch.testing.assert_close(block(x), y)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager")(x), y)
    twin = make()
    twin.load_state_dict(block.state_dict())
    assert torch.equal(twin(x), y) and torch.equal(copy.deepcopy(block)(x), y)
    parametrize.remove_parametrizations(block, "weight")
    torch.testing.assert_close(block(x), y)
    assert set(block.state_dict()) == {"weight", "bias"}


def test_an_sll_block_is_two_plain_layers_and_a_difference():
    """What an export needs: V from `weight`, the same kernel in both directions."""
    block, x = disturb(SLL(3, 5)), randn(2, 3, 6, 6, dtype=torch.float32)
    down, up = nn.Conv2d(3, 5, 3, padding=1), nn.ConvTranspose2d(5, 3, 3, padding=1, bias=False)
    with torch.no_grad():
        down.weight.copy_(block.weight)
        down.bias.copy_(block.bias)
        up.weight.copy_(2 * block.weight)
    torch.testing.assert_close(x - up(nn.functional.relu(down(x))), block(x))


def test_every_parameter_of_sll_gets_a_gradient():
    """DistributedDataParallel stops at one that does not."""
    for block, x in [(disturb(SLL(3, 4)), randn(2, 3, 5, 5).float()), (disturb(SLLLinear(3, 4)), randn(8, 3).float())]:
        block(x).square().mean().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())


def test_sll_repeats_bit_for_bit():
    def run():
        torch.manual_seed(3)
        block, x = SLL(4, 4), randn(2, 4, 6, 6, dtype=torch.float32)
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        for _ in range(3):
            block(x).square().mean().backward()
            optimizer.step()
        return block(x)

    assert torch.equal(run(), run())


def test_sll_says_what_does_not_fit():
    with pytest.raises(ValueError, match="needs an odd one"):
        SLL(3, 3, 2, "circular")
    for size in (0, (3, 5)):
        with pytest.raises(ValueError, match="are square, so give it a whole number"):
            SLL(3, 3, size)
    with pytest.raises(ValueError, match="keep the bound"):
        SLL(3, 3, 3, "reflect")
    with pytest.raises(ValueError, match="smaller than the circular padding of 2"):
        SLL(3, 3, 5, "circular")(torch.zeros(1, 3, 1, 8))


# The guide's other layers


def attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 1, batch_first=True, dtype=torch.float64)
    return lambda x: layer(x, x, x)[0]


def batch_norm(training):
    layer = nn.BatchNorm1d(4, dtype=torch.float64).train(training)
    nn.init.constant_(layer.running_var, 0.25)
    return layer


SAFE = {
    "flatten": (nn.Flatten(), (2, 3, 2, 2)),
    "reshape": (nn.Unflatten(1, (2, 2)), (2, 4)),
    "dropout at inference": (nn.Dropout(0.5).eval(), (2, 8)),
    "half an addition": (Residual(nn.Identity()), (2, 4)),
    "concatenation over √2": (Concat(nn.Identity(), nn.Identity()), (2, 4)),
    "patches": (Patches(nn.Flatten(), 2), (1, 1, 4, 4)),
    "centering": (BatchCentering(4).double(), (6, 4)),
}
FORBIDDEN = {  # at least this stretch must be found
    "batch norm in training": (batch_norm(True), (6, 4), 2.0),
    "batch norm at inference": (batch_norm(False), (6, 4), 1.99),
    "layer norm": (nn.LayerNorm(8, dtype=torch.float64), (1, 8), 2.0),
    "dropout in training": (nn.Dropout(0.5), (2, 8), 1.99),
    "addition": (lambda x: x + x, (2, 4), 1.99),
    "concatenation": (lambda x: torch.cat((x, x), 1), (2, 4), 1.41),
    "self-attention": (attention(), (1, 5, 4), 1.05),
}


@pytest.mark.parametrize(("fn", "shape"), SAFE.values(), ids=SAFE.keys())
def test_the_search_breaks_no_safe_layer(fn, shape):
    assert most_stretched_pair(fn, randn(*shape), steps=100).stretch <= 1 + 1e-9


@pytest.mark.parametrize(("fn", "shape", "least"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_the_search_finds_a_pair_that_breaks_each_forbidden_layer(fn, shape, least):
    pair = most_stretched_pair(fn, randn(*shape), steps=300)
    assert pair.stretch >= least
    assert stretch(fn, pair.a, pair.b) == pytest.approx(pair.stretch)
    assert (pair.a - pair.b).norm() == pytest.approx(0.1)


def test_self_attention_has_no_bound_at_all():
    """The further out the search starts, the more it finds: from one pair to the next the stretch doubles and more."""
    pair = most_stretched_pair(attention(), randn(1, 5, 4))
    for _ in range(4):
        further = most_stretched_pair(attention(), 1.5 * pair.a)
        assert further.stretch > 2 * pair.stretch
        pair = further
    assert pair.stretch > 100


def test_the_search_leaves_modules_and_random_numbers_alone():
    layer = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = copy.deepcopy(layer.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    most_stretched_pair(layer, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), steps=3)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_stretch_is_a_ratio_of_distances():
    assert stretch(lambda x: 3 * x, torch.zeros(2, 2), torch.ones(2, 2)) == pytest.approx(3)
    with pytest.raises(ValueError, match="two that differ"):
        stretch(nn.Identity(), torch.ones(2), torch.ones(2))

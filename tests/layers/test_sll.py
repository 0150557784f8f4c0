"""SLL keeps the bound: by the true Jacobian, by gradient search, before and after training, whatever the size."""

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

from lipguide.bounds.below import stretch
from lipguide.layers.activations import Householder
from lipguide.layers.blocks import PadChannels
from lipguide.layers.pooling import InvertibleDownSampling
from lipguide.layers.sll import SLL, SLLLinear
from tests.oracles import randn, sigma_max, true_jacobian

few = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 10**6)


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


def disturb(block, seed=0, weight=1.0, log_q=0.0, bias=0.3):
    """Parameters far from their initial values."""
    with torch.no_grad():
        parameters = block.parametrizations.weight
        parameters.original.copy_(weight * randn(*parameters.original.shape, seed=seed))
        parameters[0].log_q.copy_(log_q * randn(*parameters[0].log_q.shape, seed=seed + 1))
        block.bias.copy_(bias * randn(*block.bias.shape, seed=seed + 2))
    return block


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
    j = true_jacobian(block, randn(1, channels, height, width, seed=seed))
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
    j = true_jacobian(frozen(stage), randn(1, 3, 4, 4))
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

"""The scale of SLL: sound for every kernel, every frequency and every precision, tight, and learned through q."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthogonium.layers.conv.AOL.aol import AOLReparametrizer
from torch import nn
from torch.nn.utils import parametrize

from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.blocks import PadChannels
from lipguide.layers.gram import GramScale, between_frequencies, diagonal_bound, off_centre
from lipguide.layers.sll import SLL
from tests.oracles import largest_norm

few = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 10**6)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(v, side=60):
    """The norm of a matrix or of a convolution on a large circular picture: dense frequencies, in float64."""
    v = v.detach().double()
    if v.dim() == 4:
        v = torch.fft.rfft2(v, s=(side, side)).permute(2, 3, 0, 1)
    return largest_norm(v)


def zero_padded_matrix(v, height, width):
    """The convolution as the matrix it is on a small picture with zero padding."""
    basis = torch.eye(v.shape[1] * height * width, dtype=torch.float64).reshape(-1, v.shape[1], height, width)
    return torch.nn.functional.conv2d(basis, v.detach().double(), padding=v.shape[-1] // 2).flatten(1).T


def scaled(filters, iterations=3, log_q=None):
    scale = GramScale(filters.shape, iterations).to(filters.dtype).eval()
    if log_q is not None:
        with torch.no_grad():
            scale.log_q.copy_(log_q)
    return scale(filters)


@few
@given(
    inner=st.integers(1, 9),
    channels=st.integers(1, 9),
    k=st.sampled_from([0, 1, 2, 3, 4, 5]),
    iterations=st.integers(0, 6),
    spread=st.sampled_from([0, 1, 10, 60]),
    decades=st.sampled_from([0, 3, 12]),
    seed=seeds,
)
def test_the_norm_is_at_most_1(inner, channels, k, iterations, spread, decades, seed):
    """Any shape (k = 0: a matrix), q far from 1, filters of very different size."""
    filters = randn(*(inner, channels, k, k) if k else (inner, channels), seed=seed)
    filters = filters * torch.logspace(-decades, 0, inner).view(-1, *[1] * (filters.dim() - 1))
    v = scaled(filters, iterations, spread * randn(inner, seed=seed + 1))
    assert v.isfinite().all()
    assert norm(v) <= 1
    assert norm(v) > 0.5


@few
@given(k=st.sampled_from([2, 3, 4, 5]), height=st.integers(1, 5), width=st.integers(1, 5), seed=seeds)
def test_the_norm_is_at_most_1_with_zero_padding_on_tiny_pictures(k, height, width, seed):
    v = scaled(randn(3, 2, k, k, seed=seed))
    assert torch.linalg.matrix_norm(zero_padded_matrix(v, height, width), 2) <= 1


@pytest.mark.parametrize("iterations", range(7))
def test_a_symbol_that_peaks_between_the_frequencies_is_no_loophole(iterations):
    """The extremal kernel of the proof: cos(ω₁ + φ) cos(ω₂ + φ) with its peak in the middle of a cell of the grid."""
    density = max(4, 2 * iterations)
    angle = math.pi / (2 * density)

    def rotation(t):
        c, s = math.cos(t), math.sin(t)
        return torch.tensor([[c, -s], [s, c]])

    filters = torch.zeros(2, 2, 3, 3)
    for i in (-1, 1):
        for j in (-1, 1):
            filters[:, :, 1 + i, 1 + j] = rotation((i + j) * angle) / 4
    v = scaled(filters, iterations)
    assert norm(v, side=4 * density) <= 1
    assert norm(v, side=4 * density) > 0.999  # the allowance is used up: no smaller one would do


def test_random_directions_never_stretch_a_large_picture():
    v = scaled(randn(8, 6, 3, 3)).double()
    x = randn(200, 6, 20, 20, seed=1).double()
    for _ in range(30):  # power iteration
        x = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        y = torch.nn.functional.conv2d(x, v, padding=1)
        assert (y.flatten(1).norm(dim=1) <= 1).all()
        x = torch.nn.functional.conv_transpose2d(y, v, padding=1).detach()


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 3, 3), (96, 24, 3, 3), (24, 24, 5, 5)])
def test_the_bound_is_tight_and_tighter_with_each_iteration(shape):
    """The larger matrices, where float32 rounding could add up, stay below 1 as well."""
    norms = [norm(scaled(randn(*shape), m), side=32) for m in range(6)]
    assert all(a < b <= 1 for a, b in zip(norms, norms[1:], strict=False))
    assert norms[3] > 0.9 and norms[4] > 0.95 and norms[5] > 0.97


def test_the_docstring_of_sll_states_the_measured_norms():
    filters = randn(64, 64, 3, 3)
    measured = [norm(scaled(filters, m), side=32) for m in range(6)]
    assert measured == pytest.approx([0.58, 0.73, 0.81, 0.92, 0.96, 0.97], abs=0.015)
    public_code = AOLReparametrizer(64, groups=1)
    assert norm(public_code(filters), side=32) == pytest.approx(0.36, abs=0.015)


@few
@given(inner=st.integers(1, 6), channels=st.integers(6, 8), k=st.sampled_from([0, 1, 3, 5]), seed=seeds)
def test_orthonormal_filters_of_one_tap_each_are_left_alone(inner, channels, k, seed):
    """No loss where none is due: an isometry stays one, to the margin of rounding."""
    filters = torch.linalg.qr(randn(channels, inner, seed=seed)).Q.T
    if k:
        spots = torch.zeros(inner, channels, k * k)
        where = torch.randint(k * k, (inner,), generator=torch.Generator().manual_seed(seed))
        spots[torch.arange(inner), :, where] = filters
        filters = spots.view(inner, channels, k, k)
    torch.testing.assert_close(scaled(filters), filters, rtol=5e-5, atol=1e-6)


def test_plain_row_sums_are_those_of_the_papers():
    """AOL's example, and T_ii = Σ_j |KKᵀ|_ij q_j / q_i."""
    v = scaled(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), iterations=0)
    torch.testing.assert_close(v, torch.tensor([[0.70711, 0.0], [0.57735, 0.57735]]), rtol=1e-4, atol=0)
    filters, log_q = randn(5, 7), randn(5, seed=1)
    q = log_q.exp()
    t = ((filters @ filters.T).abs() * q / q[:, None]).sum(1)
    torch.testing.assert_close(scaled(filters, 0, log_q), filters / t.sqrt()[:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 6, 3, 3), (6, 4, 3, 3)])
@pytest.mark.parametrize("iterations", [0, 3])
def test_q_has_an_effect_and_equals_a_scale_of_the_filters(shape, iterations):
    filters, log_q = randn(*shape), randn(shape[0], seed=1)
    v = scaled(filters, iterations, log_q)
    assert (v - scaled(filters, iterations)).abs().max() > 0.02
    column = log_q.exp().view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(v, scaled(filters * column, iterations), rtol=1e-4, atol=1e-6)
    scale = GramScale(shape, iterations).eval()
    (scale(filters) * randn(*shape, seed=2)).sum().backward()
    assert scale.log_q.grad.abs().min() > 0


def test_the_public_code_lets_q_cancel():
    """The defect that this module repairs, so that the book can say so."""
    filters, theirs = randn(4, 6, 3, 3), AOLReparametrizer(4, groups=1)
    before = theirs(filters)
    torch.nn.init.normal_(theirs.q)
    torch.testing.assert_close(theirs(filters), before)


@pytest.mark.parametrize("shape", [(4, 5), (5, 3), (3, 4, 3, 3), (5, 2, 3, 3), (2, 2, 5, 5), (3, 3, 1, 1)])
@pytest.mark.parametrize("iterations", [0, 2])
def test_the_gradient_is_that_of_the_value(shape, iterations):
    """Although the gradient is taken at the few frequencies that matter."""
    scale = GramScale(shape, iterations).double().eval()
    filters = randn(*shape, dtype=torch.float64).requires_grad_()

    def value(weight, log_q):
        return torch.func.functional_call(scale, {"log_q": log_q}, (weight,))

    log_q = randn(shape[0], seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(value, (filters, log_q))


@pytest.mark.parametrize("shape", [(6, 4), (6, 6, 3, 3), (9, 4, 3, 3)])
def test_the_value_is_the_same_with_and_without_a_gradient(shape):
    filters = randn(*shape)
    with torch.no_grad():
        inference = scaled(filters)
    assert torch.equal(scaled(filters.requires_grad_()).detach(), inference)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3, 3), (6, 2, 3, 3)])
@pytest.mark.parametrize("case", ["zero", "zero row", "huge", "tiny", "denormal", "twins", "wide q"])
def test_degenerate_filters_give_finite_values_and_gradients(shape, case):
    filters = randn(*shape)
    log_q = torch.zeros(shape[0])
    if case == "zero":
        filters.zero_()
    if case == "zero row":
        filters[1] = 0
    if case in ("huge", "tiny", "denormal"):
        filters *= {"huge": 1e35, "tiny": 1e-30, "denormal": 1e-42}[case]
    if case == "twins":
        filters[:] = filters[0].clone()
    if case == "wide q":
        log_q = torch.linspace(-200, 200, shape[0])
    filters.requires_grad_()
    v = scaled(filters, 3, log_q)
    v.square().sum().backward()
    assert v.isfinite().all() and norm(v) <= 1
    # V does not depend on the size of the filters, so the gradient grows as they shrink: of 1e-42 it overflows.
    assert filters.grad.isfinite().all() or case == "denormal"
    assert (v[1] == 0).all() if case in ("zero", "zero row") else norm(v) > 0.5


def test_nan_is_not_certified_away():
    filters = randn(3, 3, 3, 3)
    filters[0, 0, 0, 0] = math.nan
    assert scaled(filters).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3, 3), (1, 1, 3, 3)])
def test_weights_rounded_to_half_precision_keep_the_bound(dtype, shape):
    """The rounded weights themselves, measured in float64."""
    for seed in range(5):
        v = scaled(randn(*shape, seed=seed).to(dtype))
        assert v.dtype == dtype
        assert 0.85 < norm(v) <= 1


def test_autocast_does_not_touch_the_scale():
    filters = randn(8, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = scaled(filters)
    assert torch.equal(inside, scaled(filters))


def test_rounded_matrix_products_are_avoided():
    """'medium' lets torch round products to bfloat16, 'high' to TF32: the scale must not follow."""
    filters = randn(24, 24, 3, 3)
    expected = scaled(filters.double()).float()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(scaled(filters), expected, rtol=1e-4, atol=1e-7)
        assert norm(scaled(filters)) <= 1
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_bound_holds_for_each_matrix_given():
    """diag(T) − FFᴴ has no negative eigenvalue, for complex matrices, tall and wide."""
    for n, c in [(3, 6), (6, 3), (4, 4)]:
        f = torch.complex(randn(5, n, c, dtype=torch.float64), randn(5, n, c, seed=1, dtype=torch.float64))
        for iterations in range(5):
            t = diagonal_bound(f, iterations)
            slack = torch.linalg.eigvalsh(torch.diag(t) - f @ f.mH)
            assert slack.min() >= -1e-12 * t.max()


@few
@given(k=st.sampled_from([3, 5, 7]), density=st.integers(4, 12), seed=seeds)
def test_the_allowance_between_frequencies_holds_for_random_kernels(k, density, seed):
    v = randn(2, 3, k, k, seed=seed, dtype=torch.float64) * torch.rand(1, 1, k, k, dtype=torch.float64) ** 4
    on_grid = norm(v, side=density * (k - 1))
    allowance = between_frequencies(off_centre(v / on_grid), density)
    assert norm(v, side=8 * density * (k - 1)) <= on_grid * allowance.item() * (1 + 1e-12)


def test_negative_iterations_are_an_error():
    with pytest.raises(ValueError, match="iterations is -1"):
        GramScale((3, 3), -1)


def regular_hadamard(powers: int) -> torch.Tensor:
    """Entries ±1, orthogonal rows, and the same sum in every row."""
    block = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(powers):
        matrix = torch.kron(matrix, block)
    return matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("powers", [3, 4])
def test_roundings_that_all_point_one_way_do_not_stretch(dtype, powers):
    """‖V‖ is 1 and ‖|V|‖ is 8 or 16: errors of half a unit in all entries, of one sign, may add up to as many."""
    signs, unit = regular_hadamard(powers), torch.finfo(dtype).eps
    norms = []
    for units in range(1, 50):
        filters = (signs + units * unit).to(dtype)
        norms.append(norm(GramScale(filters.shape, 8).to(dtype).eval()(filters)))
    assert 0.97 < max(norms) <= 1


@few
@given(
    n=st.integers(1, 12),
    c=st.integers(1, 12),
    k=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    spread=st.sampled_from([0, 3, 9]),
    seed=seeds,
)
def test_half_precision_of_any_kind_keeps_the_bound(n, c, k, dtype, spread, seed):
    """Filters in half precision themselves, of very different sizes: some entries lie below the smallest number."""
    filters = randn(*(n, c, k, k) if k else (n, c), seed=seed)
    filters = filters * 10 ** (-spread * torch.rand(filters.shape, generator=torch.Generator().manual_seed(seed)))
    scale = GramScale(filters.shape, 3).to(dtype).eval()
    v = scale(filters.to(dtype))
    assert v.dtype == dtype and norm(v) <= 1


def test_the_room_for_rounding_costs_one_unit_and_no_gradient():
    for dtype in (torch.float16, torch.bfloat16):
        filters = randn(48, 48, 3, 3).requires_grad_()
        scale = GramScale(filters.shape, 3).eval()
        wide = scale(filters)
        half = scale.rounded(scale.constrained(filters), dtype)
        torch.testing.assert_close(half.detach().float(), wide.detach(), rtol=3 * torch.finfo(dtype).eps, atol=1e-5)
        (half.float() * randn(48, 48, 3, 3, seed=1)).sum().backward()
        assert filters.grad.isfinite().all()


# In training a few frequencies are watched.

A_TURN = 45  # steps in which all frequencies of a 3×3 kernel have been watched


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (24, 6, 3, 3), (12, 12, 2, 2), (8, 8, 5, 5)])
def test_after_a_turn_training_knows_the_scale_within_a_few_per_cent(shape):
    """Never too small a V, for what is watched is a part of the grid; and the gradient points the same way."""
    filters = randn(*shape).requires_grad_()
    direction = randn(*shape, seed=1)
    scale = GramScale(shape, 3)
    with torch.no_grad():
        for _ in range(A_TURN if shape[-1] < 5 else 140):
            scale.train()(filters)
    watched, proved = scale.train()(filters), scale.eval()(filters)
    larger = watched.flatten(1).norm(dim=1) / proved.flatten(1).norm(dim=1)
    assert larger.min() > 1 - 1e-5 and larger.max() < 1.07 and larger.mean() < 1.015
    near = torch.autograd.grad((watched * direction).sum(), filters)[0].flatten()
    exact = torch.autograd.grad((proved * direction).sum(), filters)[0].flatten()
    assert torch.cosine_similarity(near, exact, 0) > 0.99


def test_a_peak_anywhere_on_the_grid_is_found_within_a_turn():
    """A filter that answers to one frequency: before it is watched V is too large, later it is not."""
    for row, column in [(5, 4), (11, 3)]:
        t = torch.arange(5.0) * (2 * math.pi / 24)
        filters = torch.cos(row * t[:, None] + column * t)[None, None]
        scale = GramScale(filters.shape, 3)
        with torch.no_grad():
            for _ in range(160):
                trained = scale.train()(filters)
        assert norm(trained) < 1.02


def test_one_tap_filters_and_matrices_are_the_same_in_training():
    filters = torch.zeros(6, 6, 3, 3)
    filters[torch.arange(6), :, torch.arange(6) % 3, 1] = torch.linalg.qr(randn(6, 6)).Q
    for each in (filters, randn(5, 7), randn(5, 7, 1, 1)):
        scale = GramScale(each.shape, 3)
        torch.testing.assert_close(scale.train()(each), scale.eval()(each), rtol=1e-5, atol=1e-6)


def test_what_is_watched_is_saved_and_files_without_it_load():
    filters = randn(6, 6, 3, 3)
    scale = GramScale(filters.shape, 3)
    for _ in range(5):
        scale.train()(filters)
    state = copy.deepcopy(scale.state_dict())
    expected = [scale(filters).detach() for _ in range(50)]
    again = GramScale(filters.shape, 3)
    again.load_state_dict(state)
    assert all(torch.equal(again(filters), v) for v in expected)
    old = {"log_q": randn(6)}
    again.load_state_dict(old)
    assert torch.equal(again.log_q, old["log_q"])
    with pytest.raises(RuntimeError, match="log_q"):
        again.load_state_dict({"watched": state["watched"]})


def test_a_scale_in_training_does_not_vouch_for_a_bound():
    """Even if the block itself is in eval mode: what it watches need not be the largest."""
    t = torch.arange(5.0) * (2 * math.pi / 24)
    block = SLL(1, 1, 5).eval()
    block.parametrizations.weight.original.data = torch.cos(5 * t[:, None] + 4 * t)[None, None]
    block.parametrizations.train()
    v = block.weight
    assert norm(v) > 1.01
    with parametrize.cached():
        parametrize._cache[(id(block), "weight")] = v
        assert block.lipschitz(1.0, None) >= 2 * norm(v) ** 2 - 1
    with pytest.raises(ValueError, match="training"):
        lipschitz_bound(block, (1, 6, 6))


class Exact(GramScale):
    """The scale of eval mode, in training as well."""

    def _watched_bound(self, kernel):
        return self._proved_bound(kernel)


def network(kind: type[GramScale], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [SLL(8, 8, 3) for _ in range(2)]
    for block in blocks:
        nn.init.normal_(block.parametrizations.weight.original)
        block.parametrizations.weight[0].__class__ = kind
    return nn.Sequential(PadChannels(8), *blocks, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(32, 4))


def train(model: nn.Module, rate: float, steps: int) -> float:
    """The hinge at margin 1 on pictures of four patterns in noise; returns that of eval mode on new ones."""
    patterns = randn(4, 3, 6, 6, seed=7)
    optimizer = torch.optim.Adam(model.parameters(), rate)

    def hinge(seed: int) -> torch.Tensor:
        labels = torch.randint(4, (48,), generator=torch.Generator().manual_seed(seed))
        logits = model(0.3 * patterns[labels] + 0.5 * randn(48, 3, 6, 6, seed=seed))
        return nn.functional.multi_margin_loss(logits, labels)

    for step in range(steps):
        optimizer.zero_grad()
        hinge(step).backward()
        optimizer.step()
    with torch.no_grad():
        return float(sum(hinge(10_000 + k) for k in range(8))) / 8 if model.eval() else math.nan


@pytest.mark.parametrize("rate", [3e-3, 0.3])
def test_a_network_trains_as_well_as_with_the_exact_scale_and_is_bounded_at_any_rate(rate):
    cheap, exact = network(GramScale, 0), network(Exact, 0)
    losses = train(cheap, rate, 60), train(exact, rate, 60)
    if rate < 0.01:
        assert losses[0] < 1.05 * losses[1] + 0.005
    for block in cheap[1:3]:
        assert norm(block.weight) <= 1
        x = randn(1, 8, 4, 4)
        jacobian = torch.autograd.functional.jacobian(block, x).reshape(-1, x.numel())
        assert torch.linalg.matrix_norm(jacobian.double(), 2) <= 1 + 1e-5

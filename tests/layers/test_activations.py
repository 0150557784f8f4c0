"""What the activations promise: values permuted or reflected, gradients as long as they came."""

import copy
import math

import deel.torchlip
import orthogonium.layers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lipguide as lip
from lipguide.layers.activations import FullSort, GroupSort, GroupSort2, Householder, MaxMin, MaxMinDouble

few = settings(deadline=None, max_examples=25, derandomize=True)
CHANNELS = 12
ALL = {
    "GroupSort(3)": lambda: GroupSort(3),
    "GroupSort(4)": lambda: GroupSort(4),
    "GroupSort2": GroupSort2,
    "MaxMin": MaxMin,
    "MaxMinDouble": MaxMinDouble,
    "FullSort": FullSort,
    "Householder": lambda: tilted(Householder(CHANNELS)),
}
each = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
shapes = st.lists(st.integers(1, 3), max_size=3)


def tilted(layer):
    with torch.no_grad():
        layer.theta.copy_(torch.linspace(-4, 7, layer.theta.numel()))
    return layer


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian(fn, x):
    return torch.autograd.functional.jacobian(fn, x).reshape(-1, x.numel())


@each
@few
@given(extra=shapes, seed=st.integers(0, 10**6))
def test_the_jacobian_is_an_isometry_for_any_rank(make, extra, seed):
    """Gradient norm preserving: JᵀJ = I wherever the inputs differ."""
    x = randn(1, CHANNELS, *extra, seed=seed)
    j = jacobian(make().double(), x)
    torch.testing.assert_close(j.T @ j, torch.eye(x.numel(), dtype=x.dtype))


@each
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_the_gradient_keeps_its_norm_where_all_channels_are_equal(make, value):
    """Ties are no rarity: a black background, padded channels. The Jacobian must stay an isometry there."""
    j = jacobian(make().double(), torch.full((1, CHANNELS), value, dtype=torch.float64))
    torch.testing.assert_close(j.T @ j, torch.eye(CHANNELS, dtype=torch.float64))


@each
@few
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_pair_of_inputs_is_pulled_apart(make, seed, scale):
    a, b = randn(1, CHANNELS, 3, seed=seed), randn(1, CHANNELS, 3, seed=seed + 1) * scale
    layer = make().double()
    with torch.no_grad():
        assert (layer(a) - layer(b)).norm() <= (a - b).norm() * (1 + 1e-12)


@few
@given(size=st.integers(2, 7), groups=st.integers(1, 4), extra=shapes, seed=st.integers(0, 10**6))
def test_group_sort_sorts_each_group_by_brute_force(size, groups, extra, seed):
    x = randn(2, size * groups, *extra, seed=seed)
    y = GroupSort(size)(x)
    for g in range(groups):
        part = x[:, g * size : (g + 1) * size].movedim(1, -1).reshape(-1, size).tolist()
        expected = torch.tensor([sorted(row) for row in part], dtype=x.dtype)
        assert torch.equal(y[:, g * size : (g + 1) * size].movedim(1, -1).reshape(-1, size), expected)


def test_known_values():
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert GroupSort2()(x).tolist() == [[3, 4, 1, 2]]
    assert GroupSort(4)(x).tolist() == FullSort()(x).tolist() == [[1, 2, 3, 4]]
    assert MaxMin()(x).tolist() == [[4, 3, 2, 1]]
    assert MaxMinDouble()(torch.tensor([[2.0, -3.0, 0.0]])).tolist() == [[2, 0, 0, 0, 3, 0]]


@pytest.mark.parametrize(
    ("theta", "x", "y"),
    [(math.pi / 2, (3, 1), (1, 3)), (0.0, (-3, -1), (-3, 1)), (math.pi, (3, 1), (-3, 1)), (math.pi, (-3, 1), (-3, 1))],
)
def test_householder_known_values(theta, x, y):
    layer = Householder(2)
    nn.init.constant_(layer.theta, theta)
    torch.testing.assert_close(layer(torch.tensor([x]).float()), torch.tensor([y]).float())


@few
@given(extra=shapes, seed=st.integers(0, 10**6))
def test_agrees_with_torchlip_and_orthogonium(extra, seed):
    x = randn(2, CHANNELS, *extra, seed=seed, dtype=torch.float32)
    assert torch.equal(GroupSort2()(x), deel.torchlip.GroupSort2()(x))
    assert torch.equal(GroupSort(3)(x), deel.torchlip.GroupSort(3)(x))
    assert torch.equal(FullSort()(x), deel.torchlip.FullSort()(x))
    assert torch.equal(MaxMinDouble()(x), deel.torchlip.MaxMin()(x))
    assert torch.equal(MaxMin()(x), orthogonium.layers.MaxMin()(x))
    ours, theirs = tilted(Householder(CHANNELS)), deel.torchlip.HouseHolder(CHANNELS)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_householder_starts_as_min_max():
    x = randn(5, 8, 3, 3, dtype=torch.float32)
    a, b = x.chunk(2, 1)
    torch.testing.assert_close(Householder(8)(x), torch.cat((torch.minimum(a, b), torch.maximum(a, b)), 1))


def test_householder_is_continuous_across_the_mirror():
    """The two half-planes meet: a jump there would have no Lipschitz bound at all."""
    layer = tilted(Householder(CHANNELS)).double()
    v = torch.cat(((layer.theta / 2).sin(), -(layer.theta / 2).cos())).detach()[None]
    along = randn(1, CHANNELS)
    a, b = along.chunk(2, 1)
    va, vb = v.chunk(2, 1)
    on_mirror = along - torch.cat(((a * va + b * vb) * va, (a * va + b * vb) * vb), 1)
    step = 1e-9 * v
    assert (layer(on_mirror + step) - layer(on_mirror - step)).norm() <= step.norm() * 2 * (1 + 1e-6)


def test_householder_learns_its_angles():
    torch.manual_seed(0)
    layer = Householder(2)
    target = -0.8
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    x = torch.randn(256, 2)
    goal = Householder(2)
    nn.init.constant_(goal.theta, target)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - goal(x).detach()).square().mean().backward()
        optimizer.step()
    assert abs(layer.theta.item() - target) < 0.02


def gradient_norm_through_twenty_layers(activation, width=32):
    torch.manual_seed(0)
    x = start = torch.randn(16, width, dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        q = nn.init.orthogonal_(torch.empty(width, x.shape[1], dtype=torch.float64))
        x = activation(x @ q.T)
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(x, start, direction)
    return float(gradient.norm() / direction.norm())


@pytest.mark.parametrize("activation", [GroupSort2(), GroupSort(8), MaxMin(), FullSort(), Householder(32)])
def test_gradients_keep_their_norm_through_twenty_layers(activation):
    assert gradient_norm_through_twenty_layers(activation.double()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh()])
def test_ordinary_activations_lose_the_gradient_in_twenty_layers(activation):
    assert gradient_norm_through_twenty_layers(activation) < 0.3


def test_doubling_channels_and_halving_them_again_loses_gradients_like_relu():
    """The guide lists it as norm preserving: so it is for signals, not for gradients (JᵀJ = I, but JJᵀ ≠ I)."""
    assert gradient_norm_through_twenty_layers(MaxMinDouble()) < 2 * gradient_norm_through_twenty_layers(nn.ReLU())


@each
def test_training_and_inference_give_the_same_values(make):
    x = randn(3, CHANNELS, 4, dtype=torch.float32).round(decimals=1)  # rounded: with ties
    layer = make()
    with torch.no_grad():
        inference = layer(x)
    assert torch.equal(layer(x.requires_grad_()).detach(), inference)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_precision_of_its_input(make, dtype):
    x = randn(4, CHANNELS, 2, 2).to(dtype)
    y = make()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), make().double()(x.double()), atol=0.03, rtol=0)


def test_half_precision_parameters_do_not_lengthen_the_mirror_vector():
    x = randn(64, CHANNELS).bfloat16()
    y = tilted(Householder(CHANNELS)).bfloat16()(x)
    assert y.double().norm() <= x.double().norm() * 1.01


@each
def test_empty_batches_and_nan_pass_through(make):
    layer = make()
    assert layer(torch.zeros(0, CHANNELS, 2)).shape[0] == 0
    x = torch.zeros(1, CHANNELS)
    x[0, 3] = math.nan
    assert layer(x).isnan().any()
    assert layer(x.requires_grad_()).isnan().any()


@each
def test_survives_compile_deepcopy_and_a_state_dict_round_trip(make):
    layer, x = make(), randn(2, CHANNELS, 3, dtype=torch.float32).requires_grad_()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    twin = copy.deepcopy(layer)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape", "advice"),
    [
        (GroupSort(5), (1, 12), "15 would do"),
        (GroupSort2(), (1, 3, 2, 2), "4 would do"),
        (MaxMin(), (1, 7), "8 would do"),
        (FullSort(), (4,), r"\(N, C\)"),
        (MaxMinDouble(), (4,), r"\(N, C\)"),
        (Householder(4), (1, 6), "got 6 channels"),
    ],
)
def test_wrong_shapes_are_errors_that_say_what_would_do(layer, shape, advice):
    with pytest.raises(ValueError, match=advice):
        layer(torch.zeros(shape))


@pytest.mark.parametrize(
    "make", [lambda: GroupSort(1), lambda: GroupSort(0), lambda: Householder(3), lambda: Householder(0)]
)
def test_senseless_sizes_are_errors(make):
    with pytest.raises(ValueError, match="is [0-3]"):
        make()


@pytest.mark.parametrize("kind", [GroupSort, Householder])
@pytest.mark.parametrize("size", [2.0, True, "2", (2,), None])
def test_sizes_of_the_wrong_kind_are_errors(kind, size):
    with pytest.raises(ValueError, match="whole number"):
        kind(size)


@pytest.mark.parametrize("make", [GroupSort2, MaxMin])
def test_sorted_pairs_pass_every_kind_of_derivative(make):
    """Backward, double backward, forward mode, transforms and the compiler agree, with and without ties."""
    layer, x = make(), randn(2, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True) and torch.autograd.gradgradcheck(layer, x)
    for point in (x.detach(), torch.zeros(1, 6, dtype=x.dtype)):
        expected = torch.autograd.functional.jacobian(layer, point)
        assert torch.equal(torch.func.jacrev(layer)(point), expected)
        assert torch.equal(torch.autograd.functional.jacobian(layer, point, vectorize=True), expected)
        rows = torch.func.vmap(torch.func.jacrev(lambda z: layer(z[None])[0]))(point)
        assert torch.equal(rows[0], expected[0, ..., 0, :, :] if point.dim() == 3 else expected[0, :, 0])
        again = point.clone().requires_grad_()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(again)
        assert torch.equal(compiled, layer(point))
        (gradient,) = torch.autograd.grad(compiled.square().sum(), again)
        assert torch.equal(gradient, torch.autograd.grad(layer(again).square().sum(), again)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [GroupSort2, MaxMin])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_is_permuted_to_the_last_bit(make, dtype, layout):
    """Also where it is no number, endless, a negative zero, or one number for all channels."""
    sorts = make is GroupSort2

    def pairs(values):
        return values.unflatten(1, (3, 2)).unbind(2) if sorts else values.chunk(2, 1)

    layer, x = make(), randn(3, 6, 4, 5).to(dtype).to(memory_format=layout)
    x[0].round_()  # with ties
    a, b = pairs(x)
    given = randn(3, 6, 4, 5).to(dtype)
    given[0, :, 0], given[1, :, 0], given[2, :, 0] = torch.nan, -torch.inf, -0.0
    for gradient in (given, given.to(memory_format=layout), given[:, :1].expand(3, 6, 4, 5)):
        again = x.clone().requires_grad_()
        low, high = pairs(gradient) if sorts else reversed(pairs(gradient))
        wanted = torch.where(a > b, high, low), torch.where(a > b, low, high)
        for side, right in zip(pairs(torch.autograd.grad(layer(again), again, gradient)[0]), wanted, strict=True):
            assert torch.equal(side.isnan(), right.isnan()) and torch.equal(side.signbit(), right.signbit())
            assert torch.equal(side.nan_to_num(7), right.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_householder_in_half_precision_is_bounded_with_the_directions_that_it_has(dtype):
    torch.manual_seed(0)
    block = Householder(64)
    block.theta.data.normal_()
    block = block.to(dtype).eval()
    half_angle = block.theta.detach().float() / 2
    v = torch.stack((half_angle.sin(), -half_angle.cos())).to(dtype).double()
    reflections = torch.eye(2, dtype=torch.float64) - 2 * torch.einsum("ip,jp->pij", v, v)
    true = torch.linalg.matrix_norm(reflections, ord=2).max().item()
    assert true > 1 + 1e-5
    for model in (block, lip.export(block)):
        bound = lip.lipschitz_bound(model, (64, 1, 1)).value
        assert true * (1 - 1e-12) <= bound < true * 1.001

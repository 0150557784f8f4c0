"""Every constraint of lipguide.layers.affine, held against the true Jacobian: at initialisation and after training."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from lipguide.layers.affine import (
    aol,
    clip,
    constrain_,
    frobenius,
    l2_normalized,
    near_identity,
    orthogonal,
    spectral,
    unit_rows,
)
from lipguide.layers.export import export
from lipguide.layers.norms import conv_norm
from tests.kernels import WEIGHTS, fill_
from tests.networks import SOUND
from tests.oracles import largest_singular_value, singular_values

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def affine_layers(draw, for_orthogonal=False):
    """A random affine layer and the shape of an input that it accepts."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["dense", "conv", "conv", "circular", "transposed"]))
    if kind == "dense":
        inputs, outputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        return nn.Linear(inputs, outputs), (inputs,)
    groups = draw(st.sampled_from([1, 1, 2]))
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    smallest = stride if for_orthogonal else 1
    kernel = draw(st.integers(smallest, max(smallest, 5)))
    inputs, outputs = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 5))
    side = stride * draw(st.integers(math.ceil(kernel / stride), 7 if stride == 1 else 3))
    if kind == "transposed":
        layer = nn.ConvTranspose2d(
            inputs, outputs, kernel, stride, draw(st.integers(0, (kernel - 1) // 2)), groups=groups
        )
        return layer, (inputs, 3, 4)
    mode = "circular" if kind == "circular" else "zeros"
    padding = (kernel - 1) // 2 if kind == "circular" else draw(st.integers(0, (kernel - 1) // 2))
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, padding_mode=mode)
    return layer, (inputs, side, side)


@st.composite
def odd_convolutions(draw):
    """Any mixture of sides, strides, dilations, groups and paddings that torch accepts, however unusual."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    inputs, outputs = (groups * draw(st.integers(1, 1 if groups == 5 else 3)) for _ in range(2))
    kernel = draw(st.sampled_from([pair(1, 6), (1, draw(st.integers(1, 9))), (draw(st.integers(1, 9)), 1)]))
    stride = draw(st.sampled_from([(1, 1), pair(1, 4)]))
    dilation = draw(st.sampled_from([(1, 1), pair(1, 4)]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    height, width = pair(1, 9)
    kind = draw(st.sampled_from(["zeros", "circular", "transposed"]))
    if kind == "transposed":
        padding = tuple(draw(st.integers(0, r + 1)) for r in reach)
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, extra, groups, dilation=dilation)
        height, width = min(height, 4), min(width, 4)
    else:
        if kind == "circular":
            padding = tuple(draw(st.integers(0, r // 2)) for r in reach)
            height, width = (math.ceil(n / s) * s for n, s in zip((height, width), stride, strict=True))
        else:
            padding = tuple(draw(st.integers(0, r + 3)) for r in reach)
        if stride == (1, 1):
            padding = draw(st.sampled_from([padding, "same", "valid"]))
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, padding_mode=kind)
    fill_(layer.weight.data, draw(st.sampled_from(WEIGHTS)))
    return layer, (inputs, height, width)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("fn", [spectral, frobenius, aol, orthogonal])
def test_no_odd_geometry_and_no_structured_kernel_beats_the_constraint(fn):
    checked = 0

    @SETTINGS
    @given(odd_convolutions())
    def check(case):
        nonlocal checked
        layer, shape = case
        try:
            accepted = layer(torch.zeros(1, *shape)).numel() > 0
        except RuntimeError:  # the kernel is larger than the padded picture, or the circle shorter than its padding
            return
        if not accepted:
            return
        try:
            layer = fn(layer).eval()
        except ValueError as error:
            assert fn is orthogonal and ("skips pixels" in str(error) or "use one of the two" in str(error))
            return
        checked += 1
        assert singular_values(layer, shape)[0] <= 1 + 1e-5, (layer, shape)

    check()
    assert checked >= 5


def train(layer: nn.Module, shape: tuple[int, ...], steps: int = 20, rate: float = 0.3) -> nn.Module:
    """Steps at a rate far too high, towards outputs that the constraint cannot reach."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    layer.train()
    x = torch.randn(4, *shape)
    target = 100 * torch.randn_like(layer(x).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return layer.eval()


@pytest.mark.parametrize("fn", SOUND)
def test_no_singular_value_above_one(fn):
    @SETTINGS
    @given(affine_layers(for_orthogonal=fn is orthogonal))
    def check(case):
        layer, shape = case
        layer = fn(layer).eval()
        assert singular_values(layer, shape)[0] <= 1 + 1e-5
        assert singular_values(train(layer, shape), shape)[0] <= 1 + 1e-5

    check()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side, reach", [(32, 0.99), (12, 0.95)])
@pytest.mark.parametrize("trained", [False, True])
def test_spectral_is_tight_on_ordinary_pictures(transposed, side, reach, trained):
    torch.manual_seed(side)
    layer = spectral((nn.ConvTranspose2d if transposed else nn.Conv2d)(6, 6, 3, padding=1)).eval()
    if trained:
        train(layer, (6, 16, 16))
    assert reach <= largest_singular_value(layer, (6, side, side)) <= 1 + 1e-5


def test_spectral_is_tight_for_the_hardest_kernel():
    """A blur loses most at the border: the picture's edge, not the bound, decides how close to 1 it comes."""
    layer = nn.Conv2d(1, 1, 3, padding=1)
    layer.weight.data.fill_(1.0)
    spectral(layer).eval()
    assert largest_singular_value(layer, (1, 32, 32)) >= 0.99
    assert largest_singular_value(layer, (1, 12, 12)) >= 0.95


@pytest.mark.parametrize("stride, kernel", [(1, 3), (1, 5), (2, 3), (2, 5), (2, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_spectral_is_tight_on_circles(stride, kernel, groups):
    torch.manual_seed(kernel)
    layer = nn.Conv2d(4, 6, kernel, stride, (kernel - 1) // 2, groups=groups, padding_mode="circular")
    assert 0.99 <= largest_singular_value(spectral(layer).eval(), (4, 32, 32)) <= 1 + 1e-5


def test_spectral_stays_near_one_while_training():
    """The power iteration that training uses is a lower bound of the norm, and a close one."""
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(16, 16, 3, padding=1))
    x, target = torch.randn(8, 16, 10, 10), torch.randn(8, 16, 10, 10)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    norms = []
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        frozen = copy.deepcopy(layer)  # the copy's own power step leaves the original's state alone
        norms.append(conv_norm(frozen.weight))
    assert min(norms) > 0.97 and max(norms) < 1.08


@SETTINGS
@given(affine_layers(for_orthogonal=True))
def test_orthogonal_has_all_singular_values_one(case):
    layer, shape = case
    exact = isinstance(layer, nn.Linear) or layer.padding_mode == "circular" or layer.kernel_size == layer.stride
    if not exact:
        return
    if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > layer.stride[0]:
        # "same" padding on the circle: even kernels too
        layer.padding_mode, layer.padding = "circular", "same" if layer.stride == (1, 1) else layer.padding
        pad = layer.kernel_size[0] - 1
        layer._reversed_padding_repeated_twice = [pad // 2, pad - pad // 2] * 2
    elif not isinstance(layer, nn.Linear):
        layer.padding = (0, 0)
        layer._reversed_padding_repeated_twice = [0, 0, 0, 0]
    orthogonal(layer)
    for _ in range(2):
        values = singular_values(layer.eval(), shape)
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1) and layer.kernel_size[0] > layer.stride[0]:
            values = values[: min(layer.in_channels * shape[1] * shape[2], len(values))]
        assert abs(values[0] - 1) <= 1e-3 and abs(values[-1] - 1) <= 1e-3, (layer, shape, values[[0, -1]])
        train(layer, shape)


@pytest.mark.parametrize("inputs, outputs", [(3, 16), (16, 3), (8, 8), (5, 20), (1, 4)])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (2, 2), (3, 2), (4, 2), (5, 2), (5, 3)])
def test_orthogonal_convolution_of_any_channels_and_stride(inputs, outputs, kernel, stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, padding_mode="circular")
    side = 4 * stride
    values = singular_values(train(orthogonal(layer), (inputs, side, side), steps=5), (inputs, side, side))
    assert abs(values[0] - 1) <= 1e-3 and abs(values[-1] - 1) <= 1e-3


def test_orthogonal_preserves_the_norm_of_what_it_does_not_discard():
    torch.manual_seed(0)
    layer = orthogonal(nn.Conv2d(4, 16, 2, stride=2, bias=False))
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_orthogonal_starts_from_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    nn.init.orthogonal_(layer.weight)
    before = layer.weight.clone()
    torch.testing.assert_close(orthogonal(layer).weight, before, atol=1e-6, rtol=0)


@SETTINGS
@given(affine_layers())
def test_unit_rows_have_norm_one(case):
    layer, shape = case
    if getattr(layer, "groups", 1) > 1:
        with pytest.raises(ValueError, match="use groups=1"):
            unit_rows(layer)
        return
    train(unit_rows(layer), shape, steps=3)
    matrix = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        matrix = matrix.transpose(0, 1)
    torch.testing.assert_close(matrix.flatten(1).norm(dim=1), torch.ones(len(matrix)))


def test_l2_normalized_is_not_a_certificate():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    layer.weight.data.fill_(1.0)
    assert largest_singular_value(l2_normalized(layer), (1, 32, 32)) > 2.9


def test_clip_clips():
    layer = clip(nn.Linear(20, 20), 0.05)
    assert layer.weight.abs().max() <= 0.05
    with pytest.raises(ValueError, match="limit"):
        clip(nn.Linear(2, 2), 0.0)


def test_eval_uses_the_weights_of_the_last_step_not_of_the_step_before():
    torch.manual_seed(0)
    for fn in (spectral, orthogonal, aol, frobenius, unit_rows):
        layer = fn(nn.Conv2d(3, 4, 3, padding=1))
        x = torch.randn(2, 3, 8, 8)
        layer.eval()(x)  # a proof is made here and must not outlive the next step
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        layer.train()(x).square().sum().backward()
        optimizer.step()
        fresh = fn(nn.Conv2d(3, 4, 3, padding=1))
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer.eval()(x), fresh.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("edit", ["data", "no_grad", "load"])
def test_spectral_is_proved_again_however_the_weight_was_changed(edit):
    layer = spectral(nn.Conv2d(2, 2, 3, padding=1)).eval()
    layer(torch.randn(1, 2, 8, 8))
    raw = layer.parametrizations.weight.original
    bigger = raw.detach() * 3 + 1
    if edit == "data":
        raw.data = bigger
    elif edit == "no_grad":
        with torch.no_grad():
            raw.copy_(bigger)
    else:
        layer.load_state_dict({**layer.state_dict(), "parametrizations.weight.original": bigger})
    assert 0.98 <= largest_singular_value(layer, (2, 24, 24)) <= 1 + 1e-5


@pytest.mark.parametrize("fn", [*SOUND, unit_rows, l2_normalized, partial(clip, limit=0.1)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1)])
def test_state_dict_round_trip_and_deepcopy(fn, make):
    torch.manual_seed(0)
    layer = fn(make()).eval()
    other = fn(make())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 8, 8)
    for twin in (other.eval(), copy.deepcopy(layer)):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("fn", [*SOUND, unit_rows, l2_normalized])
def test_half_precision_trains_and_returns_to_a_certificate(fn):
    torch.manual_seed(0)
    layer = fn(nn.Conv2d(4, 4, 3, padding=1)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert layer.weight.dtype == torch.bfloat16 and bool(torch.isfinite(layer.weight).all())
    if fn in SOUND:
        assert singular_values(layer.float().eval(), (4, 8, 8))[0] <= 1 + 1e-5


@pytest.mark.parametrize("fn", SOUND)
def test_autocast_leaves_the_constraint_in_float32(fn):
    torch.manual_seed(0)
    layer = fn(nn.Conv2d(4, 4, 3, padding=1)).eval()
    plain = layer.weight.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, plain)


@pytest.mark.parametrize("fn", [*SOUND, unit_rows])
def test_compiled_layers_agree(fn):
    torch.manual_seed(0)
    layer = fn(nn.Conv2d(3, 4, 3, padding=1)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))
    trained = torch.compile(layer.train(), backend="aot_eager")
    trained(x).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


@pytest.mark.parametrize("fn", SOUND)
def test_a_zero_weight_stays_finite(fn):
    layer = nn.Conv2d(2, 2, 3)
    layer.weight.data.zero_()
    layer = fn(layer)
    for mode in (layer.train(), layer.eval()):
        assert bool(torch.isfinite(mode(torch.randn(1, 2, 5, 5))).all())


@pytest.mark.parametrize("fn", [*SOUND, unit_rows, l2_normalized])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Linear(4, 3), (4,)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 6, 6)),
        (lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=2), (4, 6, 6)),
        (lambda: nn.ConvTranspose2d(4, 4, 3), (4, 5, 5)),
    ],
)
def test_training_leaves_a_weight_of_zeros(fn, make, shape):
    """Divided by its norm, the smallest number, the gradient at zero would overflow in the first step."""
    torch.manual_seed(0)
    layer = make()
    if fn is unit_rows and getattr(layer, "groups", 1) > 1:  # which it refuses
        return
    nn.init.zeros_(layer.weight)
    train(fn(layer), shape, steps=5)
    assert bool(torch.isfinite(layer.weight).all()) and bool((layer.weight != 0).any())
    if fn in SOUND:
        assert singular_values(layer, shape)[0] <= 1 + 1e-5


@pytest.mark.parametrize("fn", [orthogonal, aol, frobenius, unit_rows])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.Conv2d(2, 4, 3, stride=2)])
def test_gradients_are_those_of_finite_differences(fn, make):
    torch.manual_seed(0)
    layer = fn(make().double())
    held = layer.parametrizations.weight
    raws = [held.original] if hasattr(held, "original") else [held.original0, held.original1]
    assert torch.autograd.gradcheck(held[0], tuple(r.detach().clone().requires_grad_() for r in raws), atol=1e-5)


def test_gradient_of_spectral_is_orthogonal_to_the_weight():
    """W/σ does not change when W is scaled, so neither does any function of it."""
    torch.manual_seed(0)
    layer = spectral(nn.Linear(5, 5))
    layer.weight.square().sum().backward()
    raw = layer.parametrizations.weight.original
    assert abs((raw.grad * raw).sum().item()) < 1e-3 * raw.grad.norm() * raw.norm()


def test_constrain_projects_every_affine_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    constrain_(net, spectral)
    assert not parametrize.is_parametrized(net[0])
    assert 0.95 <= largest_singular_value(net[0], (3, 24, 24)) <= 1 + 1e-5
    assert singular_values(net[3], (144,))[0] <= 1 + 1e-5
    before = net[3].weight.clone()
    constrain_(net, spectral)
    torch.testing.assert_close(net[3].weight, before)
    constrain_(net[3], orthogonal)
    assert singular_values(net[3], (144,))[-1] >= 1 - 1e-5


def test_orthogonal_convolutions_have_no_projection():
    with pytest.raises(ValueError, match="no projection"):
        constrain_(nn.Sequential(nn.Conv2d(2, 2, 3)), orthogonal)


BAD = [
    (spectral, lambda: nn.LSTM(3, 3), "LSTM"),
    (spectral, lambda: nn.Conv1d(3, 3, 3), "Conv1d"),
    (spectral, lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "reflect"),
    (aol, lambda: nn.Conv2d(3, 3, 3, padding=2, padding_mode="circular"), "twice"),
    (orthogonal, lambda: nn.Conv2d(3, 3, 1, stride=2), "at least as large as the stride"),
    (orthogonal, lambda: nn.Conv2d(3, 3, 3, stride=2, dilation=2), "use one of the two"),
    (frobenius, lambda: spectral(nn.Linear(2, 2)), "already constrained by Spectral"),
]


@pytest.mark.parametrize("fn, make, message", BAD)
def test_layers_that_cannot_be_constrained_say_why(fn, make, message):
    with pytest.raises(ValueError, match=message):
        fn(make())


def test_a_diverged_weight_is_refused():
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        spectral(layer)


def test_strided_circles_refuse_sides_that_the_stride_does_not_divide():
    layer = spectral(nn.Conv2d(1, 1, 3, stride=2, padding=1, padding_mode="circular")).eval()
    layer(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match="crop or pad to 8×10"):
        layer(torch.randn(1, 1, 7, 9))


@pytest.mark.parametrize("fn", SOUND)
def test_channels_last_trains_and_certifies(fn):
    torch.manual_seed(0)
    layer = fn(nn.Conv2d(4, 4, 3, padding=1)).to(memory_format=torch.channels_last)
    layer(torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    assert singular_values(layer.eval(), (4, 6, 6))[0] <= 1 + 1e-5


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 3, 3, dilation=3), nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(1, 5, (1, 7)), nn.Conv2d(2, 3, 4, stride=2),
    nn.ConvTranspose2d(4, 2, 4, stride=2, groups=2), nn.Conv2d(3, 8, 1), nn.Conv2d(1, 1, 7),
])  # fmt: skip
def test_spectral_wastes_nothing_on_the_infinite_picture(layer):
    layer = spectral(copy.deepcopy(layer)).eval()
    assert 0.995 <= conv_norm(layer.weight, layer.stride, layer.dilation, layer.groups) <= 1.004


def test_a_layer_used_twice_learns():
    layer = spectral(nn.Conv2d(2, 2, 3, padding=1))
    layer(layer(torch.randn(1, 2, 5, 5))).sum().backward()
    assert bool(torch.isfinite(layer.parametrizations.weight.original.grad).all())


@pytest.mark.parametrize("fn", [spectral, orthogonal, frobenius, aol, unit_rows])
def test_an_empty_batch_passes(fn):
    layer = fn(nn.Conv2d(2, 3, 3))
    layer(torch.zeros(0, 2, 5, 5)).sum().backward()
    assert layer.eval()(torch.zeros(0, 2, 5, 5)).shape == (0, 3, 3, 3)


def test_a_weight_that_became_nan_is_refused_in_eval_mode():
    layer = spectral(nn.Conv2d(2, 2, 3)).eval()
    layer(torch.randn(1, 2, 5, 5))
    layer.parametrizations.weight.original.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.randn(1, 2, 5, 5))


@pytest.mark.parametrize("layer, name", [
    (nn.Conv3d(1, 1, 3), "Conv3d"), (nn.Bilinear(2, 2, 2), "Bilinear"), (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
    (None, "NoneType"), (nn.Conv2d(1, 1, 3, padding_mode="replicate"), "replicate"),
    (torch.nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "_SpectralNorm"),
])  # fmt: skip
@pytest.mark.parametrize("fn", [spectral, orthogonal, frobenius, aol, unit_rows])
def test_what_cannot_be_constrained_is_named(fn, layer, name):
    with pytest.raises(ValueError, match=name):
        fn(layer)


def test_a_circle_is_refused_only_along_the_axis_that_its_stride_does_not_divide():
    layer = spectral(nn.Conv2d(1, 1, 3, stride=(1, 3), padding=1, padding_mode="circular")).eval()
    layer(torch.randn(1, 5, 6))
    with pytest.raises(ValueError, match="5×9"):
        copy.deepcopy(layer)(torch.randn(1, 5, 7))


KINDS = [spectral, frobenius, aol, orthogonal, unit_rows, l2_normalized, partial(clip, limit=0.1)]


@pytest.mark.parametrize("fn", KINDS)
@pytest.mark.parametrize("partner", [
    lambda: nn.Conv2d(4, 4, 3, stride=3), lambda: nn.Conv2d(4, 4, 3, stride=2), lambda: nn.ConvTranspose2d(4, 4, 3, 2),
    lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Conv2d(4, 4, 3, stride=3, padding=1),
])  # fmt: skip
def test_layers_that_share_a_weight_each_obey_their_constraint(fn, partner):
    """As parametrizations always; projected, where one weight serves both, and else nothing is changed."""
    for seed in range(3):
        torch.manual_seed(seed)
        one, two = nn.Conv2d(4, 4, 3, padding=1), partner()
        two.weight = one.weight
        tied = nn.ModuleList([copy.deepcopy(fn)(one), fn(two)]) if seed == 0 else nn.ModuleList([one, two])
        if seed:
            before = one.weight.detach().clone()
            try:
                constrain_(tied, fn)
            except ValueError as error:
                assert "shares its weight" in str(error) or "no projection" in str(error)
                assert torch.equal(one.weight, before)
                continue
        for layer in tied.eval():
            check_obeyed(fn, layer)


def check_obeyed(fn, layer):
    weight = layer.weight.detach()
    if fn in SOUND:
        assert singular_values(layer, (4, 9, 9))[0] <= 1 + 1e-5
    elif fn is unit_rows:
        rows = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
        torch.testing.assert_close(rows.flatten(1).norm(dim=1), torch.ones(4))
    elif fn is l2_normalized:
        assert weight.norm() <= 1 + 1e-5
    else:
        assert weight.abs().max() <= 0.1


def test_layers_that_share_a_weight_and_want_the_same_are_projected_together():
    one, two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    two.weight = one.weight
    constrain_(nn.Sequential(one, two), spectral)
    assert one.weight is two.weight
    assert 0.99 <= conv_norm(one.weight) <= 1.004


def test_layers_that_share_memory_are_seen_as_well():
    """A decoder with the encoder's matrix, transposed: one object each, one memory."""
    for fn, serves in ((spectral, True), (frobenius, True), (aol, False), (unit_rows, False)):
        torch.manual_seed(0)
        encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 6)
        decoder.weight = nn.Parameter(encoder.weight.detach().T)
        before = encoder.weight.detach().clone()
        if serves:
            constrain_(nn.Sequential(encoder, decoder), fn)
            assert torch.linalg.matrix_norm(encoder.weight, ord=2) <= 1 + 1e-6
            assert torch.equal(encoder.weight, decoder.weight.T)
        else:
            with pytest.raises(ValueError, match="0, 1 shares its weight|0 shares its weight"):
                constrain_(nn.Sequential(encoder, decoder), fn)
            assert torch.equal(encoder.weight, before)


def plain_ways(layer):
    """The layer under its constraint, after projection, without its parametrization and after export."""
    free = copy.deepcopy(layer)
    for constrained in (spectral(copy.deepcopy(layer)).eval(), copy.deepcopy(spectral(copy.deepcopy(layer)).eval())):
        yield constrained
        yield export(nn.Sequential(constrained))
        parametrize.remove_parametrizations(constrained, "weight")
        yield constrained
    for _ in range(2):
        constrain_(free, spectral)
        yield free
    assert len(free._forward_pre_hooks) == 1  # projected at every step, it is not refused ever more slowly
    yield export(nn.Sequential(free))


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_a_strided_circle_refuses_odd_sides_however_it_came_to_be_constrained(stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, stride=stride, padding=1, padding_mode="circular")
    for way in plain_ways(layer):
        assert way(torch.randn(1, 2, 6, 6)).shape[0] == 1
        with pytest.raises((ValueError, AssertionError), match="divides"):
            way(torch.randn(1, 2, 6, 7))
    by_keyword = spectral(copy.deepcopy(layer))
    assert by_keyword(input=torch.randn(1, 2, 6, 6)).shape[0] == 1
    with pytest.raises(ValueError, match="crop or pad to 6×12|crop or pad to 6×8|crop or pad to 6×9"):
        by_keyword(input=torch.randn(1, 2, 6, 7))


def test_heads_refuse_small_circles_after_projection_and_export_too():
    layer = nn.Conv2d(2, 3, 3, padding=2, dilation=2, padding_mode="circular")
    projected, registered = constrain_(copy.deepcopy(layer), unit_rows), unit_rows(copy.deepcopy(layer)).eval()
    for way in (projected, registered, export(nn.Sequential(registered)), export(nn.Sequential(projected))):
        assert way(torch.zeros(1, 2, 3, 5)).shape == (1, 3, 3, 5)  # 3 is odd, so steps of 2 meet no pixel twice
        for sides in ((4, 5), (5, 4), (2, 5)):
            with pytest.raises((ValueError, AssertionError), match="taps"):
                way(torch.zeros(1, 2, *sides))


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 2, 1, groups=2), nn.ConvTranspose2d(4, 4, 3, groups=2)], ids=str)
def test_a_head_with_groups_is_refused(layer):
    """Two rows of it act on different channels: at (2, 1) two filters of 1 differ by 1, and no distance says so."""
    for constrain in (unit_rows, lambda layer: constrain_(nn.Sequential(layer), unit_rows)):
        with pytest.raises(ValueError, match="groups=2 is no head for unit_rows.*use groups=1"):
            constrain(copy.deepcopy(layer))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 6), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(5, 5, (1, 3), padding=(0, 1))],
    ids=["dense", "square", "flat"],
)
def test_near_identity_adds_a_tenth_of_the_weight_to_the_identity(layer):
    before = copy.deepcopy(layer)
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(3, layer.in_channels, 7, 7)
    before.bias = layer.bias = None
    torch.testing.assert_close(near_identity(layer)(x), x + before(x) / 10)


@pytest.mark.parametrize(
    "layer, why",
    [
        (nn.Linear(6, 5), "5×6"),
        (nn.Conv2d(4, 4, 3, groups=2), "4×2×3×3"),
        (nn.Conv2d(4, 4, 2), "4×4×2×2"),
        (spectral(nn.Linear(6, 6)), "call it first"),
        (nn.Flatten(), "Flatten"),
    ],
    ids=["wide", "groups", "even", "constrained", "no weight"],
)
def test_near_identity_refuses_where_there_is_no_identity(layer, why):
    with pytest.raises(ValueError, match=why):
        near_identity(layer)

"""What a hunt for counterexamples tried on the constraints and found sound: odd layers, kernels and states."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.layers import norms
from lipguide.layers.affine import aol, frobenius, orthogonal, spectral, unit_rows
from lipguide.layers.norms import conv_norm

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)
WEIGHTS = ["raw", "smooth", "ones", "rank one", "sparse", "whole numbers", "one tap", "wave", "huge", "tiny"]


def singular_values(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Those of the dense matrix of the weight that the layer uses now, in float64."""
    weight = layer.weight.detach().double()
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    if isinstance(layer, nn.Linear):
        images = F.linear(basis, weight)
    elif isinstance(layer, nn.ConvTranspose2d):
        images = F.conv_transpose2d(
            basis, weight, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )
    else:
        images = nn.Conv2d._conv_forward(layer, basis, weight, None)
    return torch.linalg.svdvals(images.flatten(1))


def largest(layer: nn.Module, shape: tuple[int, ...]) -> float:
    return singular_values(layer, shape)[0].item()


def fill_(weight: torch.Tensor, kind: str) -> None:
    if kind == "smooth":
        weight.abs_()
    elif kind == "ones":
        weight.fill_(1.0)
    elif kind == "rank one":
        weight.copy_(torch.randn(len(weight), *[1] * (weight.ndim - 1)) * torch.randn(weight.shape[1:]))
    elif kind == "sparse":
        weight.mul_(torch.rand_like(weight) < 0.3)
    elif kind == "whole numbers":
        weight.copy_(torch.randint(-2, 3, weight.shape))
    elif kind == "one tap":
        weight.zero_().flatten()[torch.randint(weight.numel(), ())] = 1.0
    elif kind == "wave" and weight.ndim == 4:
        a, b = 3 * torch.rand(2)
        rows, columns = torch.arange(weight.shape[2])[:, None], torch.arange(weight.shape[3])
        weight.copy_(torch.cos(a * rows + b * columns + 6 * torch.rand(*weight.shape[:2], 1, 1)))
    elif kind in ("huge", "tiny"):
        weight.mul_(1e15 if kind == "huge" else 1e-15)


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
        assert largest(layer, shape) <= 1 + 1e-5, (layer, shape)

    check()
    assert checked >= 5


def symbol_norm(weight: torch.Tensor, stride: int = 1, grid: int = 96) -> float:
    """The norm of a convolution on a large circle, read off a dense grid of frequencies: a lower bound."""
    size = [1 if k == 1 else grid for k in weight.shape[2:]]
    symbol = torch.fft.fft2(weight.double(), s=size)
    if stride > 1:  # frequencies that fold onto each other stand side by side
        symbol = symbol.reshape(*weight.shape[:2], stride, size[0] // stride, stride, size[1] // stride)
        symbol = symbol.permute(3, 5, 0, 1, 2, 4).flatten(3) / stride
    else:
        symbol = symbol.permute(2, 3, 0, 1)
    return torch.linalg.matrix_norm(symbol, ord=2).max().item()


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


@pytest.mark.parametrize("shape, groups", [((3, 2, 3, 3), 1), ((2, 3, 4, 2), 1), ((6, 2, 5, 3), 3), ((2, 2, 1, 7), 1)])
@pytest.mark.parametrize("tolerance", [3e-3, 0.5])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_the_proof_does_not_rely_on_the_search(monkeypatch, shape, groups, tolerance, share):
    """Where the first search stays far below the maximum, no cell of frequencies that may hold it is given up."""
    climb, calls = norms._climb, []

    def poor(*arguments):
        calls.append(arguments)
        return climb(*arguments) * (share if len(calls) == 1 else 1.0)

    monkeypatch.setattr(norms, "_climb", poor)
    for seed in range(4):
        torch.manual_seed(seed)
        weight = torch.randn(shape)
        calls.clear()
        assert conv_norm(weight, groups=groups, tolerance=tolerance) >= max(map(symbol_norm, weight.chunk(groups)))
        assert calls


@pytest.mark.parametrize("kernel", [2, 5, 7, 11])
def test_a_peak_anywhere_is_found(kernel):
    """The symbol of a rotating wave reaches the number of taps at its own frequency, wherever that lies."""
    taps = torch.arange(kernel).double()
    for seed in range(6):
        a, b = 2 * math.pi * torch.rand(2, generator=torch.Generator().manual_seed(seed)).double()
        angle = a * taps[:, None] + b * taps
        weight = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        assert kernel**2 <= conv_norm(weight) <= 1.004 * kernel**2


def test_symbols_that_are_flat_or_nearly_flat_end_the_search():
    torch.manual_seed(0)
    flat = orthogonal(nn.Conv2d(6, 6, 5)).weight.detach().double()
    for noise in (0.0, 1e-9, 1e-5, 1e-2):
        weight = flat + noise * torch.randn_like(flat)
        below = symbol_norm(weight, grid=24)
        assert below <= conv_norm(weight) <= 1.006 * below


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 3, 3, dilation=3), nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(1, 5, (1, 7)), nn.Conv2d(2, 3, 4, stride=2),
    nn.ConvTranspose2d(4, 2, 4, stride=2, groups=2), nn.Conv2d(3, 8, 1), nn.Conv2d(1, 1, 7),
])  # fmt: skip
def test_spectral_wastes_nothing_on_the_infinite_picture(layer):
    layer = spectral(copy.deepcopy(layer)).eval()
    assert 0.995 <= conv_norm(layer.weight, layer.stride, layer.dilation, layer.groups) <= 1.004


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-19, 1e19, 1e30])
def test_spectral_of_extreme_weights(scale):
    dense, conv = nn.Linear(16, 16), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    for layer, shape in ((dense, (16,)), (conv, (2, 8, 8))):
        layer.weight.data.fill_(scale)
        assert 0.995 <= largest(spectral(layer).eval(), shape) <= 1 + 1e-5
    wide = conv_norm(torch.ones(2, 2, 3, 3, dtype=torch.float64) * scale**7)
    assert wide == pytest.approx(18 * scale**7, rel=4e-3)


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


def changed(layer: nn.Module, how: str) -> nn.Module:
    raw = layer.parametrizations.weight.original
    bigger = 3 * raw.detach() + 1
    if how == "assignment":
        layer.weight = bigger
    elif how == "load and assign":
        layer.load_state_dict({**layer.state_dict(), "parametrizations.weight.original": bigger}, assign=True)
    elif how == "pruned in place":
        raw.data[raw.abs() < raw.abs().median()] = 0
    elif how == "one entry":
        raw.data.view(-1)[0] += 3
    elif how == "averaged":
        average = torch.optim.swa_utils.AveragedModel(layer)
        raw.data.copy_(bigger)
        average.update_parameters(layer)
        average.update_parameters(layer)
        return average.module.eval()
    elif how == "float64":
        return layer.double()
    elif how == "half and back":
        return layer.half().float()
    elif how == "inference mode":
        with torch.inference_mode():
            layer(torch.randn(1, 2, 6, 6))
        raw.data.copy_(bigger)
    elif how == "trained without gradients":
        raw.data.copy_(bigger)
        with torch.no_grad():
            layer.train()(torch.randn(1, 2, 6, 6))
        layer.eval()
    return layer


@pytest.mark.parametrize("how", [
    "assignment", "load and assign", "pruned in place", "one entry", "averaged", "float64",
    "half and back", "inference mode", "trained without gradients",
])  # fmt: skip
def test_proof_follows_the_weight(how):
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")).eval()
    layer(torch.randn(1, 2, 6, 6))
    layer = changed(layer, how)
    for twin in (layer, copy.deepcopy(layer)):
        twin(torch.randn(1, 2, 6, 6, dtype=twin.weight.dtype))
        assert largest(twin, (2, 12, 12)) <= 1 + 1e-5 and conv_norm(twin.weight) >= 0.995
    layer.train()(torch.randn(1, 2, 6, 6, dtype=layer.weight.dtype)).sum().backward()


def test_compiled_and_functional_calls_see_the_new_weight():
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(2, 2, 3, padding=1)).eval()
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(1, 2, 8, 8)
    compiled(x)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(5).add_(1)
    torch.testing.assert_close(compiled(x), layer(x))
    other = {name: 2 * p.detach() + 1 for name, p in layer.named_parameters()}

    def energy(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(energy)(other)
    assert all(bool(torch.isfinite(g).all()) for g in gradients.values())
    torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))  # nothing of the transform stays behind
    assert largest(layer, (2, 8, 8)) <= 1 + 1e-5


def test_a_layer_in_eval_mode_is_proved_from_the_start_and_stays_so_when_made_plain():
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(1, 1, 11, padding=5).eval())
    assert largest(layer, (1, 12, 12)) <= 1 + 1e-5
    parametrize.remove_parametrizations(layer, "weight")
    assert largest(layer, (1, 12, 12)) <= 1 + 1e-5


def test_tied_weights_are_constrained_for_each_layer_that_uses_them():
    torch.manual_seed(0)
    one, two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, dilation=2)
    two.weight = one.weight
    spectral(one), spectral(two)
    assert one.parametrizations.weight.original is two.parametrizations.weight.original
    one.parametrizations.weight.original.data.mul_(7)
    for layer in (one.eval(), two.eval()):
        assert largest(layer, (4, 9, 9)) <= 1 + 1e-5


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

"""The constant of a single layer is never below what the layer does, and for linear layers hardly above it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.bounds.network import Unbounded, lipschitz_bound
from lipguide.layers.affine import aol, frobenius, orthogonal, spectral
from lipguide.layers.export import export
from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.layers.sll import SLL
from tests.oracles import largest_singular_value, steepest

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def bound(layer: nn.Module, shape: tuple[int, ...]) -> float:
    return lipschitz_bound(layer.eval(), shape).value


@st.composite
def convolutions(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, r)) for r in reach)
    sides = tuple(draw(st.integers(max(r + 1, p + 1), r + 8)) for r, p in zip(reach, padding, strict=True))
    if draw(st.booleans()) and stride == (1, 1):
        padding = "same"
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, padding_mode=mode)
    if draw(st.booleans()):
        layer.weight.data.abs_()
    return layer, (inputs, *sides)


@SETTINGS
@given(convolutions())
def test_no_picture_beats_the_bound_of_a_convolution(case):
    layer, shape = case
    above = bound(layer, shape)
    assert steepest(layer, shape, points=1) <= above * (1 + 1e-9)


@SETTINGS
@given(st.data())
def test_no_picture_beats_the_bound_of_a_transposed_convolution(data):
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    kernel, stride = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, (kernel - 1) // 2))
    extra = data.draw(st.integers(0, stride - 1))
    layer = nn.ConvTranspose2d(2, 4, kernel, stride, padding, output_padding=extra, groups=2)
    shape = (2, data.draw(st.integers(3, 9)), data.draw(st.integers(3, 9)))
    above = bound(layer, shape)
    assert steepest(layer, shape, points=1) <= above * (1 + 1e-9)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("channels, side", [(6, 32), (40, 33), (6, 48)])
def test_a_convolution_is_bounded_within_one_percent_from_32_pixels_on(kernel, smooth, channels, side):
    torch.manual_seed(kernel)
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    if smooth:
        layer.weight.data.abs_()
    true = largest_singular_value(layer, (channels, side, side))
    assert true <= bound(layer, (channels, side, side)) <= 1.01 * true


@pytest.mark.parametrize(
    "stride, groups, mode", [(2, 1, "zeros"), (1, 2, "zeros"), (1, 1, "circular"), (2, 1, "circular")]
)
def test_the_same_with_strides_groups_and_circles(stride, groups, mode):
    torch.manual_seed(stride)
    layer = nn.Conv2d(6, 8, 3, stride, 1, groups=groups, padding_mode=mode)
    true = largest_singular_value(layer, (6, 32, 32))
    assert true <= bound(layer, (6, 32, 32)) <= 1.01 * true


@pytest.mark.parametrize("dilation, channels", [(2, 6), (8, 2), (8, 20)])
def test_a_dilated_convolution_is_bounded_like_one_on_a_smaller_picture(dilation, channels):
    """It sees d² interleaved pictures, each of them d times smaller, and these do not meet."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
    true = largest_singular_value(layer, (channels, 32, 32))
    assert true <= bound(layer, (channels, 32, 32)) <= 1.12 * true


def test_a_convolution_on_a_tiny_picture_is_exact():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 3, padding=1)
    assert bound(layer, (16, 4, 4)) == pytest.approx(largest_singular_value(layer, (16, 4, 4)), rel=1e-5)


def test_sequences_are_pictures_of_one_row():
    torch.manual_seed(0)
    for layer in (nn.Conv1d(3, 4, 5, 2, 2), nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular")):
        assert steepest(layer.float(), (3, 40), 1) <= bound(layer.float(), (3, 40)) * (1 + 1e-9)
    layer = nn.ConvTranspose1d(3, 4, 4, 2, 1)
    above = bound(layer, (3, 20))
    assert steepest(layer, (3, 20), 1) <= above * (1 + 1e-9) <= 1.02 * steepest(layer, (3, 20), 1)


LINEAR = {
    nn.AvgPool2d(2): (2, 6, 6),
    nn.AvgPool2d(3, 1, 1): (1, 7, 6),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False): (1, 8, 8),
    nn.AvgPool1d(4, 3): (2, 17),
    nn.AvgPool2d(2, divisor_override=-2): (1, 40, 41),
    nn.AdaptiveAvgPool2d(1): (2, 5, 7),
    nn.AdaptiveAvgPool2d((3, 2)): (1, 7, 5),
    nn.Upsample(scale_factor=2): (1, 4, 4),
    nn.Upsample(scale_factor=2, mode="bilinear"): (1, 4, 5),
    nn.Upsample(size=(5, 7), mode="bilinear", align_corners=True): (1, 4, 4),
    nn.ReflectionPad2d(2): (1, 5, 5),
    nn.ReplicationPad2d((1, 0, 3, 1)): (1, 4, 4),
    nn.CircularPad2d(2): (1, 4, 4),
    nn.ZeroPad2d(2): (1, 4, 4),
    nn.PixelUnshuffle(2): (1, 4, 4),
    nn.BatchNorm2d(3): (3, 4, 4),
    nn.BatchNorm1d(3, affine=False): (3,),
    nn.SyncBatchNorm(3): (3, 4, 4),  # what batch norm becomes for training on several GPUs
    nn.Linear(5, 3): (5,),
    nn.Linear(4, 6): (7, 4),
}


@pytest.mark.parametrize("layer", LINEAR, ids=str)
def test_linear_layers_are_bounded_tightly(layer):
    torch.manual_seed(0)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.running_var.uniform_(0.1, 2)
    shape = LINEAR[layer]
    above = bound(layer.float(), shape)
    true = steepest(layer, shape, points=1)
    assert true <= above * (1 + 1e-6)
    assert above <= 1.2 * true


BENT = [
    *(kind() for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign, nn.CELU, nn.Softshrink)),
    *(
        kind()
        for kind in (nn.Tanhshrink, nn.LogSigmoid, nn.Sigmoid, nn.Hardsigmoid, nn.SELU, nn.GELU, nn.SiLU, nn.Mish)
    ),
    *(
        nn.Hardswish(),
        nn.LeakyReLU(0.3),
        nn.LeakyReLU(-2.0),
        nn.PReLU(init=1.7),
        nn.ELU(2.0),
        nn.RReLU(),
        nn.GELU("tanh"),
    ),
]


@pytest.mark.parametrize("layer", BENT, ids=str)
def test_no_slope_of_an_activation_exceeds_its_constant(layer):
    above = bound(layer, (3,))
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(layer.double()(grid).sum(), grid)
    assert slopes.abs().max() <= above * (1 + 1e-9)
    assert slopes.abs().max() >= 0.99 * above


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.MaxPool2d(2), (2, 6, 6)),
        (nn.MaxPool2d(3, 2, 1), (1, 7, 7)),
        (nn.MaxPool2d(3, 1), (1, 6, 6)),
        (nn.MaxPool2d(3, 2, dilation=2), (1, 9, 9)),
        (nn.MaxPool1d(4, 3), (2, 14)),
        (nn.AdaptiveMaxPool2d((3, 2)), (1, 7, 5)),
    ],
    ids=str,
)
def test_max_pooling_counts_the_windows_that_share_a_pixel(layer, shape):
    above = bound(layer, shape)
    spike = torch.zeros(1, *shape, dtype=torch.float64)
    reached = 0.0
    for place in range(spike[0, 0].numel()):
        x = spike.clone()
        x[0, 0].view(-1)[place] = 1
        reached = max(reached, float(layer(x).norm()))
    assert reached == pytest.approx(above)  # a single bright pixel is the worst picture
    assert steepest(layer, shape) <= above * (1 + 1e-9)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.LPPool2d(2, 2), (2, 6, 6)),
        (nn.LPPool2d(2.0, (2, 3), (2, 3)), (1, 5, 7)),
        (nn.LPPool2d(2, 2, 3), (1, 8, 7)),
        (nn.LPPool2d(2, 3, 2), (1, 7, 7)),
        (nn.LPPool2d(2, 3, 1), (1, 6, 6)),
        (nn.LPPool2d(2, 2, ceil_mode=True), (1, 6, 6)),
        (nn.LPPool2d(2, 2, ceil_mode=True), (1, 5, 7)),
        (nn.LPPool2d(2, 3, 2, ceil_mode=True), (2, 6, 8)),
        (nn.LPPool1d(2, 4, 3), (2, 14)),
        (nn.LPPool1d(2, 3, ceil_mode=True), (1, 7)),
    ],
    ids=str,
)
def test_pooling_by_norm_counts_the_windows_that_share_a_pixel(layer, shape):
    above = bound(layer, shape)
    reached = 0.0
    for place in range(int(torch.tensor(shape[1:]).prod())):
        x = torch.zeros(1, *shape, dtype=torch.float64)
        x[0, 0].view(-1)[place] = 1
        reached = max(reached, float(layer(x).norm()))
    assert reached == pytest.approx(above)  # a single bright pixel is the worst picture
    assert steepest(layer, shape) <= above * (1 + 1e-9)


def test_a_network_with_torch_s_pooling_by_norm_is_bounded_as_with_ours():
    torch.manual_seed(0)
    conv = spectral(nn.Conv2d(2, 4, 3, padding=1))
    ours, theirs = nn.Sequential(conv, ScaledL2NormPool2d(2)), nn.Sequential(conv, nn.LPPool2d(2, 2))
    assert bound(theirs, (2, 5, 6)) == bound(ours, (2, 5, 6))
    exported = export(theirs.eval())
    assert bound(exported, (2, 5, 6)) == pytest.approx(bound(export(ours.eval()), (2, 5, 6)))
    assert steepest(exported, (2, 5, 6)) <= bound(exported, (2, 5, 6))


def test_softmax_is_half_lipschitz():
    layer = nn.Softmax(dim=1)
    assert bound(layer, (5,)) == 0.5
    torch.testing.assert_close(
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(layer, torch.zeros(1, 2)).reshape(2, 2), ord=2),
        torch.tensor(0.5),
    )


def test_a_proved_layer_is_not_proved_again(monkeypatch):
    layer = spectral(nn.Conv2d(4, 4, 3, padding=1)).eval()
    layer(torch.zeros(1, 4, 8, 8))
    monkeypatch.setattr("lipguide.bounds.convolutions.conv_norm", None)
    monkeypatch.setattr("lipguide.bounds.convolutions.picture_norm", None)
    assert 1 <= bound(layer, (4, 8, 8)) <= 1 + 1e-5
    assert steepest(layer, (4, 8, 8), 1) <= bound(layer, (4, 8, 8))


def test_an_unconstrained_sll_is_bounded_by_its_own_weight():
    torch.manual_seed(0)
    block = SLL(4, 4, 3)
    torch.nn.utils.parametrize.remove_parametrizations(block, "weight")
    block.weight.data *= 3
    above = bound(block, (4, 6, 6))
    assert above > 5
    assert steepest(block, (4, 6, 6), 5) <= above


@pytest.mark.parametrize(
    "layer, shape, why",
    [
        (nn.BatchNorm2d(2, track_running_stats=False), (2, 4, 4), "statistics"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4), "negative"),
        (nn.Flatten(0), (2, 4), "batch"),
        (nn.Unflatten(0, (1, -1)), (4,), "batch"),
        (nn.Unflatten(-2, (-1, 1)), (4,), "batch"),
        (nn.Softplus(threshold=1.0), (3,), "jumps"),
        (nn.Softplus(beta=0), (3,), "with beta=0 torch divides by it"),
        (nn.Softplus(beta=1e-46), (3,), "divides"),
        (nn.Softplus(beta=math.nan), (3,), "divides"),
        (nn.Softplus(beta=math.inf), (3,), "divides"),
        (nn.Softmax(dim=0), (3,), "batch"),
        (nn.LayerNorm(4), (4,), "BatchCentering"),
        (nn.GroupNorm(1, 2), (2, 4, 4), "BatchCentering"),
        (nn.Conv3d(1, 1, 1), (1, 2, 2, 2), "Conv3d"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_layer_without_a_bound_is_an_error_that_says_why(layer, shape, why):
    with pytest.raises(Unbounded, match=why):
        bound(layer, shape)


CHANGES = {
    "stride": (nn.Conv2d(2, 2, 3, stride=2, padding=1), {"stride": (1, 1)}),
    "reflect": (nn.Conv2d(2, 2, 3, padding=1), {"padding_mode": "reflect"}),
    "replicate": (nn.Conv2d(2, 2, 3, padding=1), {"padding_mode": "replicate"}),
    "dilation": (nn.Conv2d(2, 2, 3, stride=2, padding=3), {"dilation": (3, 3)}),
    "circle that the stride does not divide": (nn.Conv2d(2, 2, 3, 2, 1), {"padding_mode": "circular"}),
    "transposed": (nn.ConvTranspose2d(2, 2, 3, stride=2), {"stride": (1, 1)}),
    "as numbers": (nn.Conv2d(2, 2, 3, stride=2, padding=1), {"stride": 1, "dilation": 1}),
}


@pytest.mark.parametrize("constrain", [spectral, orthogonal, aol, frobenius])
@pytest.mark.parametrize("change", CHANGES)
def test_no_constraint_vouches_for_a_geometry_that_was_changed_afterwards(change, constrain):
    for seed in range(3):
        torch.manual_seed(seed)
        made, attributes = CHANGES[change]
        layer = copy.deepcopy(made)
        layer.weight.data.normal_().abs_()
        layer = constrain(layer).eval()
        bound(layer, (2, 6, 6))  # which makes the proof
        for name, value in attributes.items():
            setattr(layer, name, value)
        above = bound(layer, (2, 7, 7))
        assert steepest(copy.deepcopy(layer), (2, 7, 7), 1) <= above * (1 + 1e-6)


def test_borders_are_copied_as_the_forward_does_it():
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate")
    layer.weight.data.abs_()
    layer.padding = (0, 0)  # which a forward that copies borders does not look at
    assert steepest(layer, (1, 3, 3), 1) <= bound(layer, (1, 3, 3)) * (1 + 1e-9)


UNBATCHED = {
    nn.MaxPool2d(3, 1): (8, 8),
    nn.MaxPool1d(3, 1): (8,),
    nn.AvgPool2d(3, 1, 1): (8, 8),
    nn.AvgPool1d(3, 1, 1): (8,),
    nn.AdaptiveMaxPool2d(3): (8, 8),
    nn.AdaptiveAvgPool2d(3): (8, 8),
    nn.ReplicationPad2d(1): (8, 8),
    nn.Conv2d(1, 1, 3, padding=1): (8, 8),
    nn.ConvTranspose2d(1, 1, 3): (8, 8),
    nn.Conv1d(1, 1, 3): (8,),
}


@pytest.mark.parametrize("layer", UNBATCHED, ids=str)
def test_an_input_without_channels_is_an_error_and_not_a_batch(layer):
    """torch takes (1, H, W) for one picture of a channel: what is named a batch would be its channel."""
    with pytest.raises(Unbounded, match=r"give it \(N, C, "):
        bound(layer, UNBATCHED[layer])


def negative_variance() -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(3)
    layer.running_var[1] = -1
    return layer


@pytest.mark.parametrize(
    "layer, shape, why",
    [
        (nn.CELU(-1.0), (3,), "grows without end"),
        (nn.LeakyReLU(float("nan")), (3,), "slope is nan"),
        (nn.LPPool2d(3, 2), (1, 4, 4), "norm_type=2"),
        (nn.LPPool2d(2, 2), (4, 4), "takes for one sample"),
        (nn.MaxPool1d(2, return_indices=True), (1, 4), "places of the maxima"),
        (nn.AdaptiveMaxPool2d(2, return_indices=True), (1, 4, 4), "places of the maxima"),
        (nn.Softmax(dim=-2), (3,), "batch"),
        (nn.Flatten(-3), (2, 4), "batch"),
        (negative_variance(), (3,), "running variance"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_would_not_be_bounded_by_the_usual_constant_is_an_error(layer, shape, why):
    with pytest.raises(Unbounded, match=why):
        bound(layer, shape)


class Tripled(nn.Conv2d):
    """Another way in: the forward is inherited, what it calls is not."""

    def _conv_forward(self, *args):
        return 3 * super()._conv_forward(*args)


class Reloaded(nn.Conv2d):
    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)


def test_a_subclass_is_trusted_if_it_changes_nothing_that_its_forward_calls():
    assert bound(Reloaded(1, 1, 3), (1, 5, 5)) > 0
    with pytest.raises(Unbounded, match="Tripled"):
        bound(Tripled(1, 1, 3), (1, 5, 5))
    patched = nn.Conv2d(1, 1, 3)
    patched._conv_forward = Tripled(1, 1, 3)._conv_forward
    with pytest.raises(Unbounded, match="_conv_forward was replaced"):
        bound(patched, (1, 5, 5))


@pytest.mark.parametrize("padding", [(3, 0, 2, -2), (-1, 1, 0, 0), (0, 0, 2, -1)])
def test_a_circle_that_grows_and_is_cut_has_no_bound(padding):
    """torch leaves values unset there, so the layer is no function of its input."""
    with pytest.raises(Unbounded, match="both signs"):
        bound(nn.CircularPad2d(padding), (1, 5, 5))
    assert bound(nn.CircularPad2d([max(0, p) for p in padding]), (1, 5, 5)) >= 1
    assert bound(nn.CircularPad2d([min(0, p) for p in padding]), (1, 5, 5)) <= 1 + 1e-6


@pytest.mark.parametrize("layer", [nn.Upsample(scale_factor=0.2, mode="area"), nn.Upsample(size=(0, 2), mode="area")])
def test_a_picture_without_pixels_does_not_move(layer):
    assert lipschitz_bound(nn.Sequential(layer).eval(), (2, 3, 3)).value == 0

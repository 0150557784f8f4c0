"""A function called in a forward is bounded as its layer is, and is refused where the layer would be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lipguide as lip
from lipguide.bounds.functionals import TWINS
from lipguide.bounds.torch_layers import LAYERS
from tests.bounds.test_forwards import Forward
from tests.oracles import steepest


def bound(module: nn.Module, shape: tuple[int, ...]) -> float:
    return lip.lipschitz_bound(module.eval(), shape).value


@st.composite
def pools(draw):
    """A pooling of random options: the function, the layer, and a shape."""
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    sides = tuple(draw(st.integers(4, 7 if axes < 3 else 5)) for _ in range(axes))
    kind = draw(st.sampled_from(["max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"]))
    if kind.startswith("adaptive"):
        axes = min(axes, 2) if kind == "adaptive_max_pool" else axes
        options = {"output_size": draw(st.integers(1, 4))}
    else:
        kernel = draw(st.integers(1, 4))
        options = {"kernel_size": kernel, "padding": draw(st.integers(0, kernel // 2))}
        if draw(st.booleans()):
            options["stride"] = draw(st.integers(1, 4))
        options["ceil_mode"] = draw(st.booleans())
        if kind == "avg_pool":
            options["count_include_pad"] = draw(st.booleans())
    layer = getattr(nn, "".join(map(str.capitalize, kind.split("_"))) + f"{axes}d")
    return getattr(F, f"{kind}{axes}d"), layer, options, (2, *sides[:axes])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(pools(), st.booleans())
def test_a_pooling_that_is_called_has_the_bound_of_its_layer_and_no_picture_beats_it(case, positional):
    function, layer, options, shape = case
    first, *_ = options.values()
    named = dict(list(options.items())[positional:])
    called = Forward(lambda m, x: function(x, *(first,) * positional, **named))
    above = bound(called, shape)
    assert above == bound(layer(**options), shape)
    assert steepest(called, shape, points=1) <= above * (1 + 1e-6)


SLOPE = st.floats(-3, 3).filter(lambda slope: abs(slope) > 0.01)
BENT = {
    "relu": (nn.ReLU, {}),
    "relu6": (nn.ReLU6, {}),
    "tanh": (nn.Tanh, {}),
    "sigmoid": (nn.Sigmoid, {}),
    "hardsigmoid": (nn.Hardsigmoid, {}),
    "hardswish": (nn.Hardswish, {}),
    "softsign": (nn.Softsign, {}),
    "tanhshrink": (nn.Tanhshrink, {}),
    "logsigmoid": (nn.LogSigmoid, {}),
    "selu": (nn.SELU, {}),
    "silu": (nn.SiLU, {}),
    "mish": (nn.Mish, {}),
    "gelu": (nn.GELU, {"approximate": st.sampled_from(["none", "tanh"])}),
    "leaky_relu": (nn.LeakyReLU, {"negative_slope": SLOPE}),
    "elu": (nn.ELU, {"alpha": SLOPE}),
    "celu": (nn.CELU, {"alpha": st.floats(0.1, 3)}),
    "softplus": (nn.Softplus, {"beta": st.floats(0.2, 3), "threshold": st.floats(16, 30)}),
    "softshrink": (nn.Softshrink, {"lambd": st.floats(0, 1)}),
    "hardtanh": (nn.Hardtanh, {"min_val": st.floats(-3, -0.1), "max_val": st.floats(0.1, 3)}),
    "rrelu": (nn.RReLU, {"lower": st.floats(0.1, 0.2), "upper": st.floats(0.3, 3)}),
    "dropout": (nn.Dropout, {"p": st.floats(0, 1), "training": st.just(False)}),
    "alpha_dropout": (nn.AlphaDropout, {"p": st.floats(0, 1)}),
    "softmax": (nn.Softmax, {"dim": st.sampled_from([1, 2, -1])}),
    "log_softmax": (nn.LogSoftmax, {"dim": st.sampled_from([1, 2, -1])}),
    "channel_shuffle": (nn.ChannelShuffle, {"groups": st.sampled_from([1, 2, 4])}),
    "pixel_shuffle": (nn.PixelShuffle, {"upscale_factor": st.just(2)}),
    "pixel_unshuffle": (nn.PixelUnshuffle, {"downscale_factor": st.just(2)}),
    **{f"dropout{axes}d": (getattr(nn, f"Dropout{axes}d"), {"training": st.just(False)}) for axes in (1, 2, 3)},
}


@pytest.mark.parametrize("name", BENT)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_a_function_has_the_bound_of_its_layer_and_no_input_beats_it(name, data):
    layer, drawn = BENT[name]
    options = {option: data.draw(strategy) for option, strategy in drawn.items()}
    shape = (4, 5) if name == "dropout1d" else (4, 2, 3, 2) if name == "dropout3d" else (4, 2, 4)
    called = Forward(lambda m, x: getattr(F, name)(x, **options))
    above = bound(called, shape)
    of_the_layer = {option: value for option, value in options.items() if option != "training"}
    assert above == bound(layer(**of_the_layer), shape)
    assert steepest(called, shape, points=1) <= above * (1 + 1e-6)


PADDED = {
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d),
}


@pytest.mark.parametrize("mode", PADDED)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_padding_that_is_called_has_the_bound_of_its_layer(mode, axes, wide):
    pad, shape = tuple(wide[: 2 * axes]), (2, 4, 5)[: axes + 1]
    layer = PADDED[mode][axes - 1]
    called = Forward(lambda m, x: F.pad(x, pad, mode))
    above = bound(called, shape)
    assert above == bound(layer(pad, 0.0) if mode == "constant" else layer(pad), shape)
    assert steepest(called, shape, points=1) <= above * (1 + 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2},
        {"scale_factor": 1.5, "mode": "bilinear"},
        {"size": (3, 7)},
        {"size": 5, "mode": "bilinear", "align_corners": True},
        {"size": (2, 2), "mode": "area"},
    ],
    ids=str,
)
def test_an_interpolation_that_is_called_has_the_bound_of_its_layer(options):
    called = Forward(lambda m, x: F.interpolate(x, **options))
    above = bound(called, (1, 4, 5))
    assert above == bound(nn.Upsample(**options), (1, 4, 5))
    assert steepest(called, (1, 4, 5), points=1) <= above * (1 + 1e-6)


def test_every_function_has_a_case_here():
    poolings = {name for name in TWINS if "pool" in name}
    assert set(TWINS) == {*BENT, *poolings, "pad", "interpolate"}


WAYS = {
    "torch.max_pool2d": (lambda m, x: torch.max_pool2d(x, 3, 1), 3.0),
    "torch.softmax": (lambda m, x: torch.softmax(x, 1), 0.5),
    "x.softmax": (lambda m, x: x.softmax(dim=-1), 0.5),
    "x.log_softmax": (lambda m, x: x.log_softmax(1), 2.0),
    "torch.celu": (lambda m, x: torch.celu(x, 2.0), 1.0),
    "the whole picture": (lambda m, x: F.avg_pool2d(x, x.size()[2:]), 0.25),
    "a size of the picture": (lambda m, x: F.adaptive_avg_pool2d(x, x.shape[2] // 4), 0.25),
    "clamp": (lambda m, x: 3 * x.clamp(0, 1), 3.0),
    "torch.clamp": (lambda m, x: torch.clamp(x, max=1), 1.0),
    "clip": (lambda m, x: torch.clip(x, min=m.narrow.weight[0, 0]), 1.0),
    "in place": (lambda m, x: F.leaky_relu(2 * x, 0.1, inplace=True), 2.0),
    "in place, steeper": (lambda m, x: F.elu(2 * x, 3.0, inplace=True), 6.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_there_are_several_ways_to_call_a_function(way):
    function, expected = WAYS[way]
    called = Forward(function)
    assert bound(called, (4, 4, 4)) == pytest.approx(expected)
    assert steepest(called, (4, 4, 4), points=2) <= expected * (1 + 1e-6)


def test_a_log_softmax_comes_near_its_bound_at_a_corner_and_never_exceeds_it():
    for many in (1, 2, 5, 10):
        layer = nn.LogSoftmax(1)
        above = bound(layer, (many,))
        assert above == pytest.approx(many**0.5)
        slopes = []
        for sharp in (0.0, 1.0, 3.0, 20.0):
            x = sharp * torch.eye(1, many, dtype=torch.float64)
            jacobian = torch.autograd.functional.jacobian(layer, x).reshape(many, many)
            slopes.append(float(torch.linalg.matrix_norm(jacobian, 2)))
        assert max(slopes) <= above
        assert many == 1 or max(slopes) >= 0.999 * above


REFUSED = {
    "dropout that is always on": (lambda m, x: F.dropout(x, 0.5), r"dropout\(.*in eval mode too.*training=self.train"),
    "randomised slopes": (lambda m, x: F.rrelu(x, training=True), "training=self.training"),
    "softmax over the batch": (lambda m, x: F.softmax(x, 0), r"softmax\(x, dim=0.*normalises over the batch"),
    "log softmax over the batch": (lambda m, x: x.log_softmax(0), "normalises over the batch"),
    "a kind of number": (lambda m, x: torch.softmax(x, 1, torch.float64), "softmax.* no constant is known"),
    "a jump": (lambda m, x: F.softplus(x, 1.0, 1.0), "jumps at its threshold"),
    "places": (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], "max_pool2d_with_indices.* no constant"),
    "negative weights": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic"), "bicubic"),
    "smoothed": (
        lambda m, x: F.interpolate(x, size=(2, 2), mode="bilinear", antialias=True),
        "interpolate.*no constant is known",
    ),
    "an endless slope": (lambda m, x: F.celu(x, -1.0), "grows without end"),
    "a learned slope": (lambda m, x: F.prelu(x, m.narrow.weight[0]), "nn.PReLU in __init__"),
    "a learned limit": (lambda m, x: torch.clamp(x, min=x), "clamp.* no constant"),
    "a window of the batch's size": (lambda m, x: F.avg_pool2d(x, x.shape[0]), "avg_pool2d.* no constant"),
    "a slope of the batch's size": (lambda m, x: F.leaky_relu(x, x.shape[0] / 100), "leaky_relu.* no constant"),
    "weights by hand": (lambda m, x: F.linear(x, m.narrow.weight), "nn.Linear in __init__"),
    "divided by its norm": (lambda m, x: F.normalize(x), "divides by the norm"),
    "divided by its spread": (lambda m, x: F.layer_norm(x, x.shape[1:]), "lip.BatchCentering"),
    "borders of the batch": (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "pad.*no constant"),
    "by name": (lambda m, x: F.avg_pool2d(input=x, kernel_size=2), "given by name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_is_no_known_layer_is_refused_with_the_reason(name):
    function, why = REFUSED[name]
    with pytest.raises(lip.Unbounded, match=why):
        bound(Forward(function), (4, 4, 1) if name in ("a learned slope", "weights by hand") else (4, 4, 4))


class Ordinary(nn.Module):
    """In the style of PyTorch's MNIST example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.dropout = nn.Dropout(0.25)
        self.fc1, self.fc2 = nn.Linear(36, 12), nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(self.dropout(x), 1)
        x = F.dropout(F.relu(self.fc1(x)), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def test_an_ordinary_network_is_bounded_as_its_layers_are():
    model = Ordinary().eval()
    convolutions = (model.conv1, nn.ReLU(), model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    layers = nn.Sequential(*convolutions, model.fc1, nn.ReLU(), model.fc2, nn.LogSoftmax(1)).eval()
    above = bound(model, (1, 10, 10))
    assert above == pytest.approx(bound(layers, (1, 10, 10)))
    assert steepest(model, (1, 10, 10)) <= above


def test_the_docstring_names_all_that_is_known():
    text = lip.lipschitz_bound.__doc__
    assert "{known}" not in text
    assert all(f"`nn.{kind.__name__}`" in text for kind in LAYERS)
    assert all(f"`F.{name}`" in text for name in TWINS)

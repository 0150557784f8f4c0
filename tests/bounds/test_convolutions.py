"""The bounds of affine layers: of convolutions as they are now, of copies and averages by what their forward does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipguide.bounds.convolutions import Call, NoBound, convolution, dense, nonnegative, transposed_convolution
from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.affine import spectral
from lipguide.layers.norms import conv_norm
from lipguide.layers.sll import SLL, SLLLinear
from tests.oracles import singular_values

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def as_matrix(operation, pixels: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Column by column, from what becomes of each single pixel."""
    count = torch.Size(pixels).numel()
    with torch.no_grad():
        return operation(torch.eye(count, dtype=dtype).reshape(-1, 1, *pixels)).flatten(1).double()


def norm_of(operation, pixels: tuple[int, ...]) -> float:
    """The larger one of the two types in which a model may run."""
    norms = [torch.linalg.matrix_norm(as_matrix(operation, pixels, t), 2) for t in (torch.float32, torch.float64)]
    return max(norms).item()


@st.composite
def nearest(draw):
    axes = draw(st.integers(1, 3))
    pixels = tuple(draw(st.integers(1, {1: 40, 2: 8, 3: 4}[axes])) for _ in range(axes))
    mode = draw(st.sampled_from(["nearest", "nearest-exact"]))
    if draw(st.booleans()):
        scale = tuple(draw(st.floats(0.4, 3)) for _ in pixels)
        if draw(st.booleans()):
            scale = draw(st.sampled_from([1.05, 1.1, 2.2, 1.3, 0.7]))
        layer = nn.Upsample(scale_factor=scale, mode=mode)
    else:
        layer = nn.Upsample(size=tuple(draw(st.integers(1, 3 * n)) for n in pixels), mode=mode)
    return layer, pixels


@SETTINGS
@given(nearest())
def test_nearest_up_sampling_has_the_norm_of_what_its_forward_copies(case):
    layer, pixels = case
    try:
        layer(torch.zeros(1, 1, *pixels))
    except RuntimeError:  # nothing would be left of the picture
        return
    above = lipschitz_bound(layer.eval(), (1, *pixels)).value
    assert norm_of(layer, pixels) <= above <= norm_of(layer, pixels) * (1 + 1e-5)


@pytest.mark.parametrize("layer, pixels", [
    (nn.Upsample(scale_factor=1.05), (10,)), (nn.Upsample(scale_factor=1.05), (10, 10, 10)),
    (nn.Upsample(scale_factor=2.2), (4, 4, 4)), (nn.Upsample(scale_factor=1.05), (3, 10)),
    (nn.Upsample(scale_factor=41), (2, 2)), (nn.Upsample(scale_factor=47), (2,)), (nn.Upsample(size=82), (2,)),
    (nn.Upsample(scale_factor=55), (2, 2)), (nn.Upsample(scale_factor=1.05), (20, 60)),
], ids=str)  # fmt: skip
def test_where_torch_copies_unevenly_the_most_copied_pixel_counts(layer, pixels):
    """Scale factors whose gradient is not the adjoint, or whose index differs between float32 and float64."""
    most = 0
    for dtype in (torch.float32, torch.float64):
        places = layer(torch.arange(torch.Size(pixels).numel(), dtype=dtype).reshape(1, 1, *pixels)).long()
        most = max(most, int(torch.bincount(places.flatten()).max()))
    assert most**0.5 <= lipschitz_bound(layer.eval(), (1, *pixels)).value <= most**0.5 * (1 + 1e-6)


@SETTINGS
@given(st.data())
def test_averages_and_pads_are_bounded_by_what_their_forward_does(data):
    axes = data.draw(st.integers(1, 3))
    pixels = tuple(data.draw(st.integers(3, {1: 20, 2: 7, 3: 4}[axes])) for _ in range(axes))
    kind = data.draw(st.sampled_from(["average", "adaptive", "linear", "area", "copies"]))
    if kind == "average":
        layer = getattr(nn, f"AvgPool{axes}d")(
            data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 0, data.draw(st.booleans())
        )
    elif kind == "adaptive":
        layer = getattr(nn, f"AdaptiveAvgPool{axes}d")(tuple(data.draw(st.integers(1, 5)) for _ in pixels))
    elif kind == "copies":
        mode, pads = data.draw(st.sampled_from(["reflect", "replicate", "circular"])), []
        for n in pixels[::-1]:
            pads += [data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))]
        above = nonnegative(lambda x: F.pad(x, pads, mode=mode), pixels)
        true = norm_of(lambda x: F.pad(x, pads, mode=mode), pixels)
        assert true * (1 - 1e-6) <= above <= true * (1 + 1e-5)
        return
    else:
        mode = "area" if kind == "area" else {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]
        align = {"align_corners": data.draw(st.booleans())} if kind == "linear" else {}
        layer = nn.Upsample(scale_factor=data.draw(st.sampled_from([1.05, 1.5, 2, 2.2, 3])), mode=mode, **align)
    above, true = lipschitz_bound(layer.eval(), (1, *pixels)).value, norm_of(layer, pixels)
    assert true * (1 - 1e-6) <= above <= true * (1 + 1e-5)


def test_a_gradient_that_is_not_the_adjoint_is_not_believed():
    class Lying(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.cat((x, x[..., :1]), -1) / 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient[..., :-1] / 2

    with pytest.raises(NoBound, match="not the adjoint"):
        nonnegative(Lying.apply, (5,))
    with pytest.raises(NoBound, match="other pixels in float32"):
        nonnegative(lambda x: x.flip(-1) / 2 if x.dtype == torch.float32 else x / 2, (5,))


MODES = ["cached in training", "cached before a step", "cached for another layer", "in training", "changed by hand"]


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("make, shape", [
    (lambda: nn.Linear(6, 5), (6,)),
    (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    (lambda: nn.ConvTranspose2d(3, 3, 3), (3, 5, 5)),
])  # fmt: skip
def test_a_proof_vouches_only_for_the_very_weight_in_use(how, make, shape):
    torch.manual_seed(0)
    layer = spectral(make()).eval()
    x = torch.randn(2, *shape)
    layer(x)  # which makes a proof
    with parametrize.cached():
        raw = layer.parametrizations.weight.original
        if how == "cached in training":
            with torch.no_grad():
                raw.normal_().abs_()
            layer.train()(x)
            layer.eval()
        elif how == "cached before a step":
            layer(x)
            raw.data.normal_()
            layer.parametrizations.weight(), layer.parametrizations.weight[0](raw)  # another proof, of another weight
        elif how == "cached for another layer":
            parametrize._cache[(id(layer), "weight")] = 3 * torch.ones_like(raw)
        elif how == "in training":
            layer.train()(x)
            layer.parametrizations.eval()
        else:
            layer.parametrizations.weight[0].forward = lambda weight: 2 * weight
        rule = {nn.Linear: dense, nn.ConvTranspose2d: transposed_convolution}
        rule = rule.get(parametrize.type_before_parametrizations(layer), convolution)
        above = rule(layer, Call((1, *shape), tuple(layer(x[:1]).shape)))
        with torch.no_grad():
            assert singular_values(layer, shape)[0] <= above * (1 + 1e-6)


def test_a_weight_as_it_was_proved_is_not_proved_again(monkeypatch):
    layer = spectral(nn.Conv2d(3, 4, 3)).eval()
    with parametrize.cached():
        layer(torch.zeros(1, 3, 6, 6))
        monkeypatch.setattr("lipguide.bounds.convolutions.conv_norm", None)
        monkeypatch.setattr("lipguide.bounds.convolutions.picture_norm", None)
        assert 1 <= lipschitz_bound(layer, (3, 6, 6)).value <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_has_no_say_in_a_bound(dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.AvgPool2d(3), nn.Conv2d(4, 4, 3, 2),
        nn.Flatten(), nn.Linear(64, 5),
    ).to(dtype).eval()  # fmt: skip
    expected = lipschitz_bound(layers, (3, 16, 16)).value
    wide = conv_norm(layers[0].weight)
    torch.set_default_dtype(torch.float64)
    try:
        assert lipschitz_bound(layers, (3, 16, 16)).value == expected
        assert conv_norm(layers[0].weight) == wide
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_strided_circle_on_a_side_that_its_stride_does_not_divide_is_bounded_as_it_is():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular")
    for side in (3, 5, 6):
        true = singular_values(copy.deepcopy(layer), (2, side, side))[0].item()
        assert true <= lipschitz_bound(layer.eval(), (2, side, side)).value


@pytest.mark.parametrize("make, shape", [(lambda: SLL(3, 3, 3), (3, 5, 5)), (lambda: SLLLinear(4, 4), (4,))])
def test_sll_does_not_vouch_for_filters_out_of_a_cache(make, shape):
    block = make().eval()
    with parametrize.cached():
        assert lipschitz_bound(block, shape).value == 1
        parametrize._cache[(id(block), "weight")] = 3 * block.weight
        assert block.lipschitz(1.0, None) > 16
        with pytest.raises(ValueError, match="remembered by parametrize.cached"):
            lipschitz_bound(block, shape)

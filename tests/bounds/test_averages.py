"""The bounds of averages and copies, by what their forward does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lipguide.bounds.averages import nonnegative
from lipguide.bounds.calls import NoBound
from lipguide.bounds.network import lipschitz_bound

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

"""The bounds of dense layers and of convolutions as they are now."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lipguide.bounds.calls import Call
from lipguide.bounds.convolutions import convolution, dense, transposed_convolution
from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.affine import spectral
from lipguide.layers.norms import conv_norm
from lipguide.layers.sll import SLL, SLLLinear
from tests.oracles import singular_values

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

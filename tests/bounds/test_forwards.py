"""A constant is that of one sample: whatever lets samples meet is an error, and what is no tensor is no head."""

from collections import namedtuple

import pytest
import torch
from torch import nn

import lipguide as lip
from lipguide.bounds import torch_layers
from lipguide.layers.export import export


class Forward(nn.Module):
    """Wraps a function so that it is a forward to be traced."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn, self.sort = fn, lip.FullSort()
        self.narrow = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.fn(self, x)


MIXING = {
    "squeeze, then mean": lambda m, x: x.squeeze().mean(0),
    "mean over the batch": lambda m, x: x.mean(0),
    "mean over the batch, kept": lambda m, x: x - x.mean(0, keepdim=True),
    "mean over everything": lambda m, x: x.mean(),
    "mean from behind": lambda m, x: x.mean((-4, 2)),
    "the batch merged with channels": lambda m, x: m.sort(x.reshape(-1, 4)),
    "the batch merged by flatten": lambda m, x: x.flatten(0, 1),
    "all in one row": lambda m, x: x.view(1, -1),
    "all flat": lambda m, x: x.flatten(),
    "the batch moved": lambda m, x: m.sort(x.transpose(0, 1)).transpose(0, 1),
    "the batch permuted": lambda m, x: m.sort(x.permute(1, 0, 2, 3)).permute(1, 0, 2, 3),
    "the batch moved to the end": lambda m, x: x.movedim(0, -1),
    "the batch cut": lambda m, x: x[:1],
    "one sample": lambda m, x: x[0],
    "neighbours": lambda m, x: x[1:] - x[:-1],
    "samples side by side": lambda m, x: torch.cat((x, x), 0),
    "samples stacked": lambda m, x: torch.stack((x, x)),
    "samples handed out": lambda m, x: x.unbind(0)[0],
    "the batch in chunks": lambda m, x: x.chunk(2, 0)[0],
    "an axis before the batch": lambda m, x: m.sort(x.unsqueeze(0)).squeeze(0),
    "scaled by the batch": lambda m, x: x * x.shape[0],
    "divided by the batch": lambda m, x: x / x.size(0),
    "the batch as a width": lambda m, x: nn.functional.pixel_shuffle(x.transpose(0, 1).reshape(4, 4, -1), 2),
}


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 2, 4), (2, 4, 4), (1, 1, 1), (4, 4, 4)])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_meet_are_an_error_or_do_not_meet(name, shape):
    model = Forward(MIXING[name]).eval()
    try:
        lip.lipschitz_bound(model, shape)
    except ValueError:
        return
    x, other = torch.randn(3, 2, *shape).unbind(1)  # what one sample gives must not depend on the others
    assert torch.equal(model(x)[:1], model(x[:1]))
    assert torch.equal(model(torch.cat((x[:1], other[1:])))[:1], model(x[:1]))


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_meet_are_an_error_on_pictures_of_several_channels(name):
    with pytest.raises(ValueError, match=r"samples|batch"):
        lip.lipschitz_bound(Forward(MIXING[name]).eval(), (4, 2, 4))


APART = {
    "flat": lambda m, x: x.flatten(1),
    "rows": lambda m, x: x.reshape(x.shape[0], -1),
    "free batch": lambda m, x: x.view(-1, 4, 2, 4),
    "channels last": lambda m, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4),
    "channels handed out": lambda m, x: x.unbind(1)[2],
    "a column": lambda m, x: x[:, 0, :, None],
    "squeezed and back": lambda m, x: x.mean(2, keepdim=True).squeeze(2),
}


@pytest.mark.parametrize("name", APART)
def test_samples_that_stay_apart_are_followed(name):
    assert lip.lipschitz_bound(Forward(APART[name]).eval(), (4, 2, 4)).value == pytest.approx(1, abs=0.3)


LAYERS = [
    (nn.Flatten(0), (3,)),
    (nn.Unflatten(0, (1, 1)), (3,)),
    (nn.Softmax(0), (3,)),
    (nn.Linear(2, 2), ()),
    (nn.Linear(1, 1), ()),
    (nn.PixelUnshuffle(2), (4, 4)),
    (nn.ZeroPad2d((0, 0, 1, 0)), (3,)),
    (nn.ZeroPad2d((0, 0, 1, -1)), (3,)),
    (nn.ConstantPad1d((1, -1), 2.0), ()),
    (lip.SLLLinear(2, 2), ()),
]


@pytest.mark.parametrize("layer, shape", LAYERS, ids=str)
def test_a_layer_that_would_take_the_batch_for_something_else_is_an_error(layer, shape):
    with pytest.raises(ValueError):
        lip.lipschitz_bound(nn.Sequential(layer).eval(), shape)


Output = namedtuple("Output", "logits note")


@pytest.mark.parametrize(
    "fn, heads",
    [
        (lambda m, x: {"z": x, "extra": 3}, {"z": 1.0}),
        (lambda m, x: {"z": x, "on": True, "less": -3, "name": "grid"}, {"z": 1.0}),
        (lambda m, x: (2 * x, x, "two"), {"0": 2.0, "1": 1.0}),
        (lambda m, x: (2 * x, slice(0, 3), None, x), {"0": 2.0, "3": 1.0}),
        (lambda m, x: Output(x, 3 * x), {"logits": 1.0, "note": 3.0}),
        (lambda m, x: [x, {"b": (x, 5)}], {"0": 1.0, "1.b.0": 1.0}),
        (lambda m, x: {"z": x, "sides": x.shape[2]}, {"z": 1.0}),
    ],
)
def test_only_tensors_are_heads(fn, heads):
    model = Forward(fn).eval()
    bound = lip.lipschitz_bound(model, (4, 2, 4))
    assert bound.heads == (heads if len(heads) > 1 else {})
    assert bound.value == pytest.approx(sum(value**2 for value in heads.values()) ** 0.5)


def test_a_forward_without_a_tensor_is_an_error():
    for fn in (lambda m, x: "nothing", lambda m, x: x.shape[1], lambda m, x: {}):
        with pytest.raises(lip.Unbounded, match="returns no tensor"):
            lip.lipschitz_bound(Forward(fn).eval(), (4, 2, 4))


def test_an_exported_cut_into_patches_keeps_its_bound():
    model = nn.Sequential(lip.Patches(nn.Sequential(nn.Flatten(), lip.orthogonal(nn.Linear(16, 5))), 2)).eval()
    original, exported = (lip.lipschitz_bound(m, (4, 6, 4)) for m in (model, export(model)))
    assert exported.value <= original.value * 1.001
    assert [row.name for row in exported.layers] == [row.name for row in original.layers]


KINDS = {
    nn.Linear: (4, 5),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d), (4, 4, 1)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), (4,)),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (2,)),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), (2,)),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), (2,)),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), (None, 2)),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d), (1,)),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.ZeroPad1d, nn.ZeroPad2d), (1,)),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d), (1, 0.5)),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), (2,)),
    nn.Unflatten: (1, (2, 2)),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), (1,)),
    **dict.fromkeys((nn.LPPool1d, nn.LPPool2d), (2, 2)),
}
BRICKS = [
    lip.GroupSort2(),
    lip.FullSort(),
    lip.Householder(4),
    lip.ScaledL2NormPool2d(2),
    lip.ScaledAvgPool2d(2),
    lip.GlobalL2NormPool2d(),
    lip.GlobalAvgPool2d(),
    lip.InvertibleDownSampling(2),
    lip.InvertibleUpSampling(2),
    lip.SLL(4, 4, 3),
    lip.SLLLinear(4, 4),
    lip.PadChannels(8),
    lip.BatchCentering(4),
    lip.Patches(nn.Flatten(), 2),
    lip.Residual(nn.ReLU()),
    lip.Concat(nn.ReLU(), nn.Identity()),
]


def known_layers() -> list[nn.Module]:
    return [kind(*KINDS.get(kind, ())) for kind in torch_layers.LAYERS] + BRICKS


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize(
    "shape", [(), (1,), (4,), (4, 4), (1, 4), (1, 4, 4), (4, 4, 4), (4, 2, 4, 4), (1, 1, 2, 4)], ids=str
)
def test_a_layer_that_is_known_keeps_samples_apart_without_being_run_on_two(shape):
    """For these no second forward is spent: whichever of them has a bound gives each sample what it gives it alone."""
    bounded = 0
    for layer in known_layers():
        model = nn.Sequential(layer).eval()
        try:
            lip.lipschitz_bound(model, shape)
        except ValueError:
            continue
        bounded += 1
        x = torch.randn(2, *shape)
        with torch.no_grad():
            alone = torch.cat([model(sample) for sample in x.split(1)])
            assert torch.allclose(model(x), alone, atol=1e-6), layer
    assert bounded > 20


class Sideways(nn.Module):
    """A linear map along the batch, for which its class says a constant all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        return self.linear(x.T).T

    def lipschitz(self, constant, through):
        return through(self.linear, constant)


def test_a_class_that_speaks_for_itself_is_run_on_a_batch_of_two():
    for model in (Sideways(), nn.Sequential(lip.Residual(Sideways()))):
        with pytest.raises(ValueError, match="takes one input, but not a batch of two"):
            lip.lipschitz_bound(model.eval(), (4,))

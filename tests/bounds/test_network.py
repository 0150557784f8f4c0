"""Bounds of whole networks: sound from above, reached from below, and an error wherever they would have to guess."""

import copy
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lipguide.bounds.network import Bound, Unbounded, lipschitz_bound, lipschitz_lower_bound
from lipguide.layers.activations import GroupSort2, MaxMin
from lipguide.layers.affine import orthogonal, spectral
from lipguide.layers.blocks import Concat, Patches, Residual
from lipguide.layers.export import export
from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.layers.sll import SLL
from tests.networks import Forward, linear, networks
from tests.oracles import steepest

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def train(model: nn.Module, shape: tuple[int, ...], steps: int = 100, rate: float = 0.3) -> nn.Module:
    """A hundred steps at a rate far too high."""
    torch.manual_seed(0)
    model.train()
    x = torch.randn(4, *shape)
    target = torch.randn_like(model(x).detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # or plain layers would be infinite before they are wrong
        optimizer.step()
    return model.eval()


@SETTINGS
@given(networks())
def test_no_input_beats_the_bound(case):
    model, shape = case
    bound = lipschitz_bound(model, shape)
    assert steepest(model, shape) <= bound.value * (1 + 1e-6)
    assert lipschitz_lower_bound(model, torch.randn(3, *shape), steps=15) <= bound.value * (1 + 1e-6)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(networks(depth=3))
def test_no_input_beats_the_bound_after_a_hundred_steps_at_a_high_rate(case):
    model, shape = case
    train(model, shape)
    bound = lipschitz_bound(model, shape)
    assert steepest(model, shape) <= bound.value * (1 + 1e-6)
    assert lipschitz_lower_bound(model, torch.randn(3, *shape), steps=15) <= bound.value * (1 + 1e-6)


@SETTINGS
@given(networks())
def test_an_exported_network_is_bounded_as_well_as_its_original(case):
    model, shape = case
    exported = lipschitz_bound(export(model), shape).value
    # Above the truth, and below the original's, whose constraints vouch for pictures of every size.
    assert steepest(model, shape) * (1 - 1e-6) <= exported <= 1.02 * lipschitz_bound(model, shape).value


def test_a_chain_multiplies():
    bound = lipschitz_bound(nn.Sequential(linear(2), nn.ReLU(), linear(3)).eval(), (4,))
    assert bound.value == pytest.approx(6)
    assert [row.lipschitz for row in bound.layers] == pytest.approx([2, 1, 3])
    assert [row.total for row in bound.layers] == pytest.approx([2, 2, 6])


def test_skip_connections_have_their_factors():
    cases = {
        Residual(linear(3)): 2.0,
        Concat(linear(3), nn.Identity()): math.sqrt((9 + 1) / 2),
        Concat(nn.Identity(), nn.Identity()): 1.0,
    }
    for model, expected in cases.items():
        assert lipschitz_bound(model.eval(), (4,)).value == pytest.approx(expected)
    assert lipschitz_bound(Patches(nn.Sequential(nn.Flatten(), linear(3)), 2).eval(), (1, 4, 4)).value == pytest.approx(
        3
    )


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(2), linear(3)

    def forward(self, x):
        return self.b(self.a(x)) / 2 + 4 * x


class Halves(nn.Module):
    def forward(self, x):
        left, right = x.chunk(2, 1)
        return torch.cat((left, -right), dim=1).flatten(1)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classes, self.boxes = linear(2), linear(3), linear(5)

    def forward(self, x):
        x = self.trunk(x)
        return {"classes": self.classes(x), "boxes": [self.boxes(x), x]}


def test_a_forward_of_ones_own_is_followed():
    assert lipschitz_bound(Skip().eval(), (4,)).value == pytest.approx(2 * 3 / 2 + 4)
    assert lipschitz_bound(Halves().eval(), (4,)).value == pytest.approx(math.sqrt(2))
    assert lipschitz_bound(nn.Sequential(linear(2), Skip()).eval(), (4,)).value == pytest.approx(14)


def test_several_heads_have_a_constant_each_and_one_together():
    bound = lipschitz_bound(Heads().eval(), (4,))
    assert bound.heads == pytest.approx({"classes": 6, "boxes.0": 10, "boxes.1": 2})
    assert bound.value == pytest.approx(math.sqrt(36 + 100 + 4))
    assert [row.name for row in bound.layers] == ["trunk", "classes", "boxes"]
    assert lipschitz_lower_bound(Heads(), torch.randn(2, 4)) == pytest.approx(bound.value, rel=1e-4)


class Gate(nn.Module):
    """A forward that cannot be traced, with the method that stands in for it."""

    def __init__(self, forgetful: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.forgetful = linear(2), linear(3), forgetful

    def forward(self, x):
        return self.a(x) + (self.b(x) if float(x.sum()) < 1e9 else 0)

    def lipschitz(self, constant, through):
        return through(self.a, constant) + (0 if self.forgetful else through(self.b, constant))


def test_a_lipschitz_method_stands_in_for_a_forward():
    assert lipschitz_bound(Gate().eval(), (4,)).value == pytest.approx(5)
    with pytest.raises(Unbounded, match="^b .*no lipschitz method"):
        lipschitz_bound(Gate(forgetful=True).eval(), (4,))


FOLLOWED = {
    "scale by a weight": (lambda m, x: m.gain * x, 7.0),
    "divide by a weight": (lambda m, x: x / m.gain, 1.0),
    "shift by a weight": (lambda m, x: x - m.gain, 1.0),
    "mean": (lambda m, x: x.mean(1), 0.5),
    "maximum": (lambda m, x: torch.maximum(x, 2 * x), math.sqrt(5)),
    "slices": (lambda m, x: x[:, 1:, None], 1.0),
    "a mild activation in place": (lambda m, x: torch.relu(nn.functional.relu(x, inplace=True) + x), 2.0),
    "sum in place": (lambda m, x: operator.iadd(m.layer(x), x), 2.0),
    "stack": (lambda m, x: torch.stack((x, x), 1), math.sqrt(2)),
    "shape": (lambda m, x: x.reshape(x.shape[0], x.size(1) // 2, 2), 1.0),
    "negative": (lambda m, x: -torch.relu(-x), 1.0),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_operations_in_a_forward_have_their_constants(name):
    fn, expected = FOLLOWED[name]
    model = Forward(fn).eval()
    assert lipschitz_bound(model, (4,)).value == pytest.approx(expected, rel=1e-6)
    assert lipschitz_lower_bound(model, torch.randn(2, 4), steps=10) <= expected * (1 + 1e-6)


REFUSED = {
    "product": lambda m, x: x * m.layer(x),
    "repeats": lambda m, x: x + x[:, :1],
    "index by a tensor": lambda m, x: x[:, torch.tensor([0, 0])],
    "unknown function": lambda m, x: torch.exp(x),
    "control flow": lambda m, x: x if x.sum() > 0 else -x,
    "shares memory, then changes it": lambda m, x: (operator.iadd(x, m.layer(x)), x)[1],
    "a steep activation in place": lambda m, x: m.act(x) + x,
    "weight used by hand": lambda m, x: nn.functional.linear(x, m.layer.weight),
    "a constant that may be none": lambda m, x: x + torch.ones(4),
    "other numbers in the same bits": lambda m, x: x.view(torch.int32),
    "tensors by name": lambda m, x: torch.cat(tensors=[x, x], dim=1),
    "a tensor by name": lambda m, x: torch.mean(input=x),
    "a factor by name": lambda m, x: torch.mul(x, other=3.0),
    "scale by the input": lambda m, x: x * x.shape[1] * x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_in_a_forward_is_an_error(name):
    with pytest.raises(Unbounded, match="the model .*Forward.* has no bound that is known here"):
        lipschitz_bound(Forward(REFUSED[name]).eval(), (4,))


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.f = nn.Sequential(), linear(1)

    def forward(self, x):
        y = self.same(x)
        y += self.f(x)
        return y


class UsesAgain(nn.Module):
    """Like the skip of a U-Net: what goes into `part` is looked at once more."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.enter, self.part = linear(1), part

    def forward(self, x):
        skip = self.enter(x)
        y = self.part(skip)
        return torch.cat((skip, y), 1)


class UsesAgainByHand(UsesAgain):
    def lipschitz(self, constant, through):
        constant = through(self.enter, constant)
        return math.hypot(constant, through(self.part, constant))


STEEP = {
    "SELU": lambda: nn.SELU(inplace=True),
    "Hardswish": lambda: nn.Hardswish(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(3.0, inplace=True),
    "in a chain": lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Identity()),
    "behind a view": lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.ELU(2.0, inplace=True)),
    "made smaller afterwards": lambda: nn.Sequential(nn.SELU(inplace=True), linear(0.1)),
    "sum in place": AddsInPlace,
}
AGAIN = {
    "Residual": Residual,
    "Concat": lambda part: Concat(part, nn.Identity()),
    "U-Net": UsesAgain,
    "by hand": UsesAgainByHand,
    "exported": lambda part: export(Residual(part)),
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("part", STEEP)
def test_what_is_changed_in_place_must_not_be_used_again(part, again):
    with pytest.raises(Unbounded, match="in place"):
        lipschitz_bound(AGAIN[again](STEEP[part]()).eval(), (4,))


@pytest.mark.parametrize("again", AGAIN)
def test_in_place_is_fine_where_it_shrinks_or_nothing_is_used_again(again):
    for part in (nn.ReLU(inplace=True), nn.Sequential(linear(1), nn.SELU(inplace=True))):
        model = AGAIN[again](part).eval()
        bound = lipschitz_bound(model, (4,)).value
        assert lipschitz_lower_bound(model, torch.randn(8, 4), steps=1) <= bound * (1 + 1e-6)
    assert lipschitz_bound(nn.Sequential(linear(1), AddsInPlace()).eval(), (4,)).value == pytest.approx(2)


class Keeps(nn.Module):
    def forward(self, x):
        self.kept = x
        return x


class KeepsInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 4))

    def forward(self, x):
        self.kept.copy_(x)
        return x


class AddsKept(nn.Module):
    def __init__(self, keeper: nn.Module) -> None:
        super().__init__()
        self.keeper = [keeper]

    def forward(self, x):
        return x + self.keeper[0].kept


def test_what_a_forward_keeps_is_no_constant():
    for keeper, why in [(Keeps(), "register it as a buffer"), (KeepsInABuffer(), "0.kept is changed by the forward")]:
        model = nn.Sequential(keeper, AddsKept(keeper)).eval()
        with pytest.raises(Unbounded, match=why):
            lipschitz_bound(model, (4,))
        assert not any("_tensor_constant" in name for module in model for name in vars(module))


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Renamed(nn.Linear):
    """Another name, the same layer."""


def test_a_subclass_is_only_trusted_with_the_forward_that_it_inherits():
    assert lipschitz_bound(Renamed(2, 2).eval(), (2,)).value > 0
    with pytest.raises(Unbounded, match="Doubling"):
        lipschitz_bound(nn.Sequential(Doubling(2, 2)).eval(), (2,))


def test_an_unknown_layer_is_named_by_path_and_class():
    model = nn.Sequential(nn.Sequential(linear(1), nn.LayerNorm(4))).eval()
    with pytest.raises(Unbounded, match=r"0\.1 \(torch\.nn\.modules\.normalization\.LayerNorm\)"):
        lipschitz_bound(model, (4,))


def test_a_layer_that_was_tampered_with_is_an_error():
    hooked = nn.Sequential(linear(1))
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(Unbounded, match="hook"):
        lipschitz_bound(hooked.eval(), (4,))
    inside = export(nn.Sequential(Residual(linear(1))))
    inside[0].branch.register_forward_hook(lambda module, inputs, output: 10 * output)
    with pytest.raises(Unbounded, match="hook"):
        lipschitz_bound(inside, (4,))
    replaced = linear(1)
    replaced.forward = lambda x: 2 * x
    with pytest.raises(Unbounded, match="replaced"):
        lipschitz_bound(replaced.eval(), (4,))
    exported = export(nn.Sequential(GroupSort2()))
    exported[0].graph.output_node().args = ((next(iter(exported[0].graph.nodes)),),)
    exported[0].recompile()
    assert lipschitz_bound(exported, (4,)).heads == {}  # followed as the graph that it is now: the identity


def test_training_mode_is_an_error_and_so_is_a_diverged_weight():
    model = nn.Sequential(linear(1), nn.Dropout())
    with pytest.raises(ValueError, match="training mode"):
        lipschitz_bound(model, (4,))
    model.eval()[0].bias.data[0] = math.nan
    with pytest.raises(ValueError, match="bias of 0 holds NaN"):
        lipschitz_bound(model, (4,))


def test_weights_that_no_bound_can_use_are_named():
    with pytest.raises(ValueError, match="weight of 0 has no values yet"):
        lipschitz_bound(nn.Sequential(nn.LazyLinear(3)).eval(), (4,))
    with pytest.raises(ValueError, match="weight of the model is complex"):
        lipschitz_bound(nn.Linear(2, 2, dtype=torch.complex64).eval(), (2,))
    with pytest.raises(ValueError, match="weight of the model has no values: it is on the device meta"):
        lipschitz_bound(nn.Linear(2, 2, device="meta").eval(), (2,))


def test_a_wrong_shape_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="without the batch"):
        lipschitz_bound(nn.Conv2d(3, 4, 3).eval(), (1, 3, 8, 8))


def test_a_layer_used_twice_counts_twice():
    layer = linear(2)
    bound = lipschitz_bound(nn.Sequential(layer, nn.ReLU(), layer).eval(), (4,))
    assert bound.value == pytest.approx(4)
    assert len(bound.layers) == 3


def test_a_layer_used_on_two_sizes_counts_with_the_larger():
    torch.manual_seed(0)
    blur = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.constant_(blur.weight, 1 / 9)
    model = nn.Sequential(blur, ScaledL2NormPool2d(4), blur).eval()
    rows = lipschitz_bound(model, (1, 8, 8)).layers
    assert rows[0].lipschitz == rows[2].lipschitz > 0.9


def test_the_table_has_one_row_a_layer():
    bound = lipschitz_bound(nn.Sequential(spectral(nn.Conv2d(3, 4, 3)), MaxMin(), nn.Flatten()).eval(), (3, 8, 8))
    table = str(bound).splitlines()
    assert isinstance(bound, Bound)
    assert len(table) == 5
    assert "Conv2d (Spectral)" in table[1] and "4×6×6" in table[1]
    assert table[-1].split()[0] == "network"


def test_bounding_changes_nothing():
    model = nn.Sequential(spectral(nn.Conv2d(3, 4, 3)), SLL(4, 4), nn.BatchNorm2d(4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lipschitz_bound(model, (3, 8, 8))
    lipschitz_lower_bound(model, torch.randn(2, 3, 8, 8), steps=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_constrained_networks_are_one_lipschitz():
    for constrain in (spectral, orthogonal):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 5, padding=2)]
        model = nn.Sequential(*(m for layer in layers for m in (constrain(layer), GroupSort2()))).eval()
        assert 1 <= lipschitz_bound(model, (3, 16, 16)).value <= 1 + 1e-4


def test_a_bound_can_be_asked_for_in_inference_mode():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, 1), nn.ReLU(inplace=True)).eval()
    with torch.inference_mode():
        inside = lipschitz_bound(model, (1, 8, 8)).value
    assert inside == lipschitz_bound(model, (1, 8, 8)).value > 0


def test_a_network_that_was_made_in_inference_mode_is_bounded_outside_of_it():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), spectral(nn.Conv2d(2, 2, 3)), nn.Flatten(), nn.Linear(32, 3)).eval()
    copy_of_it = copy.deepcopy(model)
    with torch.inference_mode():
        inside = lipschitz_bound(copy_of_it, (1, 8, 8)).value
    assert lipschitz_bound(model, (1, 8, 8)).value == inside > 0


def test_half_precision_networks_are_bounded_with_the_weights_that_they_have():
    torch.manual_seed(0)
    model = nn.Sequential(spectral(nn.Linear(8, 8)), GroupSort2()).eval().to(torch.bfloat16)
    bound = lipschitz_bound(model, (8,)).value
    assert 1 - 0.01 <= bound <= 1 + 0.01
    weight = model[0].weight.double()
    assert torch.linalg.matrix_norm(weight, ord=2) <= bound


def test_a_vgg_is_bounded_and_the_bound_lies_above_what_is_reached():
    torch.manual_seed(0)
    widths = [(3, 32, 0), (32, 32, 1), (32, 64, 0), (64, 64, 1), (64, 128, 0), (128, 128, 1)]
    layers = [
        part
        for inputs, outputs, pool in widths
        for part in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * pool)
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10)).eval()
    bound = lipschitz_bound(model, (3, 32, 32))
    assert len(bound.layers) == len(model)
    assert lipschitz_lower_bound(model, torch.rand(2, 3, 32, 32), steps=30) <= bound.value
    assert bound.value == pytest.approx(math.prod(row.lipschitz for row in bound.layers))


def test_copies_of_one_layer_are_bounded_each_by_its_own_weight():
    """torch remembers the weight of a copy under the address of its original."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer, copy.deepcopy(layer), copy.deepcopy(layer)).eval()
    with torch.no_grad():
        for scale, part in zip((1, 10, 100), model, strict=True):
            part.parametrizations.weight.original0.mul_(scale)
    norms = [float(torch.linalg.matrix_norm(part.weight.detach().double(), 2)) for part in model]
    assert lipschitz_bound(model, (4,)).value == pytest.approx(math.prod(norms), rel=1e-5)

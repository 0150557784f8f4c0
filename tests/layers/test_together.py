"""Weights in one call are the weights of one call each, with their gradients and with what they leave behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lipguide.layers import orthogonal as orthogonal_layer
from lipguide.layers import together as together_module
from lipguide.layers.affine import aol, orthogonal, spectral, unit_rows
from lipguide.layers.constraints import Constraint
from lipguide.layers.sll import SLL, SLLLinear
from lipguide.layers.together import together
from tests.layers.test_cost import Kernels

PICTURE, VECTOR = (6, 5, 5), (6,)


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(6, 6, 3, padding=1, **options)


KINDS = {
    "spectral": (lambda: spectral(conv()), PICTURE),
    "spectral, in groups": (lambda: spectral(conv(groups=2)), PICTURE),
    "spectral dense": (lambda: spectral(nn.Linear(6, 6)), VECTOR),
    "orthogonal": (lambda: orthogonal(conv()), PICTURE),
    "orthogonal dense": (lambda: orthogonal(nn.Linear(6, 6)), VECTOR),
    "unit_rows": (lambda: unit_rows(conv()), PICTURE),
    "SLL": (lambda: SLL(6, 8, 3), PICTURE),
    "SLL, in a circle": (lambda: SLL(6, 8, 3, padding_mode="circular"), PICTURE),
    "SLL dense": (lambda: SLLLinear(6, 8), VECTOR),
}


def stack(*layers: nn.Module) -> nn.Sequential:
    """In training, with free parameters that differ from layer to layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).train()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(0.3 * torch.randn_like(part))
    return model


def learn(model: nn.Module, x: torch.Tensor, steps: int, at_once: bool) -> None:
    for _ in range(steps):
        if at_once:
            with together(model):
                y = model(x)
        else:
            y = model(x)
        model.zero_grad()
        y.square().sum().backward()
        with torch.no_grad():
            for part in model.parameters():
                part.sub_(0.01 * part.grad)


WAYS = [(name, False) for name in KINDS] + [("orthogonal", True), ("orthogonal dense", True)]


@pytest.mark.parametrize("name, by_products", WAYS)
def test_three_alike_learn_as_one_by_one(name, by_products, monkeypatch):
    monkeypatch.setattr(orthogonal_layer, "BY_PRODUCTS", {"cpu"} if by_products else set())
    make, shape = KINDS[name]
    model, x = stack(make(), make(), make()), torch.randn(2, *shape)
    twin = copy.deepcopy(model)
    learn(model, x, 3, at_once=True)
    learn(twin, x, 3, at_once=False)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


def test_a_copy_of_a_network_takes_no_step_twice():
    """torch would look for its weights under the addresses of the original, and compute them again."""
    make, shape = KINDS["spectral dense"]
    model, x = copy.deepcopy(stack(make(), make())), torch.randn(2, *shape)
    twin = copy.deepcopy(model)
    learn(model, x, 2, at_once=True)
    learn(twin, x, 2, at_once=False)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, (_, shape) in KINDS.items() if shape == PICTURE])
def test_weights_lie_in_memory_as_they_would(name):
    make, _ = KINDS[name]
    model = stack(make(), make()).to(memory_format=torch.channels_last)
    theirs = [layer.weight for layer in copy.deepcopy(model)]
    with together(model):
        for layer, weight in zip(model, theirs, strict=True):
            assert layer.weight.stride() == weight.stride() and torch.allclose(layer.weight, weight, atol=1e-6)


SHAPES = {
    "spectral": [spectral(nn.Conv2d(i, o, 3, padding=1)) for i, o in ((3, 8), (8, 5), (5, 8))],
    "spectral dense": [spectral(nn.Linear(i, o)) for i, o in ((9, 4), (4, 7), (7, 2))],
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_several_shapes_learn_as_one_by_one_where_zeros_fill_them_up(name, channels_last, monkeypatch):
    monkeypatch.setattr(together_module, "EXTENDS", {"cpu"})
    model = stack(*copy.deepcopy(SHAPES[name]))
    x = torch.randn(2, 9) if "dense" in name else torch.randn(2, 3, 5, 5)
    if channels_last and x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    learn(model, x, 2, at_once=True)
    learn(twin, x, 2, at_once=False)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=2e-5), name
    with together(model):
        for one, other in zip(model, twin, strict=True):
            assert one.weight.shape == other.weight.shape and one.weight.stride() == other.weight.stride()


def test_several_shapes_call_a_part_of_the_operators(monkeypatch):
    counted = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(together_module, "EXTENDS", devices)
        model, x = stack(*(spectral(nn.Conv2d(i, i + 1, 3, padding=1)) for i in range(3, 9))), torch.randn(1, 3, 4, 4)
        learn(model, x, 1, at_once=True)
        with Kernels() as seen:
            learn(model, x, 1, at_once=True)
        counted.append(seen.seen.total())
    assert counted[1] <= 0.5 * counted[0]


def test_shapes_that_would_be_mostly_zeros_are_computed_apart(monkeypatch):
    monkeypatch.setattr(together_module, "EXTENDS", {"cpu"})
    monkeypatch.setattr(together_module, "MOST", 200)
    monkeypatch.setattr(together_module, "_InZeros", None)
    model = stack(*(spectral(nn.Linear(6, outputs)) for outputs in (6, 6, 20)))
    theirs = [layer.weight for layer in copy.deepcopy(model)]
    with together(model):
        ours = [layer.weight for layer in model]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"groups": 3}])
def test_what_zeros_would_change_is_computed_apart(options, monkeypatch):
    monkeypatch.setattr(together_module, "EXTENDS", {"cpu"})
    model = stack(*(spectral(nn.Conv2d(6, outputs, 3, **options)) for outputs in (6, 9)))
    theirs = [layer.weight for layer in copy.deepcopy(model)]
    with together(model):
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, theirs, strict=True))


# Pairs with weights of one shape that their constraints do not map alike.
PAIRS = {
    "stride": [spectral(nn.Conv2d(6, 6, 3, stride=s)) for s in (1, 2)],
    "iterations": [SLLLinear(6, 8, iterations=i) for i in (0, 3)],
    "constraint": [spectral(conv()), unit_rows(conv())],
    "transposed": [unit_rows(conv()), unit_rows(nn.ConvTranspose2d(6, 6, 3, padding=1))],
    "axes": [orthogonal(nn.Conv2d(6, 6, 2, stride=s)) for s in ((2, 1), (1, 2))],
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_not_alike_is_not_mixed(name):
    model = stack(*PAIRS[name])
    theirs = [layer.weight for layer in copy.deepcopy(model)]
    with together(model):
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, theirs, strict=True))


@pytest.mark.parametrize("name, share", [("SLL", 0.3), ("spectral", 0.4), ("orthogonal", 0.4)])
def test_many_of_one_shape_call_a_part_of_the_operators(name, share):
    make, shape = KINDS[name]
    model, x = stack(*(make() for _ in range(6))), torch.randn(1, *shape)
    counted = []
    for at_once in (True, False):
        learn(model, x, 1, at_once)
        with Kernels() as seen, torch.enable_grad():
            if at_once:
                with together(model):
                    weights = [layer.weight for layer in model]
            else:
                weights = [layer.weight for layer in model]
            sum(weight.sum() for weight in weights).backward()
        counted.append(seen.seen.total())
    assert counted[0] <= share * counted[1]


def test_in_eval_mode_each_proves_its_own():
    model = stack(spectral(conv()), spectral(conv())).eval()
    with together(model):
        ours = [layer.weight for layer in model]
    assert all(layer.parametrizations.weight[0].vouches_for(weight) for layer, weight in zip(model, ours, strict=True))


def test_nothing_is_remembered_afterwards():
    model = stack(SLLLinear(4, 4), SLLLinear(4, 4))
    with together(model):
        before = model[0].weight
        assert model[0].weight is before
    assert model[0].weight is not before and not parametrize._cache


class Halved(Constraint):
    """A reader's own, which asks for a number on the way."""

    def constrained(self, weight):
        return weight / 2 if weight.sum().item() < 100 else weight


def test_constraints_that_may_ask_for_a_number_are_called_one_by_one():
    model = stack(nn.Linear(3, 3), nn.Linear(3, 3), aol(nn.Linear(3, 3)), aol(nn.Linear(3, 3)))
    for layer in model[:2]:
        parametrize.register_parametrization(layer, "weight", Halved())
    with together(model):
        ours = [layer.weight for layer in model]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, ours, strict=True))

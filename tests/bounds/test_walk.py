"""Who may speak for a module, and what is done with what they say."""

import math
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

import lipguide as lip
from lipguide.tasks.detection.fcos import Brightless


def linear(value: float, size: int = 4) -> nn.Linear:
    layer = nn.Linear(size, size)
    layer.weight.data = value * torch.eye(size)
    return layer.eval()


class Centred(nn.Module):
    def forward(self, x):
        return self.shift(x)

    def shift(self, x):
        return x - self.by

    @property
    def by(self):
        return 0.5

    def lipschitz(self, constant, through):
        return constant


class Calls(Centred):
    """Asks for something that only its children have."""

    slope = 1.0

    def forward(self, x):
        return self.slope * self.scaled(x)

    def scaled(self, x):
        return x

    def lipschitz(self, constant, through):
        return constant


class Steeper(Centred):
    def forward(self, x):
        return 10 * super().forward(x)


class SteeperPart(Centred):
    def shift(self, x):
        return 10 * super().shift(x)


class SteeperByAttribute(Calls):
    slope = 10.0


class SpeaksThroughSuper(Steeper):
    """Says what it does itself, and asks above for the rest, where the class between has said nothing."""

    def forward(self, x):
        return 2 * super().forward(x)

    def lipschitz(self, constant, through):
        return 2 * super().lipschitz(constant, through)


class SpeaksForWhatIsBehind:
    def forward(self, x):
        return 2 * super().forward(x)

    def lipschitz(self, constant, through):
        return 2 * super().lipschitz(constant, through)


class MixedInFront(SpeaksForWhatIsBehind, Steeper):
    """Both say something of the forward, and one of them says it to nobody."""


class SteeperMixin:
    def forward(self, x):
        return 10 * super().forward(x)


class Mixed(SteeperMixin, Centred):
    """The class itself defines nothing."""


class Vouches:
    def lipschitz(self, constant, through):
        return constant


class VouchedFromAbove(Vouches, nn.Module):
    def forward(self, x):
        return 10 * x


class SteeperBrick(lip.MaxMinDouble):
    def forward(self, x):
        return 10 * x


class SteeperResidual(lip.Residual):
    def forward(self, x):
        return 20 * super().forward(x)


class SteeperBrightless(Brightless):
    def forward(self, x):
        return 10 * x


class Renamed(Centred):
    """Another name, the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.note = "nothing else"

    def extra_repr(self) -> str:
        return self.note


OVERTAKEN = {
    "forward": (Steeper, (4,)),
    "what the forward calls": (SteeperPart, (4,)),
    "a number of the class": (SteeperByAttribute, (4,)),
    "a class beside": (Mixed, (4,)),
    "a rule that asks above": (SpeaksThroughSuper, (4,)),
    "a rule beside that asks above": (MixedInFront, (4,)),
    "a rule above the forward": (VouchedFromAbove, (4,)),
    "a brick": (SteeperBrick, (4,)),
    "a joint": (lambda: SteeperResidual(nn.Identity()), (4,)),
    "a part of the detector": (SteeperBrightless, (3, 4, 4)),
}


@pytest.mark.parametrize("name", OVERTAKEN)
def test_nobody_speaks_for_a_forward_that_was_changed_below_them(name):
    make, shape = OVERTAKEN[name]
    model = make().eval()
    reached = lip.lipschitz_lower_bound(model, torch.randn(4, *shape), steps=20)
    assert reached > 5
    try:
        bound = lip.lipschitz_bound(nn.Sequential(model).eval(), shape).value
    except lip.Unbounded:
        return
    assert bound >= reached * (1 - 1e-6)


def test_an_error_says_who_was_overtaken():
    class Steepest(Centred):
        def forward(self, x):
            return torch.exp(x)

    with pytest.raises(lip.Unbounded, match="that of Centred, but Steepest redefines forward; give Steepest a lips"):
        lip.lipschitz_bound(Steepest().eval(), (4,))

    class SaysHalf(Steepest):
        def forward(self, x):
            return super().forward(x) / 2

        def lipschitz(self, constant, through):
            return super().lipschitz(constant, through) / 2

    with pytest.raises(lip.Unbounded, match="that of Centred, but Steepest redefines forward; give Steepest a lips"):
        lip.lipschitz_bound(SaysHalf().eval(), (4,))


def test_a_rule_that_asks_above_is_believed_where_everybody_has_spoken():
    class Spoken(SpeaksForWhatIsBehind, Centred):
        pass

    assert lip.lipschitz_bound(Spoken().eval(), (4,)).value == 2


def test_a_child_that_changes_nothing_is_spoken_for():
    assert lip.lipschitz_bound(Renamed().eval(), (4,)).value == 1
    held = Centred().eval()
    held.weight = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(held, "weight", nn.Identity())
    assert lip.lipschitz_bound(held.eval(), (4,)).value == 1


Pair = namedtuple("Pair", "a b")


class Says(nn.Module):
    """A method that returns what it is told to."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return x

    def lipschitz(self, constant, through):
        return self.answer


class Wraps(nn.Module):
    """Asks a part with a constant of its own."""

    def __init__(self, part, constant) -> None:
        super().__init__()
        self.part, self.constant = part, constant

    def forward(self, x):
        return self.part(x)

    def lipschitz(self, constant, through):
        return through(self.part, self.constant)


@pytest.mark.parametrize("wrong", [None, -1.0, math.nan, math.inf, "1", True, 1j, torch.ones(2)])
@pytest.mark.parametrize(
    "around", [lambda v: v, lambda v: (1.0, v), lambda v: {"a": [v]}, lambda v: Pair(v, 1.0)], ids=range(4)
)
def test_what_a_lipschitz_method_returns_must_be_a_constant(wrong, around):
    with pytest.raises(lip.Unbounded, match="what its method lipschitz returned is"):
        lip.lipschitz_bound(nn.Sequential(Says(around(wrong))).eval(), (4,))


@pytest.mark.parametrize("wrong", [None, -1.0, math.nan, math.inf, "1"])
def test_what_a_lipschitz_method_asks_with_must_be_a_constant(wrong):
    with pytest.raises(lip.Unbounded, match="the constant of its input is"):
        lip.lipschitz_bound(Wraps(linear(1), wrong).eval(), (4,))


def test_any_structure_of_constants_makes_heads():
    assert lip.lipschitz_bound(Says(Pair(3, torch.tensor(4.0))).eval(), (4,)) == (5, {"a": 3, "b": 4}, [], (4,))
    for nothing in ({}, (), {"a": []}):
        with pytest.raises(lip.Unbounded, match="no constant at all"):
            lip.lipschitz_bound(Says(nothing).eval(), (4,))


def test_an_error_in_a_lipschitz_method_names_the_module():
    class Broken(Says):
        def lipschitz(self, constant, through):
            return constant * self.missing

    with pytest.raises(lip.Unbounded, match=r"^0 .*Broken.* lipschitz failed \(AttributeError.*missing"):
        lip.lipschitz_bound(nn.Sequential(Broken(1.0)).eval(), (4,))


def test_a_number_of_the_name_lipschitz_is_no_method():
    class Tripled(nn.Module):
        lipschitz = 1.0

        def forward(self, x):
            return 3 * x

    assert lip.lipschitz_bound(Tripled().eval(), (4,)).value == 3
    model = nn.Sequential(linear(2)).eval()
    model.lipschitz = model[0].lipschitz = 1.0
    assert lip.lipschitz_bound(model, (4,)).value == pytest.approx(2)


@pytest.mark.parametrize(
    "register", [torch_module.register_module_forward_hook, torch_module.register_module_forward_pre_hook]
)
def test_hooks_on_every_module_are_an_error(register):
    handle = register(lambda module, inputs, *output: None)
    try:
        with pytest.raises(lip.Unbounded, match="every module carries a hook .* remove it"):
            lip.lipschitz_bound(linear(1), (4,))
    finally:
        handle.remove()
    assert lip.lipschitz_bound(linear(1), (4,)).value == pytest.approx(1)


@pytest.mark.parametrize("block", [lip.SLL(4, 4, 3), lip.spectral(nn.Conv2d(4, 4, 3))])
def test_a_hook_on_a_constraint_is_an_error(block):
    block.parametrizations.weight[0].register_forward_hook(lambda module, inputs, output: 5 * output)
    with pytest.raises(lip.Unbounded, match="hook"):
        lip.lipschitz_bound(block.eval(), (4, 8, 8))


class CallsByName(nn.Module):
    def __init__(self, forgetful: bool) -> None:
        super().__init__()
        self.part, self.forgetful = linear(3), forgetful

    def forward(self, x):
        return self.part(input=x)

    def lipschitz(self, constant, through):
        return constant if self.forgetful else through(self.part, constant)


def test_a_part_that_is_called_by_keyword_is_known_and_cannot_be_forgotten():
    assert lip.lipschitz_bound(CallsByName(False).eval(), (4,)).value == pytest.approx(3)
    with pytest.raises(lip.Unbounded, match="^part .*no lipschitz method"):
        lip.lipschitz_bound(CallsByName(True).eval(), (4,))


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [IndexError("list"), AssertionError(), KeyError("mask"), NotImplementedError("yet")])
def test_whatever_a_forward_raises_is_said_in_one_error(error):
    with pytest.raises(ValueError, match=rf"does not take an input of shape \(1, 4\) \({type(error).__name__}"):
        lip.lipschitz_bound(Raises(error).eval(), (4,))


@pytest.mark.parametrize("shape", [4, None, "4", (4.0,), (True,), torch.zeros(4)])
def test_a_shape_of_the_wrong_kind_is_an_error_that_shows_one(shape):
    with pytest.raises(ValueError, match=r"input_shape is .*\(4,\) for a vector of four"):
        lip.lipschitz_bound(linear(1), shape)


def test_compiled_models_are_refused_by_name():
    with pytest.warns((FutureWarning, DeprecationWarning)):  # which of them depends on torch
        scripted = torch.jit.script(nn.Sequential(linear(1), nn.ReLU()).eval())
    with pytest.raises(lip.Unbounded, match="compiled by torch.jit"):
        lip.lipschitz_bound(scripted, (4,))
    with pytest.raises(lip.Unbounded, match="0 was compiled by torch.jit"):
        lip.lipschitz_bound(nn.Sequential(scripted).eval(), (4,))


CHANGED_SLL = [
    *((3, "zeros", {"kernel_size": k}) for k in (1, 2, 4, 5)),
    *((2, "zeros", change) for change in ({"padding_mode": "circular"}, {"kernel_size": 3})),
    *((4, "zeros", change) for change in ({"padding_mode": "circular"}, {"kernel_size": 2})),
    *((3, mode, {"padding_mode": "reflect"}) for mode in ("zeros", "circular")),
    *((3, "circular", {"kernel_size": k}) for k in (1, 5)),
    (3, "circular", {"padding_mode": "zeros"}),
    (3, "zeros", {"padding_mode": "circular"}),
]


@pytest.mark.parametrize("kernel, mode, change", CHANGED_SLL)
@pytest.mark.parametrize("side", [1, 3, 5])
def test_an_sll_block_whose_attributes_were_changed_is_right_or_an_error(kernel, mode, change, side):
    torch.manual_seed(0)
    block = lip.SLL(2, 3, kernel, mode).eval()
    nn.init.normal_(block.parametrizations.weight.original)
    for name, value in change.items():
        setattr(block, name, value)
    try:
        bound = lip.lipschitz_bound(block, (2, side, side)).value
    except ValueError:
        return
    x = torch.randn(1, 2, side, side)
    jacobian = torch.autograd.functional.jacobian(block, x).reshape(-1, x.numel())
    assert torch.linalg.matrix_norm(jacobian, 2) <= bound * (1 + 1e-5)


def repeated_centering() -> nn.Module:
    layer = lip.BatchCentering(1)
    layer.running_mean = torch.zeros(9)
    return layer


def repeated_householder() -> nn.Module:
    layer = lip.Householder(2)
    layer.theta = nn.Parameter(torch.zeros(9))
    return layer


@pytest.mark.parametrize("make, channels", [(repeated_centering, 1), (repeated_householder, 2)])
def test_a_brick_with_weights_of_another_shape_repeats_no_values(make, channels):
    with pytest.raises(ValueError, match="does not take an input"):
        lip.lipschitz_bound(make().eval(), (channels, 1))

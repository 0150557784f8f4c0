"""What a constraint adds to a training step, in operations: on a GPU each is a kernel, and a number read back waits."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lipguide.layers import orthogonal as orthogonal_layer
from lipguide.layers.affine import aol, frobenius, orthogonal, spectral, unit_rows
from lipguide.layers.sll import SLL, SLLLinear

# Operations that only look at memory in another way start no kernel.
VIEWS = {
    "_conj", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "permute",
    "select", "slice", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as_complex", "view_as_real",
}  # fmt: skip
READS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::equal",
)


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def convolution() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1)


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = convolution(), convolution()

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


def step(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def kernels(layer: nn.Module, shape: tuple[int, ...]) -> int:
    x = torch.randn(2, *shape, requires_grad=True)
    step(layer, x)  # what is made once only does not count
    with Kernels() as counted:
        step(layer, x)
    return counted.seen.total()


PICTURE, VECTOR = (8, 6, 6), (8,)
# Constrained layer, the plain one that it stands beside, and the most operations that it may add.
COSTS = {
    "spectral": (lambda: spectral(convolution()), convolution, PICTURE, 56),
    "spectral dense": (lambda: spectral(nn.Linear(8, 8)), lambda: nn.Linear(8, 8), VECTOR, 52),
    "orthogonal": (lambda: orthogonal(convolution()), convolution, PICTURE, 124),
    "aol": (lambda: aol(convolution()), convolution, PICTURE, 64),
    "frobenius": (lambda: frobenius(convolution()), convolution, PICTURE, 32),
    "unit_rows": (lambda: unit_rows(convolution()), convolution, PICTURE, 30),
    "sll": (lambda: SLL(8, 8, 3), TwoConvolutions, PICTURE, 140),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_constraint_adds_few_operations(name):
    make, plain, shape, most = COSTS[name]
    added = kernels(make().train(), shape) - kernels(plain(), shape)
    assert most - 20 <= added <= most, "if it became cheaper, lower the limit"


def test_an_orthogonal_layer_adds_few_operations_on_a_gpu(monkeypatch):
    """There the matrices of a batch are taken at once, where QR has kernels for each; the CPU stands in for it here."""
    make, plain, shape, _ = COSTS["orthogonal"]
    monkeypatch.setattr(orthogonal_layer, "BY_PRODUCTS", {"cpu"})
    added = kernels(make().train(), shape) - kernels(plain(), shape)
    assert 130 <= added <= 150


@pytest.fixture
def leave_to_round():
    """Torch may round products of float32 matrices, as many train: then constraints compute in float64."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", COSTS)
def test_a_constraint_adds_hardly_more_where_torch_may_round(name, leave_to_round):
    make, plain, shape, most = COSTS[name]
    assert kernels(make().train(), shape) - kernels(plain(), shape) <= most + 12


LAYERS = {name: (make, shape) for name, (make, _, shape, _) in COSTS.items()}
LAYERS["sll dense"] = (lambda: SLLLinear(8, 8), VECTOR)
LAYERS["orthogonal dense"] = (lambda: orthogonal(nn.Linear(8, 8)), VECTOR)


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_reads_nothing_back(name, monkeypatch):
    """No number of a tensor is asked for on the way, so no step waits for a GPU."""
    monkeypatch.setattr(orthogonal_layer, "BY_PRODUCTS", {"cpu"})
    assert not reads(name)


@pytest.mark.parametrize("name", LAYERS)
def test_nor_where_torch_may_round(name, leave_to_round):
    assert not reads(name)


def reads(name: str) -> list[str]:
    """What a training step of a layer reads back."""
    make, shape = LAYERS[name]
    layer, x = make().train(), torch.randn(2, *shape, requires_grad=True)
    step(layer, x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step(layer, x)
    return [event.key for event in seen.key_averages() if event.key in READS]


def test_what_reads_back_is_seen():
    x = torch.randn(3)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        bool(x.sum() > 0), x.unique(), torch.equal(x, x + 1)
    assert {"aten::item", "aten::_unique2", "aten::equal"} <= {event.key for event in seen.key_averages()}

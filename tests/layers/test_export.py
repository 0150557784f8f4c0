"""An exported network computes the same, consists of torch alone, and leaves its original as it was."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize

from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.activations import FullSort, GroupSort, GroupSort2, Householder, MaxMin, MaxMinDouble
from lipguide.layers.affine import frobenius, orthogonal, spectral, unit_rows
from lipguide.layers.blocks import BatchCentering, Concat, PadChannels, Patches, Residual
from lipguide.layers.constraints import Spectral
from lipguide.layers.export import equation_of, export, to_be_loaded, without_parametrizations
from lipguide.layers.pooling import (
    GlobalAvgPool2d,
    GlobalL2NormPool2d,
    InvertibleDownSampling,
    InvertibleUpSampling,
    ScaledAvgPool2d,
    ScaledL2NormPool2d,
)
from lipguide.layers.sll import SLL, SLLLinear
from tests.networks import networks, restless

BRICKS = {
    "GroupSort2": GroupSort2,
    "GroupSort": lambda: GroupSort(4),
    "MaxMin": MaxMin,
    "MaxMinDouble": MaxMinDouble,
    "FullSort": FullSort,
    "Householder": lambda: Householder(8),
    "ScaledL2NormPool2d": lambda: ScaledL2NormPool2d(2),
    "uneven ScaledL2NormPool2d": lambda: ScaledL2NormPool2d((3, 2)),
    "ScaledAvgPool2d": lambda: ScaledAvgPool2d(2),
    "GlobalL2NormPool2d": GlobalL2NormPool2d,
    "GlobalAvgPool2d": GlobalAvgPool2d,
    "InvertibleDownSampling": lambda: InvertibleDownSampling(2),
    "InvertibleUpSampling": lambda: InvertibleUpSampling(2),
    "PadChannels": lambda: PadChannels(11),
    "BatchCentering": lambda: BatchCentering(8),
    "SLL": lambda: SLL(8, 12, 3),
    "SLL, even kernel": lambda: SLL(8, 12, 4),
    "circular SLL": lambda: SLL(8, 5, 5, padding_mode="circular"),
    "Residual": lambda: Residual(spectral(nn.Conv2d(8, 8, 3, padding=1))),
    "Concat": lambda: Concat(nn.Identity(), MaxMin(), nn.Identity()),
    "Patches of pictures": lambda: Patches(orthogonal(nn.Conv2d(8, 5, 2, stride=2)), 2),
    "Patches of vectors": lambda: Patches(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), 2),
    "circular stride": lambda: spectral(nn.Conv2d(8, 4, 3, 2, 1, padding_mode="circular")),
}


def brick(name: str) -> nn.Module:
    torch.manual_seed(0)
    return restless(BRICKS[name]())


def classes(model: nn.Module) -> set[str]:
    return {kind.__module__.split(".")[0] for module in model.modules() for kind in type(module).__mro__}


@pytest.mark.parametrize("name", BRICKS)
@pytest.mark.parametrize("batch, side", [(1, 4), (3, 6)])
def test_each_brick_computes_the_same_and_is_torch_alone(name, batch, side):
    model, x = brick(name), torch.randn(batch, 8, side, side)
    exported = export(model)
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-5)
    assert classes(exported) <= {"torch", "builtins"}


@pytest.mark.parametrize(
    "name", ["GroupSort2", "GroupSort", "MaxMin", "MaxMinDouble", "FullSort", "Householder", "BatchCentering"]
)
def test_vectors_and_sequences_are_taken_as_well(name):
    model = brick(name)
    for shape in [(2, 8), (2, 8, 3)]:
        x = torch.randn(*shape)
        torch.testing.assert_close(export(model)(x), model(x), atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(networks())
def test_random_networks_compute_the_same(case):
    model, shape = case
    x = torch.randn(2, *shape)
    torch.testing.assert_close(export(model)(x), model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(without_parametrizations(model)(x), model(x), atol=1e-6, rtol=1e-6)


def everything() -> nn.Sequential:
    """One of each brick in a row, from 3×16×16 to 4 logits."""
    torch.manual_seed(0)
    return restless(
        nn.Sequential(
            *(PadChannels(8), SLL(8, 12, 3), spectral(nn.Conv2d(8, 16, 3, padding=1)), MaxMin(), ScaledL2NormPool2d(2)),
            Residual(nn.Sequential(orthogonal(nn.Conv2d(16, 16, 3, padding=1)), Householder(16))),
            *(SLL(16, 8, 3, padding_mode="circular"), BatchCentering(16), Concat(nn.Identity(), GroupSort2())),
            *(InvertibleDownSampling(2), GroupSort(4), ScaledAvgPool2d(2)),
            Patches(nn.Sequential(MaxMinDouble(), nn.Flatten(), spectral(nn.Linear(128 * 2 * 4, 24))), 2),
            *(InvertibleUpSampling(2), FullSort(), GlobalL2NormPool2d(), nn.Flatten(), SLLLinear(6, 9)),
            spectral(nn.Linear(6, 4)),
        )
    )


@pytest.mark.parametrize("remembering", [False, True])
def test_what_is_to_be_loaded_takes_the_weights_of_a_plain_copy_and_proves_nothing(remembering, monkeypatch):
    model = nn.Sequential(everything(), frobenius(nn.Linear(4, 4)), unit_rows(nn.Linear(4, 2)))
    x = torch.randn(2, 3, 16, 16)
    model[0][2].requires_grad_(False)
    plain, before = without_parametrizations(model), {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(Spectral, "_prove", lambda *_: pytest.fail("proved"))
    with parametrize.cached() if remembering else nullcontext():
        empty = to_be_loaded(model.train())
    assert not any(module.training or parametrize.is_parametrized(module) for module in empty.modules())
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in plain.parameters()]
    empty.load_state_dict(plain.state_dict())
    assert torch.equal(empty(x), plain(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_saved_export_loads_and_runs_where_lipguide_is_not_installed(tmp_path, forked):
    model, x = everything(), torch.randn(2, 3, 16, 16)
    torch.save(export(model), tmp_path / "exported.pt")
    torch.save((x, model(x).detach()), tmp_path / "pair.pt")
    program = """
import sys
sys.modules["lipguide"] = None  # any import of it fails
import torch
model = torch.load("exported.pt", weights_only=False)
x, y = torch.load("pair.pt")
torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
print(len(model))
"""
    run = forked.run(program, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "19"


def test_a_loaded_export_can_still_be_bounded(tmp_path):
    model = everything()
    torch.save(export(model), tmp_path / "exported.pt")
    loaded = torch.load(tmp_path / "exported.pt", weights_only=False)
    bound = lipschitz_bound(model, (3, 16, 16)).value
    assert 0.5 * bound < lipschitz_bound(loaded, (3, 16, 16)).value <= 1.02 * bound
    assert equation_of(loaded[3]).__name__ == "_PlainMaxMin"


def test_torch_export_takes_it_with_any_batch(tmp_path):
    model, x = everything(), torch.randn(4, 3, 16, 16)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(export(model), (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "exported.pt2")
    loaded = torch.export.load(tmp_path / "exported.pt2").module()
    torch.testing.assert_close(loaded(x[:3]), model(x[:3]), atol=1e-5, rtol=1e-5)


def test_onnx_takes_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = everything(), torch.randn(4, 3, 16, 16)
    batch = torch.export.Dim("batch", min=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own internals
        torch.onnx.export(
            export(model), (x,), tmp_path / "net.onnx", dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
        )
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x[:3]).detach(), atol=1e-5, rtol=1e-4)


def test_the_original_stays_constrained_and_trainable():
    model, x = everything(), torch.randn(2, 3, 16, 16)
    before, y = {k: v.clone() for k, v in model.state_dict().items()}, model(x).detach()
    exported = export(model.train())
    assert model.training and not any(m.training for m in exported.modules())
    assert parametrize.is_parametrized(model[2], "weight")
    model.eval()
    torch.testing.assert_close(model(x), y)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.train()(x).sum().backward()
    assert model[2].parametrizations.weight.original.grad is not None
    assert exported[2].weight.grad is None


def test_training_an_export_further_loses_the_bound():
    torch.manual_seed(0)
    model = nn.Sequential(spectral(nn.Linear(8, 32)), GroupSort2(), spectral(nn.Linear(32, 1))).eval()
    exported, x = export(model), torch.randn(64, 8)
    assert lipschitz_bound(exported, (8,)).value <= 1 + 1e-5
    optimizer = torch.optim.Adam(exported.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        (exported(x) - 5 * x[:, :1]).square().mean().backward()
        optimizer.step()
    assert lipschitz_bound(exported, (8,)).value > 1.5


def test_plain_layers_keep_their_names_and_order_in_the_state_dict():
    torch.manual_seed(0)
    model = nn.Sequential(spectral(nn.Conv2d(3, 4, 3)), GroupSort2(), orthogonal(nn.Conv2d(4, 4, 3)))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), GroupSort2(), nn.Conv2d(4, 4, 3))
    assert list(export(model).state_dict()) == list(plain.state_dict())
    plain.load_state_dict(export(model).state_dict())
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(plain(x), model.eval()(x))


def test_a_module_used_twice_stays_one():
    shared = Residual(spectral(nn.Linear(4, 4)))
    exported = export(nn.Sequential(shared, GroupSort2(), shared))
    assert exported[0] is exported[2]


def test_a_brick_by_itself_is_exported_too():
    assert type(export(MaxMin())).__name__ == "MaxMin"
    assert type(export(spectral(nn.Linear(2, 2)))) is nn.Linear


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.sort = spectral(nn.Linear(4, 4)), GroupSort2()

    def forward(self, x):
        return self.sort(self.layer(x)) - x


def test_a_module_of_ones_own_stays_and_its_contents_are_exported():
    model, x = Mine().eval(), torch.randn(2, 4)
    exported = export(model)
    assert type(exported) is Mine and type(exported.layer) is nn.Linear
    assert equation_of(exported.sort) and classes(exported.sort) <= {"torch", "builtins"}
    torch.testing.assert_close(exported(x), model(x))


class Ours(Mine):
    __module__ = "lipguide.imaginary"


class Untraceable(Mine):
    __module__ = "lipguide.imaginary"

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_composite_of_the_package_is_traced_and_what_cannot_be_is_named():
    model, x = nn.Sequential(Ours()).eval(), torch.randn(2, 4)
    exported = export(model)
    assert classes(exported) <= {"torch", "builtins"}
    torch.testing.assert_close(exported(x), model(x))
    assert lipschitz_bound(exported, (4,)).value == pytest.approx(2, rel=1e-4)
    with pytest.raises(TypeError, match="1 is a Untraceable of lipguide.imaginary"):
        export(nn.Sequential(nn.ReLU(), Untraceable()))


def test_a_changed_graph_is_no_brick_any_more():
    exported = export(GroupSort2())
    exported.graph.output_node().args = (next(iter(exported.graph.nodes)),)
    exported.recompile()
    assert equation_of(exported) is None


class Renamed(GroupSort2):
    """Another name, the same layer."""


def test_a_subclass_that_changes_nothing_is_exported_like_its_parent():
    x = torch.randn(2, 4)
    exported = export(nn.Sequential(Renamed()))
    assert lipschitz_bound(exported, (4,)).value == 1 and classes(exported) <= {"torch", "builtins"}
    torch.testing.assert_close(exported(x), GroupSort2()(x))


def test_a_class_with_the_name_of_a_brick_is_not_taken_for_it():
    namesake = type("BatchCentering", (BatchCentering,), {"forward": lambda self, x: 3 * x})
    exported = export(namesake(4).eval())
    assert equation_of(exported) is None
    assert lipschitz_bound(exported, (4,)).value == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [lambda: ScaledL2NormPool2d(2), GlobalL2NormPool2d])
def test_l2_pooling_is_exported_for_every_precision(make, dtype):
    x = 300 * torch.ones(1, 2, 2, 2, dtype=dtype)  # whose squares half precision cannot hold
    y = make()(x)
    for exported in (export(make()), export(make()).to(dtype)):
        assert exported(x).dtype == dtype
        torch.testing.assert_close(exported(x), y)


def resized_sll(kernel: int) -> nn.Module:
    block = export(SLL(4, 4, 3, padding_mode="circular"))
    block.weight = nn.Parameter(torch.randn(4, 4, kernel, kernel) / 10)
    return block


def with_buffer(brick: nn.Module, name: str, *shape: int) -> nn.Module:
    graph = export(brick.eval())
    setattr(graph, name, torch.rand(shape))
    return graph


@pytest.mark.parametrize(
    "graph, shape",
    [
        (with_buffer(BatchCentering(1), "shift", 3), (1, 2, 2)),
        (with_buffer(BatchCentering(1), "shift", 9, 1), (1, 2, 1)),
        (with_buffer(Householder(2), "v", 9, 2), (2, 1, 1)),
        (with_buffer(Householder(2), "v", 2, 2), (2, 2, 2)),
        (with_buffer(Householder(2), "v", 1), (2, 2, 2)),
        (export(MaxMin()), (3,)),
        (export(Householder(4)), (1,)),
        (export(BatchCentering(4).eval()), (1,)),
        (export(GroupSort(3)), (4,)),
        (export(SLL(4, 4, 3)), (1, 6, 6)),
        (resized_sll(2), (4, 1, 1)),
    ],
)
def test_a_graph_that_would_repeat_values_fails_instead(graph, shape):
    with pytest.raises(ValueError):
        lipschitz_bound(graph, shape)


@pytest.mark.parametrize("name", ["SLL", "SLL, even kernel", "circular SLL", "Householder"])
def test_the_weights_of_an_exported_brick_count_as_they_are_now(name):
    graph, shape = export(brick(name)), (8, 4, 4)
    assert lipschitz_bound(graph, shape).value == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        for tensor in (*graph.parameters(), *graph.buffers()):
            tensor.mul_(1.5).add_(torch.randn_like(tensor) / 5)
    bound, graph = lipschitz_bound(graph, shape).value, graph.double()
    jacobian = torch.autograd.functional.jacobian(graph, torch.randn(1, *shape, dtype=torch.float64))
    assert 1 < torch.linalg.matrix_norm(jacobian.reshape(128, 128), 2) <= bound

"""The base of all constraints: no precision, default, magnitude or transform around it changes what it promises."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lipguide.layers.affine import clip, constrain_, geometry, l2_normalized, orthogonal, spectral, unit_rows
from lipguide.layers.constraints import Constraint, _working_dtype
from lipguide.layers.norms import conv_norm
from lipguide.layers.sll import SLL, SLLLinear
from tests.networks import SOUND
from tests.oracles import singular_values

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
ALL = [*SOUND, unit_rows, l2_normalized, partial(clip, limit=0.1)]
LAYERS = {
    "dense": (lambda: nn.Linear(24, 16), (24,)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (8, 6, 6)),
    "strided": (lambda: nn.Conv2d(6, 8, 4, stride=2, padding=1, padding_mode="circular"), (6, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), (8, 4, 4)),
}
BLOCKS = {"sll": lambda: SLL(8, 8, 3), "sll dense": lambda: SLLLinear(16, 16)}


def rounded(x):
    """float32 as TF32 keeps it: ten bits of the mantissa, to the nearest."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TensorFloat32(TorchDispatchMode):
    """What a GPU does to products where torch's switches give leave, on the CPU and its switches."""

    MATRICES = ("mm", "bmm", "addmm", "baddbmm")
    CONVOLUTIONS = ("convolution", "_convolution")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, switches = func.overloadpacket.__name__, torch.backends.mkldnn
        in_matrices = name in self.MATRICES and switches.matmul.fp32_precision == "tf32"
        in_convolutions = name in self.CONVOLUTIONS and switches.conv.fp32_precision == "tf32"
        if in_matrices or in_convolutions:
            args = tree_map(rounded, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["matmul", "conv", "both", "all backends"])
def tensor_float_32(request):
    backends = {
        "matmul": [torch.backends.mkldnn.matmul],
        "conv": [torch.backends.mkldnn.conv],
        "both": [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv],
        "all backends": [torch.backends],
    }[request.param]
    for backend in backends:
        backend.fp32_precision = "tf32"
    with TensorFloat32():
        yield
    for backend in backends:
        backend.fp32_precision = "none"


def sizes(layer: nn.Module, shape: tuple[int, ...]) -> tuple[float, float]:
    values = singular_values(layer, shape)
    return values[0].item(), values[-1].item()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fn", SOUND)
def test_products_that_are_rounded_to_ten_bits_leave_the_constraint_whole(fn, kind, tensor_float_32):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = fn(make()).eval()
    with torch.no_grad():
        weight = layer.weight.clone()
    with torch.utils._python_dispatch._disable_current_modes():
        largest, smallest = sizes(with_weight(layer, weight), shape)
    assert largest <= 1 + 2e-6
    if fn is orthogonal and kind != "transposed":
        assert smallest >= 1 - 1e-5


def with_weight(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    twin = copy.deepcopy(layer)
    parametrize.remove_parametrizations(twin, "weight")
    twin.weight.data = weight
    return twin


@pytest.mark.parametrize("kind", BLOCKS)
def test_products_that_are_rounded_leave_the_scale_of_sll_alone(kind, tensor_float_32):
    torch.manual_seed(0)
    block = BLOCKS[kind]().eval()
    block.parametrizations.weight.original.data.normal_()
    with torch.no_grad():
        found = block.weight.clone()
    with torch.utils._python_dispatch._disable_current_modes():
        exact = block.parametrizations.weight[0].double()(block.parametrizations.weight.original.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_on_a_gpu_the_switches_of_a_gpu_count():
    """Those of matrix products; convolutions, which torch rounds there by default, have no say."""
    weight = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert _working_dtype(weight) == torch.float32
    try:
        torch.set_float32_matmul_precision("high")
        assert _working_dtype(weight) == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("fn", ALL)
@pytest.mark.parametrize("kind", LAYERS)
def test_no_constraint_convolves(fn, kind):
    """Its products would be rounded on a GPU, where convolutions are by default."""

    class Seen(TorchDispatchMode):
        convolved = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.convolved |= "convolution" in func.overloadpacket.__name__
            return func(*args, **(kwargs or {}))

    layer = fn(LAYERS[kind][0]())
    for mode in (layer.train(), layer.eval()):
        with Seen() as seen:
            mode.weight.sum().backward()
        assert not seen.convolved


def test_every_constraint_has_the_one_base():
    for fn in ALL:
        for make, _ in LAYERS.values():
            assert isinstance(fn(make()).parametrizations.weight[0], Constraint)
    for make in BLOCKS.values():
        assert isinstance(make().parametrizations.weight[0], Constraint)


@pytest.mark.parametrize("fn", ALL)
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_changes_no_bit(fn, kind):
    torch.manual_seed(0)
    layer = fn(LAYERS[kind][0]()).eval()
    outside = layer.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, outside)


def of_weight(layer: nn.Module, factor: torch.Tensor | float) -> nn.Module:
    layer.weight.data = layer.weight.data * factor
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fn", [*SOUND, unit_rows, l2_normalized])
def test_weights_of_any_magnitude_obey_the_constraint(fn, kind, dtype):
    """Random ones, and one large entry among equal ones; what half precision rounds afterwards is its own affair."""
    make, shape = LAYERS[kind]
    for seed in range(2):
        torch.manual_seed(seed)
        base = make().to(dtype)
        if seed:
            base.weight.data.fill_(1).view(-1)[0] = 4
        info, slack = torch.finfo(dtype), 1e-5 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
        extremes = [1e3 * info.tiny, info.tiny**0.5, 1e-3 * info.max**0.5, 10 * info.max**0.5, info.max / 16]
        for factor in extremes:
            layer = copy.deepcopy(base)
            layer.weight.data.mul_(factor / layer.weight.abs().max().double().item())
            layer = fn(layer).eval()
            for mode in (layer.eval(), layer.train()):
                weight = mode.weight.detach().double()
                assert bool(weight.isfinite().all())
                if fn is l2_normalized:
                    assert weight.norm().item() == pytest.approx(1, abs=4 * slack)
                elif fn is unit_rows:
                    rows = (weight.transpose(0, 1) if kind == "transposed" else weight).flatten(1).norm(dim=1)
                    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=4 * slack)
                elif not mode.training:
                    largest = sizes(with_weight(mode, mode.weight.detach()), shape)[0]
                    assert 0.05 < largest <= 1 + slack * (1 if dtype.itemsize > 2 else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fn", [*SOUND, unit_rows, l2_normalized])
def test_weights_below_the_smallest_normal_number_stay_numbers_and_small(fn, kind, dtype):
    make, shape = LAYERS[kind]
    info = torch.finfo(dtype)
    for factor in (info.tiny / 4, info.tiny * info.eps):  # the second is the smallest number there is
        layer = make().to(dtype)
        layer.weight.data = layer.weight.data.sign() * factor
        layer = fn(layer)
        for mode in (layer.train(), layer.eval()):
            weight = mode.weight.detach().double()
            assert bool(weight.isfinite().all())
        if fn in SOUND:
            largest = sizes(with_weight(layer, layer.weight.detach()), shape)[0]
            assert largest <= 1 + (1e-5 if dtype.itemsize > 2 else 6 * info.eps)


@pytest.mark.parametrize("fn", [*SOUND, unit_rows, l2_normalized])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_size_of_the_weight_does_not_matter(fn, kind):
    """All but clipping give the same for W and for a multiple of it, and a gradient that shrinks alike."""
    torch.manual_seed(0)
    layer = fn(LAYERS[kind][0]().double())
    constraint = layer.parametrizations.weight[0].train()
    raw = [getattr(layer.parametrizations.weight, name).detach() for name in names_of(layer)]
    weights, gradients = [], []
    for factor in (1.0, 1e-12, 1e12):
        parts = [(factor * part).requires_grad_() for part in raw]
        weight = copy.deepcopy(constraint)(*parts)
        weights.append(weight.detach())
        weight.square().mul(torch.arange(weight.numel()).view_as(weight)).sum().backward()
        gradients.append([factor * part.grad for part in parts])
    for i in (1, 2):
        torch.testing.assert_close(weights[i], weights[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[i], gradients[0], rtol=1e-6, atol=1e-9)


def names_of(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.parametrizations.weight.named_parameters(recurse=False)]


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(fn, kind):
    """A layer of float32 whatever the default is, with the same weights."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().float()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    torch.manual_seed(2)
    return fn(layer)


@pytest.mark.parametrize("fn", ALL)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_default_dtype_changes_no_bit(fn, kind):
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            layer = made(fn, kind)
            x = torch.randn(2, *LAYERS[kind][1], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            trained = layer.train()(x).detach()
            results.append((trained, layer.eval()(x).detach(), layer.state_dict()))
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("fn", ALL)
def test_a_complex_layer_is_refused(fn):
    for layer in (nn.Linear(3, 3, dtype=torch.complex64), nn.Conv2d(2, 2, 3, dtype=torch.complex128)):
        with pytest.raises(ValueError, match="complex weight cannot be constrained"):
            fn(layer)
        with pytest.raises(ValueError, match="complex weight cannot be constrained"):
            constrain_(nn.Sequential(layer), fn)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Tripled(nn.ConvTranspose2d):
    def forward(self, x, output_size=None):
        return 3 * super().forward(x, output_size)


class Inside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(10 * x)


class Renamed(nn.Linear):
    """Another name and another start: the forward is torch's."""

    def reset_parameters(self):
        nn.init.ones_(self.weight)


@pytest.mark.parametrize("fn", ALL)
def test_a_subclass_with_another_forward_is_refused(fn):
    for layer in (Doubled(2, 2, 3), Tripled(2, 2, 3), Inside(2, 2, 3), Shifted(3, 3)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} cannot be constrained: it changes"):
            fn(layer)
        with pytest.raises(ValueError, match="it changes"):
            constrain_(nn.Sequential(layer), fn)
    renamed = fn(Renamed(4, 3, bias=False))
    assert renamed(torch.zeros(1, 4)).shape == (1, 3)


@pytest.mark.parametrize("fn", ALL)
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_functional_and_vectorised_calls_agree(fn, kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = fn(make()).eval()
    x = torch.randn(3, *shape)
    expected = layer(x)
    torch._dynamo.reset()
    whole = fn is not spectral  # whose proof is not compiled
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=whole)(x), expected)

    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def energy(given, one):
        return torch.func.functional_call(layer, given, (one[None],)).square().sum()

    gradients = torch.func.grad(energy)(parameters, x[0])
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    if fn is not spectral:  # whose proof is a number
        layer, x = layer.double(), x.double()
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        gradients = torch.func.grad(energy)(parameters, x[0])
        each = torch.func.vmap(torch.func.grad(energy), in_dims=(None, 0))(parameters, x)
        for name, gradient in gradients.items():
            torch.testing.assert_close(each[name][0], gradient, rtol=1e-7, atol=1e-9)


@SETTINGS
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["zeros", "circular"]), st.integers(0, 99)
)
def test_no_output_of_unit_rows_stretches_by_more_than_1(kernel, side, dilation, mode, seed):
    """Rows of the true Jacobian, on maps that may be smaller than the kernel: 1 at most, or the layer refuses them."""
    torch.manual_seed(seed)
    layer = unit_rows(nn.Conv2d(2, 3, kernel, padding="same", dilation=dilation, padding_mode=mode))
    try:
        layer(torch.zeros(1, 2, side, side))
    except RuntimeError:  # torch pads a circle once around at most
        return
    except ValueError as error:
        assert mode == "circular" and "taps" in str(error)
        return
    basis = torch.eye(2 * side * side).reshape(-1, 2, side, side)
    with torch.no_grad():
        matrix = (layer(basis) - layer(torch.zeros(1, 2, side, side))).flatten(1)
    assert matrix.norm(dim=0).max() <= 1 + 1e-5


def test_the_emulation_rounds_to_ten_bits():
    assert rounded(torch.tensor([1 + 2.0**-11])).item() in (1.0, 1 + 2.0**-10)
    assert rounded(torch.tensor([math.pi])).item() == pytest.approx(math.pi, rel=2**-11)


def changed(layer: nn.Module, how: str) -> nn.Module:
    raw = layer.parametrizations.weight.original
    bigger = 3 * raw.detach() + 1
    if how == "assignment":
        layer.weight = bigger
    elif how == "load and assign":
        layer.load_state_dict({**layer.state_dict(), "parametrizations.weight.original": bigger}, assign=True)
    elif how == "pruned in place":
        raw.data[raw.abs() < raw.abs().median()] = 0
    elif how == "one entry":
        raw.data.view(-1)[0] += 3
    elif how == "averaged":
        average = torch.optim.swa_utils.AveragedModel(layer)
        raw.data.copy_(bigger)
        average.update_parameters(layer)
        average.update_parameters(layer)
        return average.module.eval()
    elif how == "float64":
        return layer.double()
    elif how == "half and back":
        return layer.half().float()
    elif how == "inference mode":
        with torch.inference_mode():
            layer(torch.randn(1, 2, 6, 6))
        raw.data.copy_(bigger)
    elif how == "trained without gradients":
        raw.data.copy_(bigger)
        with torch.no_grad():
            layer.train()(torch.randn(1, 2, 6, 6))
        layer.eval()
    return layer


@pytest.mark.parametrize("how", [
    "assignment", "load and assign", "pruned in place", "one entry", "averaged", "float64",
    "half and back", "inference mode", "trained without gradients",
])  # fmt: skip
def test_proof_follows_the_weight(how):
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")).eval()
    layer(torch.randn(1, 2, 6, 6))
    layer = changed(layer, how)
    for twin in (layer, copy.deepcopy(layer)):
        twin(torch.randn(1, 2, 6, 6, dtype=twin.weight.dtype))
        assert singular_values(twin, (2, 12, 12))[0] <= 1 + 1e-5 and conv_norm(twin.weight) >= 0.995
    layer.train()(torch.randn(1, 2, 6, 6, dtype=layer.weight.dtype)).sum().backward()


def test_proof_follows_the_geometry():
    """Blurs of stride 1 have twice the norm that they have at stride 2."""
    layer = spectral(nn.Conv2d(1, 1, 2, stride=2)).eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(1.0)
    weight = layer.weight
    assert conv_norm(weight, (2, 2)) > 0.99 and layer.parametrizations.weight[0].vouches_for(weight)
    layer.stride = (1, 1)
    layer.parametrizations.weight[0].geometry = geometry(layer)
    assert not layer.parametrizations.weight[0].vouches_for(weight)
    assert conv_norm(layer.weight) <= 1 + 1e-6


def test_compiled_and_functional_calls_see_the_new_weight():
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(2, 2, 3, padding=1)).eval()
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(1, 2, 8, 8)
    compiled(x)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(5).add_(1)
    torch.testing.assert_close(compiled(x), layer(x))
    other = {name: 2 * p.detach() + 1 for name, p in layer.named_parameters()}

    def energy(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(energy)(other)
    assert all(bool(torch.isfinite(g).all()) for g in gradients.values())
    torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))  # nothing of the transform stays behind
    assert singular_values(layer, (2, 8, 8))[0] <= 1 + 1e-5


def test_a_layer_in_eval_mode_is_proved_from_the_start_and_stays_so_when_made_plain():
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(1, 1, 11, padding=5).eval())
    assert singular_values(layer, (1, 12, 12))[0] <= 1 + 1e-5
    parametrize.remove_parametrizations(layer, "weight")
    assert singular_values(layer, (1, 12, 12))[0] <= 1 + 1e-5


def test_a_compiled_layer_asks_again_when_products_begin_to_round():
    torch.manual_seed(0)
    layer = orthogonal(nn.Conv2d(4, 4, 3))
    seen = []

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "bmm"):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    torch._dynamo.reset()
    compiled = torch.compile(lambda raw: layer.parametrizations.weight[0](*raw), backend="eager")
    raw = [part.detach() for part in layer.parametrizations.weight.parameters(recurse=False)]
    for precision, dtype in (("highest", torch.float32), ("high", torch.float64), ("highest", torch.float32)):
        torch.set_float32_matmul_precision(precision)
        try:
            compiled(raw)
            with Precisions():
                compiled(raw)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert set(seen) == {dtype}
        seen.clear()

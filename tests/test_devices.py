"""What a GPU may not change: the same tests on the CPU, which always run, and on CUDA where there is a device.

The first thing to run on a machine with a GPU: `python -m pytest tests/test_devices.py`. Without one the last test runs
most others in a process with a GPU that is not there.
"""

import copy
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lipguide.bounds.network import lipschitz_bound
from lipguide.layers import activations, together
from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import aol, frobenius, orthogonal, spectral, unit_rows
from lipguide.layers.export import export
from lipguide.layers.norms import conv_norm, matrix_norm
from lipguide.layers.orthogonal import orthonormal, orthonormal_by_products
from lipguide.layers.sll import SLL, SLLLinear
from lipguide.precision import full_precision
from lipguide.robustness.attacks import pgd_l2
from lipguide.robustness.certificates import holds_within, local_radius
from lipguide.tasks.detection.boxes import Targets, check_targets, pad_targets
from lipguide.tasks.detection.certificates import answers, certify, hunt
from lipguide.tasks.detection.configurations import l2_normalised, naive, spectral_norm, standard_conv
from lipguide.tasks.detection.fcos import Brightless
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.scores import detections, on_cpu, score
from lipguide.tasks.detection.sure import rates, surely_found
from lipguide.tasks.detection.unlearnt import unlearnt
from lipguide.tasks.harness import recipe_of
from lipguide.tasks.task import Data, Recipe
from lipguide.training import Supervised, adam, fit
from tests.layers.test_cost import READS, Kernels
from tests.tasks.detection.certificates.test_hunt import Toy as Prey
from tests.tasks.detection.certificates.test_hunt import scenes as prey

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> Iterator[str]:
    """With leave to round products of float32 matrices to TF32, which is what people train with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    yield request.param
    torch.set_float32_matmul_precision(before)


@contextmanager
def nothing_read_back(device: str) -> Iterator[None]:
    """An error where the host asks the device for a number, and so waits for it."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    reads = [event.key for event in seen.key_averages() if event.key in READS]
    assert not reads, reads


def convolution() -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3, padding=1)


LAYERS = {
    "spectral": lambda: spectral(convolution()),
    "spectral dense": lambda: spectral(nn.Linear(9, 7)),
    "orthogonal": lambda: orthogonal(convolution()),
    "orthogonal dense": lambda: orthogonal(nn.Linear(9, 7)),
    "aol": lambda: aol(convolution()),
    "frobenius": lambda: frobenius(convolution()),
    "unit_rows": lambda: unit_rows(convolution()),
    "SLL": lambda: SLL(6, 8, 3),
    "SLL dense": lambda: SLLLinear(7, 9),
}


def moved(layer: nn.Module) -> nn.Module:
    """With free parameters that training might have: at first some are zero, where the gradient of |x| is a matter of
    rounding."""
    with torch.no_grad():
        for part in layer.parametrizations.weight.parameters():
            part.add_(torch.randn_like(part))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_constrained_weight_and_its_gradient_are_those_of_float64(name, device):
    layer = moved(LAYERS[name]()).train()
    direction = torch.randn(layer.weight.shape)
    exact, layer = copy.deepcopy(layer).double(), layer.to(device)
    gradients = []
    for one in (exact, layer):
        weight = one.weight  # once, for each time is a step of the power iteration
        (weight * direction.to(weight)).sum().backward()
        free = one.parametrizations.weight
        gradients.append([part.grad.double().cpu() for part in free.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().amax()) + 1e-6)
    fresh = (copy.deepcopy(one).eval().weight.double().cpu() for one in (exact, layer))
    assert torch.allclose(*fresh, atol=1e-4), "SLL leaves room for the rounding of float32, 3e-5"


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "unit_rows"])
def test_the_norm_in_eval_mode_is_at_most_one_by_a_proof_in_float64(name, device):
    layer = moved(LAYERS[name]()).to(device)
    weight = layer.eval().weight.detach().double().cpu()
    norm = matrix_norm(weight) if weight.dim() == 2 else conv_norm(weight)
    assert norm <= 1.004, "the proof of a convolution is within 0.3 % of its norm"


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 16, 8), (1, 64, 64)])
def test_the_factor_by_products_is_the_one_of_qr(shape, device):
    raw = torch.randn(shape, device=device)
    theirs, ours = orthonormal(raw.double().cpu()), orthonormal_by_products(raw).cpu().double()
    assert torch.allclose(theirs, ours, atol=1e-5)


def scenes(number: int, device: str) -> tuple[torch.Tensor, ...]:
    images = torch.rand(number, 3, 74, 74, device=device)
    boxes = [torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.5, 0.2, 0.8, 0.9]]) for _ in range(number)]
    targets = pad_targets(boxes, [torch.tensor([3, 7]) for _ in range(number)])
    return images, *(part.to(device) for part in targets)


DETECTORS = {
    "naive": naive,
    "spectral-norm": spectral_norm,
    "standard conv": partial(standard_conv, 16),
    "L2-normalised": partial(l2_normalised, 16),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_training_step_of_a_detector_never_waits(name, device):
    images, *targets = scenes(2, device)
    model = DETECTORS[name]().to(device, memory_format=torch.channels_last).train()
    step = DetectionStep(model.training_loss().to(device), check_targets(Targets(*targets)))
    optimizer = adam(model, 1e-3)

    def loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return step(model, (images, *targets))

    loss().backward()  # what is made once only may wait
    with nothing_read_back(device):
        again = loss()
        again.backward()
        if device == "cuda":  # on the CPU Adam reads its count of steps
            optimizer.step()
    assert again.isfinite()


# Operators of a step without that of the optimizer, as a GPU calls them; each starts a kernel or a few.
OPERATORS = {"naive": 350, "spectral-norm": 510, "standard conv": 550, "L2-normalised": 635}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_training_step_of_a_detector_calls_few_operators(name, monkeypatch):
    monkeypatch.setattr(together, "EXTENDS", {"cpu"})
    monkeypatch.setattr(activations, "BRANCHES", set())
    images, *targets = scenes(2, "cpu")
    model = DETECTORS[name]().to(memory_format=torch.channels_last).train()
    step = DetectionStep(model.training_loss(), check_targets(Targets(*targets)))
    with torch.autocast("cpu", torch.bfloat16):
        step(model, (images, *targets)).backward()
        model.zero_grad()
        with Kernels() as counted:
            step(model, (images, *targets)).backward()
    most = OPERATORS[name]
    assert 0.9 * most <= counted.seen.total() <= most, "if they became fewer, lower the limit"


# One recipe of each kind of network and loss, and how often its step may wait.
STEPS = {
    "classification-vgg": 0,
    "classification-resnet": 0,
    "classification-sll": 0,
    "segmentation-unet": 0,
    "detection-fcos": 0,
    "detection-ordinary-fcos": 0,
    "detection-reader": 0,
    "classification-residual": 0,
    "classification-local": 0,
    "tinier-ssd-naive": 0,
    "tinier-ssd-spectral-norm": 0,
    "tinier-ssd-l2-normalised": 0,
}


def batch_for(name: str, recipe: Recipe) -> tuple[torch.Tensor, ...]:
    if name.startswith(("detection", "tinier")):
        images, *targets = scenes(2, "cpu")
        return (255 * images).byte(), *targets
    if name.startswith("segmentation"):
        return torch.rand(2, 3, recipe.pixels, recipe.pixels), torch.randint(2, (2, recipe.pixels, recipe.pixels))
    return torch.rand(2, 3, 32, 32), torch.randint(10, (2,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on the CPU losses look at the labels in each step")
@pytest.mark.parametrize("name", [name for name in STEPS if not name.startswith("tinier-ssd")])
def test_a_training_step_of_a_recipe_hardly_waits(name):
    """Those of the case study are asked above, with half precision and an optimizer."""
    task, recipe = recipe_of(name)
    columns = batch_for(name, recipe)
    model = task.network(recipe).to("cuda").train()
    step = task.step(model, recipe, Data("two samples", columns, "")).to("cuda")
    batch = tuple(column.to("cuda") for column in columns)
    step(model, batch).backward()  # what is made once only may wait
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, batch).backward()
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchronizing" in str(one.message)]
    assert len(waits) <= STEPS[name], waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records a step")
@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_training_is_that_of_steps_one_by_one(name):
    """Weights and reports, up to what a GPU adds up in another order; the batches, shifts and rates differ by step."""
    task, recipe = recipe_of(name)
    columns = tuple(torch.cat([column] * 4) for column in batch_for(name, recipe))
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = task.network(recipe).to("cuda")
        step = task.step(model, recipe, Data("eight samples", columns, ""))
        assert step.steady
        history = fit(model, columns, step, adam(model, 1e-3), 10, 4, "one-cycle", log_every=2, recorded=recorded)
        ends.append([record["loss"] for record in history] + [record["gradient_norm"] for record in history])
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records a step")
def test_a_recorded_step_that_is_not_finite_is_named_and_leaves_the_weights():
    model, (x, y) = classifier().to("cuda"), pictures()
    x[5] = torch.inf
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is nan; first not finite is layer"):
        fit(model, (x, y), Supervised(nn.CrossEntropyLoss()), adam(model, 1e-2), 20, 8, log_every=10, recorded=True)
    assert all(part.isfinite().all() for part in model.parameters())


def classifier() -> nn.Sequential:
    return nn.Sequential(
        orthogonal(nn.Conv2d(3, 8, 3, padding=1)), GroupSort2(), SLL(8, 8, 3), nn.Flatten(), spectral(nn.Linear(288, 4))
    )


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(64, 3, 6, 6)
    return x, 2 * (x[:, 0].mean((1, 2)) > 0.5).long() + (x[:, 1].mean((1, 2)) > 0.5).long()


def test_a_network_learns_is_bounded_and_exported(device):
    model, (x, y) = classifier().to(device), pictures()
    loss = Supervised(nn.CrossEntropyLoss(label_smoothing=0.1))
    history = fit(model, (x, y), loss, adam(model, 1e-2), 30, 32, log_every=10)
    assert history[-1]["loss"] < history[0]["loss"]
    assert lipschitz_bound(model.eval(), (3, 6, 6)).value <= 1.0001
    file = io.BytesIO()
    torch.save(export(model).cpu(), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with full_precision():
        assert torch.allclose(again(x), model(x.to(device)).detach().cpu(), atol=1e-5)


def test_a_step_that_is_not_finite_is_named_and_leaves_the_weights(device):
    model, (x, y) = classifier().to(device), pictures()
    x[5] = torch.inf
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is nan; first not finite is layer"):
        fit(model, (x, y), Supervised(nn.CrossEntropyLoss()), adam(model, 1e-2), 20, 8, log_every=10)
    assert all(part.isfinite().all() for part in model.parameters())


def test_an_attack_stays_in_its_ball(device):
    model, (x, y) = classifier().to(device).eval(), pictures()
    moved = pgd_l2(model, x.to(device), y.to(device), 0.3, steps=5).cpu()
    assert (moved - x).double().flatten(1).norm(dim=1).amax() <= 0.3
    assert moved.amin() >= 0 and moved.amax() <= 1 and not torch.equal(moved, x)


def test_detections_scores_and_certificates_are_those_of_the_cpu(device):
    model, (images, boxes, labels) = Detector((8, 8, 8), 16).eval(), scenes(3, "cpu")
    targets = pad_targets(list(boxes), list(labels))
    there = tuple(part.to(device) for part in targets)
    results = []
    for one, x, truth in ((model, images, targets), (copy.deepcopy(model).to(device), images.to(device), there)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            given = answers(one, x)
            found = on_cpu(detections(one, x, min_score=0.0))
        certificate = certify(given, Targets(*truth), 0.1, -10.0)
        results.append((given.scores.cpu(), score(found, targets).recall, certificate.heights.cpu().double()))
    (scores, recall, heights), (their_scores, their_recall, their_heights) = results
    assert torch.allclose(scores, their_scores, atol=1e-4)
    assert recall == their_recall and torch.allclose(heights, their_heights, atol=1e-3)


def test_a_certificate_is_hunted_where_the_model_is(device):
    model = Prey().eval()
    images, targets = prey(model, 30)
    model.to(device)
    images, targets = images.to(device), Targets(*(part.to(device) for part in targets))
    certificate = certify(answers(model, images), targets, 0.02)
    found = hunt(model, images, targets, certificate, steps=2)
    assert found.hunted > 0 and sum(found.fallen.values()) == found.overrun == 0


def test_what_float64_proves_of_the_last_block_is_that_of_the_cpu(device):
    torch.manual_seed(0)
    block, x = SLLLinear(16, 16), pictures()[0]
    nn.utils.parametrize.remove_parametrizations(block, "weight")
    block.weight.data, block.bias.data = 0.8 * block.weight.data, 0.2 * torch.randn(16)
    below, head = orthogonal(nn.Linear(108, 16)), unit_rows(nn.Linear(16, 4))
    model = nn.Sequential(nn.Flatten(), below, block, head).eval()
    moved = copy.deepcopy(model).to(device)
    near = local_radius(model, x)
    torch.testing.assert_close(local_radius(moved, x.to(device)).cpu(), near)
    eps = 1.01 * float(near.median())
    held = holds_within(moved, x.to(device), eps).cpu()
    assert torch.equal(held, holds_within(model, x, eps)) and held.sum() > (near > eps).sum()


def test_what_is_surely_found_is_that_of_the_cpu(device):
    model, (images, *targets) = unlearnt("together", width=4).eval(), scenes(1, "cpu")
    there = Targets(*(part.to(device) for part in targets))
    model(images)
    moved = copy.deepcopy(model).to(device)
    moved(images.to(device))  # proved on each side once: copies take the proofs along
    ours, theirs = rates(moved), rates(model)
    assert torch.allclose(ours.gaps, theirs.gaps) and torch.allclose(ours.offsets, theirs.offsets)
    shares = surely_found(model, theirs, images, Targets(*targets), 0.0)
    assert surely_found(moved, ours, images.to(device), there, 0.0) == shares


def test_a_certificate_is_of_float32_whatever_torch_may_round(device, monkeypatch):
    model = Detector((8, 8, 8), 16).eval().to(device)
    before = torch.backends.cudnn.conv.fp32_precision
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    seen = []

    def forward(self, x):
        switches = [backend.fp32_precision for backend in backends]
        seen.append([*switches, torch.is_autocast_enabled(x.device.type)])
        return x

    monkeypatch.setattr(Brightless, "forward", forward)  # no part of another class has known constants
    with torch.autocast(device, torch.bfloat16):
        answers(model, scenes(1, device)[0])
    assert seen and all(switches == ["ieee", "ieee", "ieee", False] for switches in seen)
    assert torch.backends.cudnn.conv.fp32_precision == before == "tf32"


ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests above have run on a GPU")
def test_most_of_this_on_a_gpu_that_is_not_there():
    """In a process of its own, for half a minute: what it finds would else be found by who first has a GPU. It records
    no steps; `test_recorded` does."""
    command = [
        sys.executable,
        "-m",
        "tests.pretended",
        "pytest",
        __file__,
        "-k",
        "(recipe or cuda and not float64) and not recorded",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout

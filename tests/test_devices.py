"""What a GPU may not change: the same tests on the CPU, which always run, and on CUDA where there is a device.

The first thing to run on a machine with a GPU: `python -m pytest tests/test_devices.py`.
"""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lipguide.bounds.network import lipschitz_bound
from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import aol, frobenius, orthogonal, spectral, unit_rows
from lipguide.layers.export import export
from lipguide.layers.norms import conv_norm, matrix_norm
from lipguide.layers.orthogonal import orthonormal, orthonormal_by_products
from lipguide.layers.sll import SLL, SLLLinear
from lipguide.robustness.attacks import pgd_l2
from lipguide.tasks.detection.boxes import Targets, check_targets, pad_targets
from lipguide.tasks.detection.certificates import answers, certify
from lipguide.tasks.detection.configurations import l2_normalised, naive, spectral_norm, standard_conv
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.scores import detections, on_cpu, score
from lipguide.training import Supervised, adam, fit
from tests.layers.test_cost import READS

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
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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

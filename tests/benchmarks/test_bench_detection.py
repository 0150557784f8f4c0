"""Detection: training steps of the study's detectors and of the certified one, and what a certificate costs."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, box_iou

from lipguide.book.cost import compare
from lipguide.tasks import trained
from lipguide.tasks.detection.boxes import Targets, check_targets, encode, pad_targets, unit_range
from lipguide.tasks.detection.certificates import answers, certify
from lipguide.tasks.detection.configurations import l2_normalised, naive, spectral_norm, standard_conv
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.reader import detector
from lipguide.tasks.detection.reader_step import ReaderStep
from lipguide.training import adam
from tests.benchmarks.candidates import recorded
from tests.benchmarks.conftest import DEVICE
from tests.benchmarks.test_bench_layers import rows

BATCH = 64
# Of the study's plan "full" and of the reader's recipe for a GPU, and what two cores can bear.
LARGE_BATCH, SLL_WIDTH, READER = (256, 256, (128, 32)) if DEVICE == "cuda" else (16, 32, (16, 16))


def scenes(count: int, device: str) -> tuple[torch.Tensor, Targets]:
    """Pictures of noise with two digits each."""
    generator = torch.Generator().manual_seed(0)
    centre = 0.3 + 0.4 * torch.rand(count, 2, 2, generator=generator)
    size = 0.2 + 0.2 * torch.rand(count, 2, 2, generator=generator)
    boxes = box_convert(torch.cat([centre, size], -1), "cxcywh", "xyxy").clamp(0, 1)
    labels = torch.randint(10, (count, 2), generator=generator)
    images = torch.rand(count, 3, 74, 74, generator=generator)
    return images.to(device), pad_targets(list(boxes.to(device)), list(labels.to(device)))


def plain_multibox(output: tuple[torch.Tensor, torch.Tensor], targets: Targets, priors: torch.Tensor) -> torch.Tensor:
    """The loss as tutorials write it: scene by scene, then the hard negatives of each."""
    logits, offsets = output
    corners = box_convert(priors, "cxcywh", "xyxy")
    classes = torch.full(logits.shape[:2], 10, device=logits.device)
    wanted = torch.zeros_like(offsets)
    for index, (boxes, labels) in enumerate(zip(*targets, strict=True)):
        overlaps = box_iou(boxes, corners)
        best, owner = overlaps.max(0)
        own = overlaps.argmax(1)
        owner[own], best[own] = torch.arange(len(boxes), device=own.device), 1.0
        classes[index] = torch.where(best >= 0.5, labels[owner], 10)
        wanted[index] = encode(boxes[owner], priors)
    positive = classes != 10
    values = F.cross_entropy(logits.mT, classes, reduction="none")
    total = values[positive].sum() + F.l1_loss(offsets[positive], wanted[positive], reduction="sum") / 4
    for index in range(len(logits)):
        negatives = values[index][~positive[index]].sort(descending=True).values
        total = total + negatives[: 3 * int(positive[index].sum())].sum()
    return total / positive.sum()


def step_of(
    loss_of: Callable[[nn.Module], torch.Tensor], model: nn.Module, precision: torch.dtype
) -> Callable[[], None]:
    optimizer, kind = adam(model, 1e-3), next(model.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(kind, precision, enabled=precision != torch.float32):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()

    return step


def test_training_step_of_the_naive_detector(benchmark, record, device):
    images, targets = scenes(BATCH, device)
    torch.manual_seed(0)
    model = naive().to(device)

    def ours(model: nn.Module) -> torch.Tensor:
        return DetectionStep(model.training_loss().to(device))(model, (images, *targets))

    def plain(model: nn.Module) -> torch.Tensor:
        return plain_multibox(model(images), targets, model.priors)

    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    steps = {
        "plain loop": step_of(plain, copy.deepcopy(model), torch.float32),
        "ours": step_of(ours, copy.deepcopy(model), torch.float32),
        "ours, as the study trains": step_of(ours, fast, torch.bfloat16),
    }
    costs = benchmark.pedantic(compare, args=(steps, 5), rounds=1, iterations=1)
    record(f"detector, training step, batch {BATCH}", rows(costs))


def test_training_step_of_the_study(benchmark, record, device):
    """Each configuration as the study trains it, beside the naive one."""
    images, targets = scenes(LARGE_BATCH, device)
    made = {
        "naive": naive(),
        "spectral-norm": spectral_norm(),
        f"standard conv, SLL {SLL_WIDTH} wide": standard_conv(SLL_WIDTH),
        f"L2-normalised, SLL {SLL_WIDTH} wide": l2_normalised(SLL_WIDTH),
    }

    def step(model: nn.Module) -> Callable[[], None]:
        model = model.to(device, memory_format=torch.channels_last).train()
        loss = DetectionStep(model.training_loss().to(device), check_targets(targets))
        return recorded(step_of(partial(loss, batch=(images, *targets)), model, torch.bfloat16), device)

    steps = {name: step(model) for name, model in made.items()}
    costs = benchmark.pedantic(compare, args=(steps, 7), rounds=1, iterations=1)
    record(f"study, training step in bfloat16, batch {LARGE_BATCH}", rows(costs))


def test_training_step_of_the_certified_detector(benchmark, record, device):
    """The reader, which slides one window over a pyramid, beside its own forward."""
    batch, width = READER
    images, targets = scenes(batch, device)
    model = detector(width).to(device, memory_format=torch.channels_last).train()
    loss = ReaderStep(model.training_loss(), known=check_targets(targets)).to(device)
    steps = {
        "forward": torch.no_grad()(partial(model, images)),
        "training step": recorded(step_of(partial(loss, batch=(images, *targets)), model, torch.float32), device),
    }
    costs = benchmark.pedantic(compare, args=(steps, 5), rounds=1, iterations=1)
    record(f"certified detector, training step, {width} wide, batch {batch}", rows(costs))


@pytest.mark.parametrize("number", [1, 16])
def test_certificate_of_the_certified_detector(benchmark, record, device, number):
    """At one budget, with the weights that ship; the certificate is reckoned from what the forward gave."""
    model, _ = trained("detection-reader", device)
    some = load_split("test", 2 * number, 1, torch.device(device)).part(slice(number))
    images = unit_range(some.images)
    given = answers(model, images)
    steps = {
        "forward": partial(answers, model, images),
        "certificate": partial(certify, given, some.targets, 0.25, model.least),
    }
    costs = benchmark.pedantic(compare, args=(steps, 15), rounds=1, iterations=1)
    record(f"certified detector, certificate, scenes {number}", rows(costs))

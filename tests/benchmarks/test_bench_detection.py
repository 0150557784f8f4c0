"""Detection: a training step beside a plain torch loop over the same model."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, box_iou

from lipguide.book.cost import compare
from lipguide.tasks.detection.boxes import Targets, encode, pad_targets
from lipguide.tasks.detection.configurations import naive
from lipguide.tasks.detection.losses import DetectionStep
from tests.benchmarks.test_bench_layers import rows

BATCH = 64


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


def test_training_step_of_the_naive_detector(benchmark, record, device):
    images, targets = scenes(BATCH, device)
    torch.manual_seed(0)
    model = naive().to(device)

    def step_of(loss_of, model: nn.Module, precision: torch.dtype):
        adam = torch.optim.Adam(model.parameters(), 1e-3)

        def step() -> None:
            adam.zero_grad()
            with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
                loss = loss_of(model)
            loss.backward()
            adam.step()

        return step

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

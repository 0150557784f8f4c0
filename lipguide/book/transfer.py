"""A plain small network that learns to read from synthetic digits alone; `likeness` lets it read real ones."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lipguide.data.digits import Digits
from lipguide.training import Supervised, fit

__all__ = ["SYN_DIGITS", "accuracy", "logits_of", "share_read", "small_reader", "train_reader"]

SYN_DIGITS = 0.869  # on real SVHN digits, of a network trained on SYN DIGITS alone (DIRT-T, table 1)


def small_reader() -> nn.Sequential:
    """Six 3 x 3 convolutions and a linear layer, 0.3 million weights; takes (N, 3, 32, 32) in [0, 1].

    >>> small_reader()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 10))


def train_reader(
    data: Digits,
    epochs: int,
    device: torch.device | str,
    seed: int = 0,
    batch: int = 128,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train `small_reader` by cross-entropy: AdamW, one cycle of the learning rate, no augmentation.

    Args:
        checkpoint: as `lipguide.training.fit` takes it.

    >>> images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    >>> train_reader(Digits(images, labels), epochs=1, device="cpu", batch=4).training
    False
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = small_reader().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = math.ceil(len(data.labels) / batch) * epochs
    step = Supervised(nn.CrossEntropyLoss())
    fit(model, data, step, optimizer, steps, batch, "one-cycle", seed=seed, checkpoint=checkpoint)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits, device: torch.device | str) -> float:
    """Share of the digits that the network reads right.

    >>> right = Digits(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    >>> accuracy(nn.Sequential(nn.Flatten(), nn.Linear(3072, 1)), right, "cpu")
    1.0
    """
    return share_read(logits_of(model, data, device), data)


@torch.no_grad()
def logits_of(model: nn.Module, data: Digits, device: torch.device | str) -> Tensor:
    """What the network says of each digit, (N, classes), on the CPU."""
    return torch.cat([model(images.to(device)).cpu() for images in data.images.split(500)])


def share_read(logits: Tensor, data: Digits) -> float:
    """Share of the digits that these logits read right."""
    if not len(data.labels):
        raise ValueError("accuracy needs at least one digit")
    return float((logits.argmax(dim=1) == data.labels).double().mean())

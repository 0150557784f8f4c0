"""Everyday corruptions: noise, brightness, contrast and blur, each the worst of a few candidates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipguide.arguments import whole
from lipguide.layers.export import remembered
from lipguide.robustness.attacks.objectives import (
    Model,
    Objective,
    check_pictures,
    default_generator,
    like,
    margin,
    normal,
    per_sample,
    raise_undefined,
    undefined,
)

__all__ = ["blur", "brightness", "contrast", "noise"]


def noise(
    model: Model,
    x: Tensor,
    y: Any,
    severity: float,
    draws: int = 10,
    score: Objective = margin,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst of `draws` pictures with Gaussian noise; `severity` is its standard deviation a pixel.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> noise(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=0.1).shape
    torch.Size([3, 1, 2, 2])
    """
    check_pictures(x, severity)
    whole("draws", draws, "without a draw the clean picture would be the worst")
    generator = generator or default_generator(x)
    candidates = (x + severity * normal(x, generator) for _ in range(draws))
    return _worst_of(model, x, y, candidates, score)


def brightness(model: Model, x: Tensor, y: Any, severity: float, score: Objective = margin) -> Tensor:
    """The worst of eight shifts of all pixels by the same amount, up to `severity` lighter or darker.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> brightness(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=0.3).shape
    torch.Size([3, 1, 2, 2])
    """
    check_pictures(x, severity)
    shifted = (x + sign * level for level in _levels(severity) for sign in (-1, 1))
    return _worst_of(model, x, y, shifted, score)


def contrast(model: Model, x: Tensor, y: Any, severity: float, score: Objective = margin) -> Tensor:
    """The worst of eight stretches about the picture's mean, by a factor from 1 − `severity` to 1 + `severity`.

    At severity 1 the darkest candidate is flat grey.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> contrast(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=0.5).shape
    torch.Size([3, 1, 2, 2])
    """
    check_pictures(x, severity)
    if severity > 1:
        raise ValueError(f"contrast of severity {severity} would turn pictures into negatives: take at most 1")
    mean = like(x.flatten(1).mean(1), x)
    stretched = (mean + (1 + sign * level) * (x - mean) for level in _levels(severity) for sign in (-1, 1))
    return _worst_of(model, x, y, stretched, score)


def blur(model: Model, x: Tensor, y: Any, severity: float, score: Objective = margin) -> Tensor:
    """The worst of four Gaussian blurs; `severity` is the largest standard deviation, in pixels.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> blur(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), severity=1.0).shape
    torch.Size([3, 1, 2, 2])
    """
    check_pictures(x, severity)
    if x.ndim != 4:
        raise ValueError(f"blur takes pictures (N, C, H, W), not {tuple(x.shape)}")
    return _worst_of(model, x, y, (_gaussian_blur(x, level) for level in _levels(severity)), score)


@torch.no_grad()
def _worst_of(model: Model, x: Tensor, y: Any, candidates: Iterable[Tensor], score: Objective) -> Tensor:
    """The candidate of the highest score, sample by sample; x where none is higher than its own."""
    with remembered(model):
        output = model(x)
        best = per_sample(score(output, y), x)
        worst, bad = x, undefined(output, best)
        for candidate in candidates:
            candidate = candidate.clamp(0, 1).to(x.dtype)
            output = model(candidate)
            value = per_sample(score(output, y), x)
            bad = bad | undefined(output, value)
            worst = torch.where(like(value > best, x), candidate, worst)
            best = torch.maximum(value, best)
    raise_undefined(bad)
    return worst


def _levels(severity: float) -> list[float]:
    return [severity * part / 4 for part in (1, 2, 3, 4)]


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return x
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=torch.float64)
    kernel = torch.softmax(-offsets.square() / (2 * sigma**2), 0).to(x.dtype)
    channels = x.shape[1]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):  # down the columns, then along the rows
        weight = kernel.reshape(shape).expand(channels, -1, -1, -1)
        padding = (0, 0, reach, reach) if shape[2] == -1 else (reach, reach, 0, 0)
        x = F.conv2d(F.pad(x, padding, mode="replicate"), weight, groups=channels)
    return x

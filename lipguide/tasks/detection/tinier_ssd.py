"""Tinier SSD: the public macro-architecture of the case study, and what it is made of in each configuration.

Ten 3×3 convolutions ("fire"), two auxiliary ones, and on the maps of 18, 9, 4 and 2 cells a side one head for classes
and one for boxes. Pictures have 74×74 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipguide.losses import OffsetCrossEntropy
from lipguide.losses.base import check_range
from lipguide.tasks.detection.boxes import decode, prior_boxes
from lipguide.tasks.detection.losses import Multibox

__all__ = ["PICTURE", "STAGES", "Output", "Parts", "TinierSSD"]

PICTURE = 74
SIDES, SCALES, RATIOS = (18, 9, 4, 2), (0.15, 0.35, 0.55, 0.725), (0.85, 0.6, 0.4, 0.25)
# One stage ends in one map. A number is the output width of a convolution; "2" and "3" are a pooling of stride 2 over
# windows of 2×2 and 3×3.
STAGES = ((32, 32, "2", 64, 64, "3", 64, 64, 128, 32), ("2", 32), ("3", 32), (16, "2", 16))

Layer = Callable[[int, int], nn.Module]


class Output(NamedTuple):
    """logits: (N, 1700, classes + 1), background last; offsets: (N, 1700, 4), of boxes from priors."""

    logits: Tensor
    offsets: Tensor


class Parts(NamedTuple):
    """What a configuration fills the macro-architecture with, each a function of (inputs, outputs)."""

    entry: Layer
    inner: Layer
    class_head: Layer
    box_head: Layer
    pool: Callable[[int], nn.Module]


class TinierSSD(nn.Module):
    """The macro-architecture over given parts.

    Args:
        tau: what a logit is multiplied by, in the loss and in the scores; above 0.
        offset: the margin that the loss asks of the right class, of logits before `tau`.

    >>> def layer(inputs, outputs):
    ...     return nn.Conv2d(inputs, outputs, 3, padding=1)
    >>> model = TinierSSD(Parts(layer, layer, layer, layer, lambda window: nn.MaxPool2d(window, 2)))
    >>> [tuple(part.shape) for part in model(torch.rand(2, 3, 74, 74))]
    [(2, 1700, 11), (2, 1700, 4)]
    """

    priors: Tensor

    def __init__(
        self,
        parts: Parts,
        stages: tuple[tuple[int | str, ...], ...] = STAGES,
        classes: int = 10,
        tau: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        check_range(tau=tau)
        self.classes = classes
        self.tau, self.offset = tau, offset
        self.stages, self.class_heads, self.box_heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = 3
        for stage in stages:
            layers: list[nn.Module] = []
            for item in stage:
                if isinstance(item, str):
                    layers.append(parts.pool(int(item)))
                else:
                    layers.append((parts.entry if channels == 3 else parts.inner)(channels, item))
                    channels = item
            self.stages.append(nn.Sequential(*layers))
            self.class_heads.append(parts.class_head(channels, len(RATIOS) * (classes + 1)))
            self.box_heads.append(parts.box_head(channels, len(RATIOS) * 4))
        self.register_buffer("priors", prior_boxes(SIDES, SCALES, RATIOS), persistent=False)

    def forward(self, x: Tensor) -> Output:
        logits, offsets = [], []
        for stage, class_head, box_head in zip(self.stages, self.class_heads, self.box_heads, strict=True):
            x = stage(x)
            logits.append(self._by_prior(class_head(x), self.classes + 1))
            offsets.append(self._by_prior(box_head(x), 4))
        return Output(torch.cat(logits, 1), torch.cat(offsets, 1))

    def training_loss(self, reduction: str = "mean") -> nn.Module:
        """The multibox loss over this model's priors."""
        plain = self.tau == 1 and self.offset == 0
        per_prior = None if plain else OffsetCrossEntropy(self.offset, 1 / self.tau, reduction="none")
        return Multibox(self.priors, per_prior=per_prior, reduction=reduction)

    def log_scores(self, output: Output) -> Tensor:
        """(N, 1700, classes): logarithms of the probabilities of the classes, without background."""
        return (self.tau * output[0]).log_softmax(2)[..., :-1]

    def boxes(self, output: Output) -> Tensor:
        """(N, 1700, 4) xyxy, which may stick out of the picture."""
        return decode(output[1], self.priors)

    @staticmethod
    def _by_prior(x: Tensor, entries: int) -> Tensor:
        """(N, priors · entries, rows, columns) to (N, rows · columns · priors, entries)."""
        return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, entries))

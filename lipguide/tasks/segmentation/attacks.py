"""What an attack on a segmenter is after: pixels whose label flips."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguide.checks import IGNORE, class_indices

__all__ = ["flipped", "soft_flips"]

SOFT = 0.05  # margin over which a pixel counts as half flipped, relative to the spread of the logits


def flipped(logits: Tensor, masks: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """1 for a pixel whose label is wrong, 0 for one that is right or ignored: (N, H, W); what an attack is after.

    >>> flipped(torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]]), torch.tensor([[[0, 0]]]))
    tensor([[[0., 1.]]])
    """
    labels, counts = class_indices(masks, ignore_index)
    return ((logits.argmax(1) != labels) & counts).to(logits.dtype)


def soft_flips(logits: Tensor, masks: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """`flipped`, made smooth: σ((best wrong logit − right logit) / s), with s a twentieth of the spread of the logits.

    Cross-entropy spends most of its gradient on pixels that are wrong already. This loss has its steepest slope where a
    pixel is about to flip, and gives up both on those far behind and on those far ahead.

    >>> soft_flips(torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]]), torch.tensor([[[0, 0]]])).round(decimals=2)
    tensor([[[0., 1.]]])
    """
    labels, counts = class_indices(masks, ignore_index)
    label = labels.unsqueeze(1)  # (N, 1, H, W)
    wrong = logits.scatter(1, label, -torch.inf).amax(1)
    spread = (logits.detach().amax(1) - logits.detach().amin(1)).flatten(1).amax(1)[:, None, None]
    scale = SOFT * spread.clamp(min=torch.finfo(logits.dtype).tiny)
    right = logits.gather(1, label).squeeze(1)
    return torch.where(counts, torch.sigmoid((wrong - right) / scale), 0.0)

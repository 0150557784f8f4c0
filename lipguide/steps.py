"""Training steps for pictures: how a task turns a batch into a loss.

A step says by `steady` whether a GPU may record it and repeat it by itself: see `lipguide.training.fit`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Shifted", "Supervised"]


class Supervised(nn.Module):
    """The step of a task with pictures and labels: `loss(model(images), labels)`.

    It is steady if the loss and the model are: see `fit`.

    >>> step = Supervised(nn.CrossEntropyLoss())
    >>> round(step(nn.Identity(), (torch.zeros(3, 2), torch.tensor([0, 1, 1]))).item(), 4)
    0.6931
    """

    steady = True

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return self.loss(model(images), labels)


class Shifted(nn.Module):
    """A training step on pictures moved by up to two pixels each way, all of a batch alike, and masks with them.

    What comes in at the edges repeats the last row or column of the picture; in a mask it is `outside`.

    Args:
        step: the training step behind it, such as `Supervised`.
        mirror: half of the pictures at random, for objects, which may be mirrored, but not for digits.
        noise: standard deviation of Gaussian noise on each pixel.
        outside: the label of pixels that are not counted.

    The first column holds the pictures, (N, C, H, W). Every other one of shape (N, H, W) is a mask.

    >>> step = Shifted(Supervised(nn.CrossEntropyLoss()))
    >>> step(nn.Flatten(), (torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))).shape
    torch.Size([])
    >>> step(nn.Identity(), (torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.long))).shape
    torch.Size([])
    """

    def __init__(self, step: nn.Module, mirror: bool = False, noise: float = 0.0, outside: int = -100) -> None:
        super().__init__()
        self.step, self.mirror, self.noise, self.outside = step, mirror, noise, outside
        self.steady = getattr(step, "steady", False)

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, *others = batch
        height, width = images.shape[2:]
        down, right = torch.randint(5, (2,), device=images.device)
        rows = down + torch.arange(height, device=images.device)
        columns = right + torch.arange(width, device=images.device)
        half = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5 if self.mirror else None

        def moved(pictures: Tensor, **padding: Any) -> Tensor:
            """(N, C, H, W) to the same shape."""
            wider = nn.functional.pad(pictures, (2, 2, 2, 2), **padding)
            window = wider.index_select(2, rows).index_select(3, columns)
            return window if half is None else torch.where(half, window.flip(3), window)

        images = moved(images, mode="replicate")
        for place, part in enumerate(others):
            if isinstance(part, Tensor) and part.shape[1:] == (height, width):
                others[place] = moved(part[:, None], value=self.outside)[:, 0]
        if self.noise:
            images = images + self.noise * torch.randn_like(images)
        return self.step(model, (images, *others))

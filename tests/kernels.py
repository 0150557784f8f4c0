"""Weights with a structure that random ones do not have, for the tests of norms and of constraints."""

import torch

WEIGHTS = ["raw", "smooth", "ones", "rank one", "sparse", "whole numbers", "one tap", "wave", "huge", "tiny"]


def fill_(weight: torch.Tensor, kind: str) -> None:
    if kind == "smooth":
        weight.abs_()
    elif kind == "ones":
        weight.fill_(1.0)
    elif kind == "rank one":
        weight.copy_(torch.randn(len(weight), *[1] * (weight.ndim - 1)) * torch.randn(weight.shape[1:]))
    elif kind == "sparse":
        weight.mul_(torch.rand_like(weight) < 0.3)
    elif kind == "whole numbers":
        weight.copy_(torch.randint(-2, 3, weight.shape))
    elif kind == "one tap":
        weight.zero_().flatten()[torch.randint(weight.numel(), ())] = 1.0
    elif kind == "wave" and weight.ndim == 4:
        a, b = 3 * torch.rand(2)
        rows, columns = torch.arange(weight.shape[2])[:, None], torch.arange(weight.shape[3])
        weight.copy_(torch.cos(a * rows + b * columns + 6 * torch.rand(*weight.shape[:2], 1, 1)))
    elif kind in ("huge", "tiny"):
        weight.mul_(1e15 if kind == "huge" else 1e-15)

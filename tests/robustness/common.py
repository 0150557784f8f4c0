"""What the tests of this folder share."""

import torch
from torch import Tensor, nn

UNSIGNED = [torch.uint8, torch.uint16, torch.uint32]  # in which -1 is a large number; in uint64 it is -1 once in int64
WHOLE = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def lipschitz_network(seed: int, inputs: int = 12, classes: int = 4) -> nn.Sequential:
    """A 1-Lipschitz network of orthogonal maps and absolute values, tight enough for attacks to come close."""
    first, second = nn.Linear(inputs, inputs, dtype=torch.float64), nn.Linear(inputs, classes, dtype=torch.float64)
    for layer in (first, second):
        nn.init.orthogonal_(layer.weight, generator=generator(seed))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), first, Absolute(), second).eval()


def linear(weight: Tensor) -> nn.Sequential:
    """A linear classifier with these rows."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    model[1].weight.data.copy_(weight)
    return model.eval()

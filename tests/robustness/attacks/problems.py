"""Pictures to attack, small networks fitted to them, and the peers."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.robustness import attacks

CLASSES = 5
CORRUPTIONS = {name: getattr(attacks, name) for name in ("noise", "brightness", "contrast", "blur")}
ALL = {"pgd_l2": attacks.pgd_l2, "pgd_linf": attacks.pgd_linf, **CORRUPTIONS}


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five smooth patterns of random strength, 12x12, in noise."""
    patterns = torch.rand(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(123))
    patterns = F.interpolate(patterns, size=(12, 12), mode="bicubic").clamp(0, 1)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    strength = torch.rand(n, 1, 1, 1, generator=generator)
    x = 0.25 + 0.5 * patterns[y] * strength + 0.2 * torch.randn(n, 1, 12, 12, generator=generator)
    return x.clamp(0, 1), y


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def fitted(model: nn.Sequential, rate: float, tau: float) -> nn.Sequential:
    x, y = pictures(2000, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(tau * model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def adv_lib_attacks():
    """adv-lib imports a plotting server that nothing here uses; an empty module stands in where it is not installed."""
    if "visdom" not in sys.modules:
        try:
            import visdom  # noqa: F401
        except ImportError:
            sys.modules["visdom"] = types.SimpleNamespace(Visdom=None)
    return pytest.importorskip("adv_lib.attacks")

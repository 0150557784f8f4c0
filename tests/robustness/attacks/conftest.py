"""Fitted once for all tests of attacks."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from tests.robustness.attacks.problems import CLASSES, Scale, fitted, pictures
from tests.robustness.common import Absolute


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
        )
        lipschitz = nn.Sequential(
            *(nn.Flatten(), orthogonal(nn.Linear(144, 64)), Absolute(), orthogonal(nn.Linear(64, CLASSES)))
        )
    ordinary = fitted(plain, rate=3e-3, tau=1.0)
    return {
        "ordinary": ordinary,
        "overconfident": nn.Sequential(ordinary, Scale(1000.0)).eval(),
        "1-Lipschitz": fitted(lipschitz, rate=1e-2, tau=10.0),
    }


@pytest.fixture(scope="module")
def test_set() -> tuple[Tensor, Tensor]:
    return pictures(300, seed=1)

"""An SLL block, z = u − 2 V relu(Vᵀu + b), in float64, and what certificates ask of its matrices again and again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Block"]

CUSHION = 1e-10  # for float64, far above the rounding of its sums
SHARE = 0.9  # θ‖V‖², where ‖V‖ ≥ 1: of the length of a move, what the units are charged for


@dataclass(frozen=True)
class Block:
    """filters: Vᵀ (K, D), as the block's weight; bias: b (K,).

    >>> turned = Block(torch.eye(2).double(), torch.zeros(2).double())
    >>> tuple(turned(torch.tensor([[1.0, -1.0]]).double()).flatten().tolist())
    (-1.0, -1.0)
    """

    filters: Tensor
    bias: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """z of features (..., D)."""
        return u - 2 * self.before(u).relu() @ self.filters

    def before(self, u: Tensor) -> Tensor:
        """Vᵀu + b, (..., K)."""
        return u @ self.filters.mT + self.bias

    def pull(self, w: Tensor) -> Tensor:
        """c = −2 Vᵀw, (..., K): what each unit that is on adds to the gradient of wᵀz."""
        return -2 * w @ self.filters.mT

    @cached_property
    def lengths(self) -> Tensor:
        """‖v_k‖, (K,)."""
        return self.filters.norm(dim=1)

    @cached_property
    def gram(self) -> Tensor:
        """VᵀV, (K, K)."""
        return self.filters @ self.filters.mT

    @cached_property
    def square(self) -> float:
        """‖V‖², or 1 if that is more."""
        return max(1.0, float(torch.linalg.eigvalsh(self.gram)[-1]))

    @property
    def steepest(self) -> float:
        """How Lipschitz the block is: ‖I − 2 V D Vᵀ‖ is no more than max(1, 2 ‖V‖² − 1)."""
        return 2 * self.square - 1

    @cached_property
    def lifted(self) -> float:
        """What has to be added to I − VᵀV for it to be positive."""
        return self.square - 1 + CUSHION

    @cached_property
    def loss(self) -> Tensor:
        """I − VᵀV and what it is lifted by, (K, K)."""
        return (1 + self.lifted) * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device) - self.gram

    @cached_property
    def theta(self) -> float:
        """The part of a squared length that the units are charged for: θ‖V‖² is below 1."""
        return SHARE / self.square

    @cached_property
    def free(self) -> Tensor:
        """(I − θVVᵀ)⁻¹, (D, D)."""
        shared = self.filters.mT @ self.filters
        eye = torch.eye(len(shared), dtype=shared.dtype, device=shared.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(eye - self.theta * shared))

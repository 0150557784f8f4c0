"""Losses and gradients that are not finite: no such update reaches the weights, and the step and the layer are named.

Asking a GPU in every step whether a number is finite would make it wait for the CPU in every step. torch's fused
optimizers take the answer on the device and skip the update there; all others are asked for here, one number a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lipguide.distributed import rank_and_ranks

__all__ = ["Guard", "check_weights", "explain"]


class Guard:
    """Lets finite updates pass, and none after the first that is not, until somebody looks.

    Args:
        optimizer: whose updates it guards.
        device: of the weights.
        reads: read the answer back in every step, also where the optimizer could skip the update by itself.

    >>> layer = nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(layer.parameters(), 0.1, fused=True)
    >>> guard = Guard(sgd, torch.device("cpu"))
    >>> [guard.passes(torch.tensor(finite)) for finite in (True, False, True)], guard.passed()
    ([True, True, True], 1)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, reads: bool = False) -> None:
        self._optimizer = optimizer
        # The attribute by which torch's own GradScaler knows them; they look for `found_inf` in each step.
        self.reads = reads or not getattr(optimizer, "_step_supports_amp_scaling", False)
        self._finite = torch.ones((), dtype=torch.bool, device=device)  # until now
        self._passed = torch.zeros((), dtype=torch.int64, device=device)

    def passes(self, finite: Tensor) -> bool:
        """Whether the update may be made; True where the optimizer will skip it by itself if need be.

        Args:
            finite: whether loss and gradient of this step are.
        """
        finite = _everywhere(finite)
        if self.reads:
            return bool(finite)
        self._finite &= finite
        self._passed += self._finite
        self._optimizer.found_inf = self._finite.logical_not().float()
        return True

    def passed(self) -> int | None:
        """How many updates passed before the first that did not; None if all did. This waits for the device."""
        return None if self._finite else int(self._passed)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(self._optimizer, "found_inf"):
            del self._optimizer.found_inf


def _everywhere(finite: Tensor) -> Tensor:
    """Whether it is so in every process: else one would stop, or skip an update, and the others would not."""
    if rank_and_ranks()[1] > 1:
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return finite.bool()


def check_weights(model: nn.Module, when: str) -> None:
    """Raise FloatingPointError, and name the parameter, unless all are finite.

    >>> check_weights(nn.Linear(2, 1), "at first")
    """
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise FloatingPointError(f"parameter {broken[0]!r} is not finite {when}")


def explain(model: nn.Module, step: int, loss_of: Callable[[], Tensor]) -> str:
    """What was not finite in a step: made again, the first layer that goes wrong, or else the gradients.

    Args:
        model: with the weights that it had before the step.
        loss_of: the loss of this step, of `model`.

    >>> layer = nn.Linear(1, 1)
    >>> explain(nn.Sequential(layer), 7, lambda: (layer(torch.zeros(1, 1)) * 0).sqrt().sum())
    "step 7: the loss is 0, but the gradient of '0.weight', '0.bias' is not finite"
    """
    model.zero_grad(set_to_none=True)
    loss, first = _watched(model, loss_of)
    if not torch.isfinite(loss):
        where = first or "the loss itself: the output of every layer is finite"
        return f"step {step}: the loss is {loss.item()}; first not finite is {where}"
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if broken:
        where = f"the gradient of {', '.join(map(repr, broken))}"
    elif not torch.isfinite(nn.utils.get_total_norm(gradients.values())):
        where = "the norm of the gradient"
    else:
        return f"step {step}: the loss or the gradient was not finite, in another process or for this once"
    return f"step {step}: the loss is {loss.item():.4g}, but {where} is not finite"


def _watched(model: nn.Module, loss_of: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """The loss, and the first layer whose output is not finite, if there is one."""
    first: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else [output]
            if not first and any(isinstance(o, Tensor) and not o.isfinite().all() for o in outputs):
                first.append(f"layer {name!r} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        return loss_of(), "".join(first)
    finally:
        for hook in hooks:
            hook.remove()

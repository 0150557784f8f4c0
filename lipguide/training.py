"""One plain training loop for every task.

The data stay on the device; a step takes a batch by index, asks the task for its loss, and updates. Everything random
in a step follows from (seed, step), so a run that was interrupted goes on to the very weights of one that was not.

A step does not wait for a GPU. Whether its loss and gradient are finite is decided there, and torch's fused optimizers
skip the update there; what happened is read at the next report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lipguide import deadline
from lipguide.arguments import whole
from lipguide.batches import batch_indices, mixed, on_device, samples_in, taken
from lipguide.checkpoint import Checkpoint, Progress, Tally, content_of, kind_of
from lipguide.distributed import gathered, rank_and_ranks, share_buffers
from lipguide.finite import Guard, check_weights, explain
from lipguide.recorded import Recorded, can_record, make_recordable, set_rates
from lipguide.steps import Shifted, Supervised

__all__ = ["SCHEDULES", "Shifted", "StepLoss", "Supervised", "adam", "fit", "learning_rate_factor", "supervised"]

logger = logging.getLogger(__name__)
StepLoss = Callable[[nn.Module, tuple[Any, ...]], Tensor]
SCHEDULES = ("constant", "cosine", "one-cycle")
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by. "one-cycle" rises from 1/25 over the first 30 %, then falls to 0.

    >>> [round(learning_rate_factor("cosine", step, 4), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if schedule == "constant":
        return 1.0
    rise = 0.3 * steps if schedule == "one-cycle" else 0.0
    if step < rise:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def adam(model: nn.Module, rate: float) -> torch.optim.Adam:
    """Adam over all parameters of a model; on CUDA torch's fused one, which is one kernel and waits for nothing.

    There its steps can be recorded, too. On the CPU the fused one rounds differently, and a step of a convolutional
    network gets no faster by it.

    >>> adam(nn.Linear(2, 1), 1e-3).defaults["fused"] is None
    True
    """
    on_cuda = all(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.Adam(model.parameters(), rate, fused=on_cuda or None, capturable=on_cuda)


def supervised(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss: nn.Module,
    rate: float,
    steps: int,
    batch_size: int = 256,
    **options: Any,
) -> list[dict[str, float]]:
    """The short way for pictures and labels: `fit` with Adam and one cycle of the rate; the model ends in eval mode.

    Args:
        data: (images, labels).
        loss: of `model(images)` and labels, such as those of `lipguide.losses`.
        rate: the largest learning rate.
        options: as `fit` takes them, such as seed, checkpoint, report.

    >>> x, model = torch.linspace(-1, 1, 64)[:, None], nn.Linear(1, 1)
    >>> history = supervised(model, (x, 3 * x), nn.MSELoss(), rate=0.3, steps=200)
    >>> round(model.weight.item(), 1)
    3.0
    """
    history = fit(model, data, Supervised(loss), adam(model, rate), steps, batch_size, "one-cycle", **options)
    model.eval()
    return history


def fit(
    model: nn.Module,
    data: Sequence[Tensor | Sequence[Any]],
    step_loss: StepLoss,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 256,
    schedule: str = "cosine",
    precision: torch.dtype = torch.float32,
    clip: float | None = None,
    seed: int = 0,
    after_step: Callable[[nn.Module], None] | None = None,
    checkpoint: str | Path | None = None,
    log_every: int = 100,
    recorded: bool = False,
    report: Callable[[str], None] = logger.info,
) -> list[dict[str, float]]:
    """Train `model` where its parameters are, and return one record for each line reported.

    Args:
        model: any module. Under `torchrun` (see `lipguide.distributed.start`) it is trained data-parallel.
        data: columns of equal length, such as `(images, labels)` or `(images, boxes, labels)`; a column is a tensor,
            moved to the device whole, or a list with one item a sample.
        step_loss: `step_loss(model, batch)`, the mean loss of a batch (a tuple with a part of each column); under
            several processes the mean over all their parts, as `lipguide.losses` gives it. If it is a module, such as
            `Supervised`, its state is a part of the checkpoint.
        optimizer: over parameters of `model`; `schedule` ("constant", "cosine", "one-cycle") scales its rate. With one
            of torch's fused ones (`fused=True`) and no `after_step`, a step never waits for a GPU.
        steps: updates in all. Batches are always full: they run on from one shuffled epoch into the next.
        precision: `torch.bfloat16` or `torch.float16` trains in mixed precision.
        clip: largest norm of the gradient, off by default: a 1-Lipschitz network's gradients do not explode.
        after_step: called with `model` after every update, for instance to project weights onto a constraint.
        checkpoint: a file, written with each report; if it exists, the run goes on from there. A file of a run with
            other settings, data, model, loss or optimizer is an error.
        recorded: let a GPU record the step once and repeat it by itself, which saves the starting of each kernel. The
            step must be steady: ask the device for no number, and do in each step the same with tensors of the same
            shapes, as networks of plain layers do. It takes an optimizer such as `adam` gives; elsewhere, and under
            several processes, nothing is recorded.
        report: receives a line every `log_every` steps; `print` in a notebook.

    Raises FloatingPointError, with the step and the layer, if a loss or a gradient is not finite: at the next report
    with a fused optimizer, at once with any other. The weights are then still those before the step.

    Raises `lipguide.deadline.OutOfTime` where a time limit is set and passes; the checkpoint is then of the last step.

    >>> model = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> history = fit(model, (x, 3 * x), Supervised(nn.MSELoss()), sgd, steps=100, batch_size=32)
    >>> round(model.weight.item(), 2)
    3.0
    """
    samples = samples_in(data)
    _check_numbers(clip, seed=seed, steps=steps, batch_size=batch_size, log_every=log_every)
    _check_names(schedule, precision)
    _check_optimizer(optimizer, model, step_loss)
    rank, ranks = rank_and_ranks()
    if batch_size < ranks:
        raise ValueError(f"batch_size = {batch_size} leaves some of the {ranks} processes without a sample")
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    settings = {"steps": steps, "batch_size": batch_size, "schedule": schedule, "seed": seed, "samples": samples}
    settings |= {"precision": str(precision), "clip": clip, "optimizer": _describe(optimizer)}
    tally = Tally(device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "tally": tally}
    file = _checkpoint(checkpoint, parts, settings, data, step_loss, after_step)
    if isinstance(step_loss, nn.Module):
        step_loss.to(device)
    first, history = file.resume()
    data = [on_device(column, device) for column in data]
    net = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model

    def indices(step: int) -> Tensor:
        return batch_indices(step, batch_size, samples, seed).tensor_split(ranks)[rank]

    def loss_with(network: nn.Module, share: Tensor) -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return _one_number(step_loss(network, tuple(taken(column, share) for column in data)))

    def loss_of(network: nn.Module, step: int) -> Tensor:
        torch.manual_seed(mixed(seed, step, rank))
        return loss_with(network, indices(step))

    def update(share: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The loss and the norm of the gradient of a step, and whether it was made: not if one of them is not finite.
        Where the guard reads nothing, it was made if it could be."""
        optimizer.zero_grad(set_to_none=True)
        loss = loss_with(net, share)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        loss = loss.detach()
        # The scaler expects infinite gradients.
        if not guard.passes(torch.isfinite(loss if scaler.is_enabled() else loss + norm)):
            return loss, norm, False
        if clip is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
        scaler.step(optimizer)
        return loss, norm, True

    def check(when: str) -> None:
        """What the guard has kept from the weights is an error, and so is a weight that is not finite."""
        passed = guard.passed()
        if passed is not None:
            _stop(model, first + passed, loss_of)
        check_weights(model, when)

    def stop_in_time(step: int) -> None:
        check(f"before step {step}")
        if rank == 0 and step > first:
            tally.pause()
            file.save(Progress(step, history))
        kept = "" if checkpoint else ", and no checkpoint is kept"
        raise deadline.OutOfTime(f"stopped before step {step} of {steps}{kept}")

    guard = Guard(optimizer, device, reads=scaler.is_enabled() or after_step is not None)
    one_step = update
    if recorded and ranks == 1 and can_record(device):
        make_recordable(optimizer, guard, data)
        one_step = Recorded(update, device)
    with _training(model), torch.random.fork_rng([device] if device.type == "cuda" else []), guard:
        tally.begin()
        for step in range(first, steps):
            # Several processes agree on it where they talk anyway, after a report.
            if (ranks == 1 or not tally.steps) and deadline.is_up():
                stop_in_time(step)
            set_rates(optimizer, learning_rate_factor(schedule, step, steps))
            torch.manual_seed(mixed(seed, step, rank))
            loss, norm, made = one_step(indices(step))
            if not made:
                _stop(model, step, loss_of)
            scaler.update()
            if after_step is not None:
                after_step(model)
            tally.add(loss)
            if (step + 1) % log_every == 0 or step + 1 == steps:
                check(f"after the update of step {step}")
                count, seconds, total = tally.taken()
                record = {
                    "step": step + 1,
                    "loss": sum(gathered(total)) / (count * ranks),
                    "gradient_norm": norm.item(),
                    "learning_rate": float(optimizer.param_groups[0]["lr"]),
                    "samples_per_second": count * batch_size / seconds,
                }
                history.append(record)
                if rank == 0:
                    report(_line(record, steps))
                    file.save(Progress(step + 1, history))
                tally.begin()
    share_buffers(model)  # DistributedDataParallel keeps them in step only while it trains
    return history


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode; afterwards each part is in the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _check_numbers(clip: float | None, seed: int, **counts: int) -> None:
    whole("seed", seed, least=0)
    for name, value in counts.items():
        whole(name, value)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, the largest norm of the gradient, or None, not {clip}")


def _check_names(schedule: str, precision: torch.dtype) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be torch.float32, torch.bfloat16 or torch.float16, not {precision}")


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, step_loss: StepLoss) -> None:
    """Raise unless the optimizer trains parameters of the model (or of the loss) and nothing else."""
    if next(model.parameters(), None) is None:
        raise ValueError(f"the model, a {type(model).__name__}, has no parameters: there is nothing to train")
    own = list(model.parameters())
    if isinstance(step_loss, nn.Module):
        own += step_loss.parameters()
    known = {id(parameter) for parameter in own}
    theirs = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [parameter for parameter in theirs if id(parameter) not in known]
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the {len(theirs)} parameters of the optimizer, such as one of shape "
            f"{tuple(foreign[0].shape)}, belong neither to the model nor to the loss: make the optimizer from "
            "model.parameters() when the model is complete, constraints included"
        )
    if not any(parameter.requires_grad for parameter in theirs):
        raise ValueError("none of the parameters of the optimizer requires a gradient: there is nothing to train")
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group["lr"]))
        if not 0 <= rate < math.inf:
            raise ValueError(f"the learning rate must be finite and not negative, not {rate}")


def _one_number(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1 and (loss.requires_grad or not torch.is_grad_enabled()):
        return loss.reshape(())
    what = f"{tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if isinstance(loss, Tensor) and loss.numel() == 1:
        what = "one that none of them has a part in"
    raise ValueError(f"step_loss must return one number that the parameters have a part in, not {what}")


def _checkpoint(
    path: str | Path | None,
    parts: dict[str, Any],
    settings: dict[str, Any],
    data: Sequence[Any],
    step_loss: StepLoss,
    after_step: Callable[[nn.Module], None] | None,
) -> Checkpoint:
    """The checkpoint of a run, with all that must be the same to go on from it."""
    if path is None:
        return Checkpoint(None, parts, settings)
    settings |= {"data": content_of(*data), "model": kind_of(parts["model"]), "step_loss": kind_of(step_loss)}
    settings |= {"after_step": getattr(after_step, "__qualname__", type(after_step).__qualname__)}
    constants = {}
    if isinstance(step_loss, nn.Module):
        parts |= {"step_loss": step_loss}
        constants = dict(step_loss.named_buffers())
    return Checkpoint(path, parts, settings, constants)


def _describe(optimizer: torch.optim.Optimizer) -> str:
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} of {sizes} parameters, {groups}"


def _line(record: dict[str, float], steps: int) -> str:
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.4f}  "
        f"lr {record['learning_rate']:.2e}  |gradient| {record['gradient_norm']:.3g}  "
        f"{record['samples_per_second']:.0f} samples/s"
    )


def _stop(model: nn.Module, step: int, loss_of: Callable[[nn.Module, int], Tensor]) -> NoReturn:
    """Make the step again to find the first layer that went wrong, and raise."""
    check_weights(model, f"before the update of step {step}")
    raise FloatingPointError(explain(model, step, lambda: loss_of(model, step)))

"""One plain training loop for every task.

The data stay on the device; a step takes a batch by index, asks the task for its loss, and updates. Everything random
in a step follows from (seed, step), so a run that was interrupted goes on to the very weights of one that was not.
"""

import logging
import math
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguide.distributed import gathered, rank_and_ranks, share_buffers
from lipguide.files import replacing

logger = logging.getLogger(__name__)
StepLoss = Callable[[nn.Module, tuple[Any, ...]], Tensor]
UNREADABLE = (EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
SCHEDULES = ("constant", "cosine", "one-cycle")


class Supervised(nn.Module):
    """The step of a task with pictures and labels: ``loss(model(images), labels)``.

    >>> step = Supervised(nn.CrossEntropyLoss())
    >>> round(step(nn.Identity(), (torch.zeros(3, 2), torch.tensor([0, 1, 1]))).item(), 4)
    0.6931
    """

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

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, *others = batch
        height, width = images.shape[2:]
        down, right = torch.randint(5, (2,)).tolist()
        half = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5 if self.mirror else None

        def moved(pictures: Tensor, **padding: Any) -> Tensor:
            """(N, C, H, W) to the same shape."""
            wider = nn.functional.pad(pictures, (2, 2, 2, 2), **padding)
            window = wider[..., down : down + height, right : right + width]
            return window if half is None else torch.where(half, window.flip(3), window)

        images = moved(images, mode="replicate")
        for place, part in enumerate(others):
            if isinstance(part, Tensor) and part.shape[1:] == (height, width):
                others[place] = moved(part[:, None], value=self.outside)[:, 0]
        if self.noise:
            images = images + self.noise * torch.randn_like(images)
        return self.step(model, (images, *others))


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
    report: Callable[[str], None] = logger.info,
) -> list[dict[str, float]]:
    """Train ``model`` where its parameters are, and return one record for each line reported.

    Args:
        model: any module. Under ``torchrun`` (see ``lipguide.distributed.start``) it is trained data-parallel.
        data: columns of equal length, such as ``(images, labels)`` or ``(images, boxes, labels)``; a column is a
            tensor, moved to the device whole, or a list with one item a sample.
        step_loss: ``step_loss(model, batch)``, the mean loss of a batch (a tuple with a part of each column); under
            several processes the mean over all their parts, as ``lipguide.losses`` gives it. If it is a module, such
            as ``Supervised``, its state is a part of the checkpoint.
        optimizer: over the parameters of ``model``; ``schedule`` ("constant", "cosine", "one-cycle") scales its rate.
        steps: updates in all. Batches are always full: they run on from one shuffled epoch into the next.
        precision: ``torch.bfloat16`` or ``torch.float16`` trains in mixed precision.
        clip: largest norm of the gradient, off by default: a 1-Lipschitz network's gradients do not explode.
        after_step: called with ``model`` after every update, for instance to project weights onto a constraint.
        checkpoint: a file, written with each report; if it exists, the run goes on from there.
        report: receives a line every ``log_every`` steps; ``print`` in a notebook.

    Raises FloatingPointError, with the step and the layer, as soon as a loss or a gradient is not finite; the weights
    are then still those before the step.

    >>> model = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> history = fit(model, (x, 3 * x), Supervised(nn.MSELoss()), sgd, steps=100, batch_size=32)
    >>> round(model.weight.item(), 2)
    3.0
    """
    samples = _check(data, steps, batch_size, schedule, precision)
    device = next(model.parameters()).device
    data = [_to(column, device) for column in data]
    rank, ranks = rank_and_ranks()
    if batch_size < ranks:
        raise ValueError(f"batch_size = {batch_size} leaves some of the {ranks} processes without a sample")
    net = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if isinstance(step_loss, nn.Module):
        stateful["step_loss"] = step_loss.to(device)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    run = {"steps": steps, "batch_size": batch_size, "schedule": schedule, "seed": seed, "samples": samples}
    run |= {"precision": str(precision), "clip": clip, "optimizer": _describe(optimizer)}
    first, history = _resume(checkpoint, stateful, run)

    def loss_of(network: nn.Module, step: int) -> Tensor:
        share = _batch_indices(step, batch_size, samples, seed).tensor_split(ranks)[rank]
        torch.manual_seed(_mix(seed, step, rank))
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return step_loss(network, tuple(_take(column, share) for column in data))

    was_training = model.training
    model.train()
    total = torch.zeros((), device=device, dtype=torch.float64)
    since, started = first, time.perf_counter()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(schedule, step, steps)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(net, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            # Reading this one number back is what it costs to stop in time. The scaler expects infinite gradients.
            if not torch.isfinite(loss if scaler.is_enabled() else loss + norm):
                _stop(model, loss, step, loss_of)
            if clip is not None:
                nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
            scaler.step(optimizer)
            scaler.update()
            if after_step is not None:
                after_step(model)
            total += loss.detach()
            if (step + 1) % log_every == 0 or step + 1 == steps:
                count, seconds = step + 1 - since, time.perf_counter() - started
                record = {
                    "step": step + 1,
                    "loss": sum(gathered(total.item())) / (count * ranks),
                    "gradient_norm": norm.item(),
                }
                record |= {"learning_rate": optimizer.param_groups[0]["lr"]}
                record |= {"samples_per_second": count * batch_size / seconds}
                history.append(record)
                if rank == 0:
                    report(_line(record, steps))
                    _save(checkpoint, stateful, run, step + 1, history)
                total, since, started = torch.zeros_like(total), step + 1, time.perf_counter()
    share_buffers(model)  # DistributedDataParallel keeps them in step only while it trains
    model.train(was_training)
    return history


def _check(data: Sequence[Any], steps: int, batch_size: int, schedule: str, precision: torch.dtype) -> int:
    lengths = {len(column) for column in data}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the columns of data must be of one length, and not empty; they have {sorted(lengths)} samples"
        )
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, not {steps} and {batch_size}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if precision not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"precision must be torch.float32, torch.bfloat16 or torch.float16, not {precision}")
    return lengths.pop()


def _to(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        return item.to(device)
    return [part.to(device) if isinstance(part, Tensor) else part for part in item]


def _take(column: Tensor | list[Any], indices: Tensor) -> Tensor | list[Any]:
    if isinstance(column, Tensor):
        return column[indices.to(column.device)]
    return [column[index] for index in indices.tolist()]


def _mix(*numbers: int) -> int:
    """One seed out of several. torch's generator on the CPU reads only 32 bits of it, so all of them have to count."""
    return zlib.crc32(repr(numbers).encode())


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(_mix(seed, epoch)))


def _batch_indices(step: int, batch_size: int, samples: int, seed: int) -> Tensor:
    """Entries [step * batch_size, (step + 1) * batch_size) of all the epochs' permutations, one after the other."""
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // samples, (stop - 1) // samples + 1)
    indices = torch.cat([_permutation(samples, seed, epoch) for epoch in epochs])
    return indices[start - epochs[0] * samples :][:batch_size]


def _describe(optimizer: torch.optim.Optimizer) -> str:
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"


def _resume(
    path: str | Path | None, stateful: dict[str, Any], run: dict[str, Any]
) -> tuple[int, list[dict[str, float]]]:
    if path is None or not Path(path).exists():
        return 0, []
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        step, history, found = saved["step"], saved["history"], saved["run"]
    except (RuntimeError, OSError, KeyError, TypeError, ValueError, *UNREADABLE) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}): delete it to start over") from error
    differences = [f"{k} = {found.get(k)!r} there, {v!r} here" for k, v in run.items() if found.get(k) != v]
    if differences:
        raise ValueError(f"{path} belongs to another run ({'; '.join(differences)}): delete it or name another file")
    for name, part in stateful.items():
        part.load_state_dict(saved[name])
    return step, history


def _save(
    path: str | Path | None, stateful: dict[str, Any], run: dict[str, Any], step: int, history: list[dict[str, float]]
) -> None:
    """Written beside the old checkpoint and then put in its place: whatever happens, one of the two is whole."""
    if path is None:
        return
    states = {name: part.state_dict() for name, part in stateful.items()}
    with replacing(path) as temporary:
        torch.save({**states, "run": run, "step": step, "history": history}, temporary)


def _line(record: dict[str, float], steps: int) -> str:
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.4f}  "
        f"lr {record['learning_rate']:.2e}  |gradient| {record['gradient_norm']:.3g}  "
        f"{record['samples_per_second']:.0f} samples/s"
    )


def _stop(model: nn.Module, loss: Tensor, step: int, loss_of: Callable[[nn.Module, int], Tensor]) -> None:
    """Find the first layer that went wrong by running the step again, and raise."""
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise FloatingPointError(f"step {step}: parameter {broken[0]!r} is not finite before the update")
    if torch.isfinite(loss):
        names = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        where = f"the gradient of {', '.join(map(repr, names))}" if names else "the norm of the gradient"
        raise FloatingPointError(f"step {step}: the loss is {loss.item():.4g}, but {where} is not finite")
    first: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else [output]
            if not first and any(isinstance(o, Tensor) and not o.isfinite().all() for o in outputs):
                first.append(f"layer {name!r} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            loss_of(model, step)
    finally:
        for hook in hooks:
            hook.remove()
    where = first[0] if first else "the loss itself: the output of every layer is finite"
    raise FloatingPointError(f"step {step}: the loss is {loss.item()}; first not finite is {where}")

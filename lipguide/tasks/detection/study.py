"""The case study, whole: train each configuration, evaluate it clean and attacked, and put all on record.

`python -m lipguide study` runs it, under `torchrun` on several devices. A configuration leaves a checkpoint while it
trains and a file of results when it is done, so a study that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguide.bounds.network import lipschitz_bound
from lipguide.distributed import gathered, rank_and_ranks
from lipguide.files import write_json
from lipguide.provenance import provenance
from lipguide.tasks import weights as pretrained
from lipguide.tasks.detection.attacks import ATTACKS, attacked, strongest
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.configurations import l2_normalised, naive, spectral_norm, standard_conv
from lipguide.tasks.detection.data import Split
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.scores import Score, detections, score
from lipguide.tasks.detection.tinier_ssd import PICTURE, TinierSSD
from lipguide.training import fit

__all__ = [
    "CONFIGURATIONS",
    "PLANS",
    "Plan",
    "configurations",
    "study",
    "weights_of",
]

logger = logging.getLogger(__name__)
EPSILON = 0.5  # the case study's
# Times the plan's rate: with that of the others, spectral-norm was after 600 steps no better than a detector that says
# "background" everywhere. If it cannot learn, that shall not be for want of speed.
FASTER = {"spectral-norm": 5.0}


@dataclass(frozen=True)
class Plan:
    """How much of everything. ``None`` scenes are all; ``width`` is that of the SLL configurations."""

    train_scenes: int | None
    test_scenes: int | None
    attacked_scenes: int | None
    epochs: float
    batch_size: int
    rate: float
    width: int
    attack_steps: int
    precision: str


PLANS = {
    "quick": Plan(256, 64, 16, 2, 16, 2e-3, 8, 3, "float32"),
    "cpu": Plan(None, None, 500, 8, 64, 2e-3, 32, 20, "bfloat16"),
    "full": Plan(None, None, None, 30, 256, 4e-3, 256, 20, "bfloat16"),
}


def configurations(width: int) -> dict[str, Callable[[], TinierSSD]]:
    """What makes each configuration, by its name, with SLL layers of a width.

    >>> list(configurations(8))
    ['naive', 'spectral-norm', 'standard conv', 'L2-normalised']
    """
    return {
        "naive": naive,
        "spectral-norm": spectral_norm,
        "standard conv": partial(standard_conv, width),
        "L2-normalised": partial(l2_normalised, width),
    }


def weights_of(name: str) -> str:
    """The name of the file that a configuration's weights are in.

    >>> weights_of("standard conv")
    'tinier-ssd-standard-conv'
    """
    return "tinier-ssd-" + name.lower().replace(" ", "-")


CONFIGURATIONS = tuple(configurations(8))


def study(
    plan: Plan,
    train: Split,
    test: Split,
    folder: str | Path,
    seed: int = 0,
    only: Sequence[str] = CONFIGURATIONS,
    report: Callable[[str], None] = logger.info,
) -> list[dict[str, Any]]:
    """Train and evaluate the configurations ``only``, and return one entry for each, in the order of the study.

    Under ``torchrun`` every process calls this with the same arguments; all return the same. ``folder`` holds what is
    needed to go on after an interruption; results of another plan or of other scenes there are an error. An entry's
    ``run`` says on what, until when and for how long it ran; it stays with the entry when a later call reads it again.

    On several CUDA devices batch norm goes over the whole batch. torch has no such batch norm for processes on the CPU:
    there each normalises its own share, so that *naive* comes out differently on one and on two of them. The other
    configurations have no batch norm and do not.
    """
    makers = configurations(plan.width)
    unknown = [name for name in only if name not in makers]
    if unknown:
        raise ValueError(f"no configuration {unknown[0]!r}; there are: {', '.join(makers)}")
    return [_one(name, makers[name], plan, train, test, Path(folder), seed, report) for name in makers if name in only]


def _one(
    name: str,
    make: Callable[[], TinierSSD],
    plan: Plan,
    train: Split,
    test: Split,
    folder: Path,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    slug = weights_of(name)
    path, setting = (
        folder / f"{slug}.json",
        {"plan": asdict(plan), "train": train.hash, "test": test.hash, "seed": seed},
    )
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["setting"] != setting:
            raise ValueError(f"{path} belongs to another study ({known['setting']}): remove it or name another folder")
        return known["entry"]
    torch.manual_seed(seed)
    model = make().to(train.images.device, memory_format=torch.channels_last)
    rank, ranks = rank_and_ranks()
    facts = provenance(
        train.images.device.type, seed, ignoring=["book/results"]
    )  # of the code that runs: before it does
    if ranks > 1 and train.images.is_cuda:  # see the docstring of study
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.rate * FASTER.get(name, 1.0))
    step, steps = DetectionStep(model.training_loss()), max(int(len(train.images) * plan.epochs / plan.batch_size), 1)
    precision, checkpoint = getattr(torch, plan.precision), folder / f"{slug}.checkpoint"
    columns = (train.images, *train.targets)
    history = fit(
        model, columns, step, optimizer, steps, plan.batch_size, "one-cycle", precision,
        seed=seed, checkpoint=checkpoint, report=lambda line: report(f"{name}: {line}"),
    )  # fmt: skip
    began = time.perf_counter()
    entry = {"name": name, "parameters": sum(p.numel() for p in model.parameters())}
    entry |= evaluate(model.eval(), plan, test)
    seconds = _seconds(history, plan.batch_size)
    entry |= {"steps": steps, "loss": history[-1]["loss"], "train_seconds": seconds}
    entry |= {"train_scenes_per_second": steps * plan.batch_size / seconds}
    entry["evaluate_seconds"] = time.perf_counter() - began
    entry["run"] = {key: facts[key] for key in ("commit", "lock", "device")}
    entry["run"] |= {"end": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    entry["run"] |= {"seconds": seconds + entry["evaluate_seconds"]}
    report(f"{name}: clean {entry['clean_map50']:.2f}, PGD {entry['pgd_map50']:.2f} mAP")
    if rank == 0:
        run = facts | {"steps": steps, "data": f"{train.name}, {train.hash}", "seconds": seconds} | entry
        pretrained.save(slug, model, run, folder)
        write_json(path, {"setting": setting, "entry": entry})
        checkpoint.unlink(missing_ok=True)
    return entry


def _seconds(history: list[dict[str, float]], batch_size: int) -> float:
    """What training took, also where it was interrupted in between."""
    steps = [0, *(record["step"] for record in history)]
    counts = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    rates = [record["samples_per_second"] for record in history]
    return sum(count * batch_size / rate for count, rate in zip(counts, rates, strict=True))


def evaluate(model: TinierSSD, plan: Plan, test: Split) -> dict[str, Any]:
    """Clean on all scenes; on the first of them under each attack, and under the strongest: the one that does most harm
    for each scene, or one attack for all where that leaves a lower mAP."""
    entry: dict[str, Any] = {"lipschitz_bound": lipschitz_bound(model, (3, PICTURE, PICTURE)).value}
    clean, rate = _scored(model, test, lambda images, targets: images)
    entry |= {"clean_map50": clean.map50, "clean": clean._asdict(), "detect_scenes_per_second": rate}
    few = test.part(slice(plan.attacked_scenes))
    if len(few.images) < len(test.images):
        clean, _ = _scored(model, few, lambda images, targets: images)
    entry["clean_map50_of_attacked_scenes"] = clean.map50
    made: dict[str, list[Tensor]] = {name: [] for name in ("training loss", *ATTACKS)}
    blind = dict.fromkeys(made, 0)
    precision = getattr(torch, plan.precision)

    def attack(name: str, images: Tensor, targets: Targets) -> Tensor:
        # The search may be rough; what it finds lies in the ball to float32, and is scored in float32.
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            moved, unseen = attacked(model, images, targets, EPSILON, name, plan.attack_steps)
        made[name].append(moved)
        blind[name] += unseen
        return moved

    scored = {name: _scored(model, few, partial(attack, name)) for name in made}
    pgd, rate = scored["training loss"]
    entry |= {"pgd_map50": pgd.map50, "pgd": pgd._asdict(), "attack_scenes_per_second": rate}
    entry["attacks_map50"] = {name: one.map50 for name, (one, _) in scored.items()}
    entry["blind_scenes"] = {name: sum(share[name] for share in gathered(blind)) for name in blind}
    turns = zip(*made.values(), strict=True)  # each scoring meets the parts of the scenes in the same order

    def hardest(images: Tensor, targets: Targets) -> Tensor:
        return strongest(model, images, targets, dict(zip(made, next(turns), strict=True)))

    # The picture on which fewest objects are found need not be the one that costs most precision.
    worst = min(_scored(model, few, hardest)[0], *(one for one, _ in scored.values()), key=lambda one: one.map50)
    return entry | {"strongest_map50": worst.map50, "strongest": worst._asdict(), "attacked_scenes": len(few.images)}


def _scored(model: nn.Module, test: Split, change: Callable[[Tensor, Targets], Tensor]) -> tuple[Score, float]:
    """The score of a model on changed pictures, and scenes a second; processes share the scenes."""
    began, size = time.perf_counter(), 128
    rank, ranks = rank_and_ranks()
    found: list[dict[str, Tensor]] = []
    for start in list(range(0, len(test.images), size))[rank::ranks]:
        images, targets, *_ = test.part(slice(start, start + size))
        found += detections(model, change(unit_range(images), targets))
    found = [{key: value.cpu() for key, value in scene.items()} for scene in found]
    shares, starts = gathered(found), range(0, len(test.images), size)
    order = [share[size * turn : size * (turn + 1)] for turn in range(len(starts)) for share in shares]
    rate = len(test.images) / (time.perf_counter() - began)
    return score([scene for part in order for scene in part], test.targets), rate

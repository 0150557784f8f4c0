"""What each command of `python -m lipguide` does.

A command is a function of its options that does its work or raises. It returns 0, or another exit status where it has
said itself what failed. Each imports what it needs when it runs, so that none waits for the tools of another, nor needs
them installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lipguide.deadline import OutOfTime

__all__ = [
    "WrongCall",
    "build_book",
    "certify",
    "compare_bricks",
    "compare_data",
    "compare_readers",
    "download_svhn",
    "find_why",
    "run_study",
    "sweep_losses",
    "train",
    "write_synthetic",
]


class WrongCall(Exception):
    """The command line asks for something that there is not."""


def build_book(options: argparse.Namespace) -> int:
    """Execute the chapters and render the book."""
    from lipguide.book.build import Book, BuildError, build

    try:
        return build(Book(Path.cwd()), options.profile, options.device, options.only)
    except BuildError as error:
        raise WrongCall(error) from error


def download_svhn(options: argparse.Namespace) -> int:
    """Download SVHN."""
    from lipguide import data

    print(data.SVHN_TERMS.rstrip("\n"))
    for folder in data.download_svhn(options.root, extra=options.extra):
        print(f"{folder} is complete")
    return 0


def write_synthetic(options: argparse.Namespace) -> int:
    """Make synthetic house numbers."""
    from lipguide.data import SyntheticHouseNumbers

    for split in options.split:
        scenes = SyntheticHouseNumbers(split, options.size, options.seed, version=options.version)
        where = scenes.save(options.root) if options.root else "the cache"
        print(f"{scenes.name}, {split}: {len(scenes)} scenes in {where}")
    return 0


def compare_data(options: argparse.Namespace) -> int:
    """Measure how like SVHN the twin is."""
    from lipguide.book.ledger import Ledger
    from lipguide.book.likeness import Plan, likeness, report
    from lipguide.distributed import choose_device

    device = choose_device(options.device)
    asked = {name: getattr(options, name) for name in Plan.__dataclass_fields__}
    plan = Plan(**{name: value for name, value in asked.items() if value is not None})
    with _progress_on_stdout(), _one_thread():
        ledger = Ledger("likeness", device.type, device.type, options.seed, folder=options.folder)
        found = likeness(options.svhn, options.split, options.folder, plan, device, options.seed)
    data = found.pop("data")
    ledger.used(data["name"], data["hash"])
    for what, value in found.items():
        ledger[what] = value
    print(report(found))
    print(f"on record: {ledger.save()}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Make weights that ship, or those of a larger recipe."""
    from lipguide import distributed, tasks

    with _progress_on_stdout():
        for name in options.names:
            path = tasks.train(name, options.steps, options.device, options.seed, options.folder)
            if distributed.rank_and_ranks()[0] == 0:
                print(path)
    distributed.finish()
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same trainings give the same weights on any number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress_on_stdout() -> Iterator[None]:
    """What the package logs goes to the terminal."""
    logger, progress = logging.getLogger("lipguide"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(progress)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(progress)
        logger.setLevel(level)


def run_study(options: argparse.Namespace) -> int:
    """Train and attack the four detectors of the case study."""
    import torch

    from lipguide import distributed
    from lipguide.book.ledger import Ledger
    from lipguide.tasks.detection.study import CONFIGURATIONS, EPSILON, PLANS, study

    _check_study(options, list(PLANS), list(CONFIGURATIONS), torch.cuda.is_available())
    device = distributed.start(options.device)
    folder = options.folder or Path("study", options.plan)
    ledger = Ledger("study", options.plan, device.type, options.seed, folder=folder)
    only = options.only or tuple(CONFIGURATIONS)
    with _progress_on_stdout(), _what_is_left(options, folder, only):
        entries = study(options.plan, folder, device.type, options.seed, only, options.data)
    if distributed.rank_and_ranks()[0] == 0:
        data = entries[0]["run"]["data"]
        ledger.used(data["name"], data["hash"])
        ledger["configurations"] = entries
        ledger["epsilon"] = EPSILON
        # What all configurations took, also those that an earlier call trained.
        print(f"on record: {ledger.save(sum(entry['run']['seconds'] for entry in entries))}")
    distributed.finish()
    return 0


def certify(options: argparse.Namespace) -> int:
    """Certify the detector that ships, attack it, and put it on record."""
    from lipguide import distributed, tasks
    from lipguide.book.ledger import Ledger
    from lipguide.tasks.detection.certified import Plan, certified
    from lipguide.tasks.detection.data import load_split

    device = distributed.start(options.device)
    ledger = Ledger("certified", device.type, device.type, 0, folder=options.folder)
    scenes = load_split("test", options.size, tasks.TEST_SEED, device)
    ledger.used(scenes.name, scenes.hash)
    model, made = tasks.trained("detection-reader", device)
    twin, its = tasks.trained("tinier-ssd-naive", device)
    weights = {"weights": made["commit"], "twin": its["commit"]}
    with _progress_on_stdout():
        real = None if options.svhn is None else load_split("train", None, tasks.TEST_SEED, device, options.svhn)
        record = certified(model, twin, scenes, Plan(), options.folder, weights, real)
    for what, value in (record | {"weights": {key: made[key] for key in ("commit", "steps", "seconds")}}).items():
        ledger[what] = value
    print(f"on record: {ledger.save()}")
    return 0


def compare_readers(options: argparse.Namespace) -> int:
    """Find out what each step to the certified detector has gained."""
    from lipguide import tasks
    from lipguide.book.ledger import Ledger
    from lipguide.distributed import choose_device
    from lipguide.tasks.detection.data import load_split
    from lipguide.tasks.detection.trials import trials

    device = choose_device(options.device)
    ledger = Ledger("readers", device.type, device.type, 0, folder=options.folder)
    scenes = load_split("test", None, tasks.TEST_SEED, device)
    ledger.used(scenes.name, scenes.hash)
    with _progress_on_stdout():
        ledger["readers"] = trials(options.folder, scenes)
    print(f"on record: {ledger.save()}")
    return 0


def find_why(options: argparse.Namespace) -> int:
    """Find out why a fully 1-Lipschitz Tinier SSD does not learn."""
    from lipguide.book.ledger import Ledger
    from lipguide.distributed import choose_device
    from lipguide.tasks.detection.unlearnt import CHANGES
    from lipguide.tasks.detection.why import why

    _check_names("change", options.only or [], list(CHANGES))
    device = choose_device(options.device).type
    ledger = Ledger("failed", device, device, options.seed, folder=options.folder)
    with _progress_on_stdout():
        entries = why(options.folder, device, options.seed, options.only or tuple(CHANGES))
    data = entries[0]["run"]["data"]
    ledger.used(data["name"], data["hash"])
    ledger["networks"] = entries
    print(f"on record: {ledger.save(sum(entry['run']['seconds'] for entry in entries))}")
    return 0


def compare_bricks(options: argparse.Namespace) -> int:
    """Compare the bricks, and losses on the best of them."""
    from lipguide.book import cost
    from lipguide.book.ledger import Ledger
    from lipguide.distributed import choose_device
    from lipguide.files import write_json
    from lipguide.tasks.classification.comparison import PLAN, compare, training_steps

    device = choose_device(options.device)
    ledger = Ledger("comparison", device.type, device.type, 0, folder=options.folder)
    timed = options.folder / "costs.json"  # once: the same command goes on with the same steps
    if not timed.exists():
        costs = cost.compare(training_steps(PLAN, device))
        write_json(timed, {brick: (spent.seconds, spent.mebibytes) for brick, spent in costs.items()})
    with _progress_on_stdout():
        record = compare(options.folder, json.loads(timed.read_text(encoding="utf-8")), device)
    print(f"on record: {_with(ledger, record).save()}")
    return 0


def sweep_losses(options: argparse.Namespace) -> int:
    """Measure what the dials of a loss do."""
    from lipguide.book.ledger import Ledger
    from lipguide.distributed import choose_device
    from lipguide.tasks.classification.dials import sweep

    device = choose_device(options.device)
    ledger = Ledger("losses", device.type, device.type, 0, folder=options.folder)
    with _progress_on_stdout():
        record = sweep(options.folder, device)
    # What all runs took, also those of an earlier call.
    print(f"on record: {_with(ledger, record).save(record['seconds'])}")
    return 0


def _with(ledger: Any, record: dict[str, Any]) -> Any:
    """A ledger with all that a record holds; the data that judged are those behind its numbers."""
    for split in record["data"].values():
        ledger.used(split["name"], split["hash"])
    for what, value in record.items():
        ledger[what] = value
    return ledger


@contextmanager
def _what_is_left(options: argparse.Namespace, folder: Path, only: Sequence[str]) -> Iterator[None]:
    """Where the time is up, say how many configurations are not on record yet."""
    from lipguide.tasks.detection.study import weights_of

    try:
        yield
    except OutOfTime as stop:
        records = {name: folder / f"{weights_of(name, options.plan, options.data)}.json" for name in only}
        left = [name for name, record in records.items() if not record.exists()]
        raise OutOfTime(f"{len(left)} of {len(only)} configurations left ({', '.join(left)}); {stop}") from None


def _check_names(what: str, given: Sequence[str], valid: Sequence[str]) -> None:
    for name in given:
        if name not in valid:
            raise WrongCall(f"unknown {what} {name!r}; valid: {', '.join(valid)}")


def _check_study(options: argparse.Namespace, plans: list[str], configurations: list[str], gpu: bool) -> None:
    """What keeps the study from starting as asked, and what would do, before hours are spent."""
    _check_names("plan", [options.plan], plans)
    _check_names("configuration", options.only or [], configurations)
    if gpu:
        return
    if options.device == "cuda":
        raise WrongCall("torch sees no CUDA device; --plan cpu --device cpu runs the study without one, in hours")
    if options.plan == "full" and options.device == "auto":
        raise WrongCall(
            "torch sees no CUDA device, and plan full takes days without: take --plan cpu, or insist by --device cpu"
        )

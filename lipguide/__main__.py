"""The command line: `python -m lipguide` with `build`, `data`, `train`, `study`, `certify`, `why`, `compare`, `losses`.

A command is a function of its options that does its work or raises; here, and nowhere else, an error becomes one line
and an exit status: 0 well, 1 something failed, 2 wrongly called, 75 not finished when the time of `--minutes` was up,
130 interrupted. Each command imports what it needs when it runs, so that none waits for the tools of another, nor needs
them installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from lipguide.deadline import OutOfTime, limit

__all__ = ["main"]

PROGRAM = "python -m lipguide"
AGAIN = 75  # what mail programs and queues know as "not now, try again"
Command = Callable[[argparse.Namespace], int]  # returns 0, or 1 or 75 where it has said itself what failed or is left


class WrongCall(Exception):
    """The command line asks for something that there is not."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, _line(self.prog, message))


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: those of the command line if None.
    """
    options = _parser().parse_args(arguments)
    try:
        with _stopped_like_ctrl_c(), _limit(options):
            return options.run(options)
    except KeyboardInterrupt:
        return _failed(options, 130, "interrupted; what is whole is kept, and the same command goes on from there")
    except OutOfTime as stop:
        return _failed(options, AGAIN, f"not finished: {stop}; the same command goes on from there")
    except WrongCall as error:
        return _failed(options, 2, error)
    except ModuleNotFoundError as error:
        return _failed(options, 1, f"{error}; the README says which parts of lipguide need what")
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        return _failed(options, 1, error)


def _limit(options: argparse.Namespace) -> AbstractContextManager[None]:
    minutes = getattr(options, "minutes", None)
    return nullcontext() if minutes is None else limit(minutes)


def _failed(options: argparse.Namespace, status: int, error: object) -> int:
    sys.stderr.write(_line(options.program, str(error) or type(error).__name__))
    return status


def _line(program: str, message: str) -> str:
    """One line for the terminal, however many the message has."""
    return f"{program}: {' '.join(message.split())}\n"


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """A stop asked for by the system ends like Ctrl-C: kernels are shut down, temporary files go."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="1-Lipschitz neural networks: build the book, train, get the data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_build(commands)
    _add_data(commands)
    _add_train(commands)
    _add_study(commands)
    _add_certify(commands)
    _add_why(commands)
    _add_compare(commands)
    _add_losses(commands)
    return parser


def _add(commands: Any, name: str, run: Command, says: str) -> Parser:
    parser = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=run, program=parser.prog)
    return parser


def _add_build(commands: Any) -> None:
    parser = _add(commands, "build", _build, "execute the chapters and render the book")
    parser.add_argument("--profile", default="quick", help="quick (two CPU cores, minutes) or full (the real training)")
    _add_device(parser)
    parser.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute these chapters alone")
    _add_minutes(parser)


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="download SVHN, write the synthetic twin, compare the two")
    sets = data.add_subparsers(required=True, metavar="SET", parser_class=Parser)
    svhn = _add(sets, "svhn", _svhn, "download SVHN (non-commercial use only)")
    svhn.add_argument("--root", required=True, help="folder that train/ and test/ go into")
    svhn.add_argument("--extra", action="store_true", help="also the 531,131 digits of extra/ (2 GB)")
    synthetic = _add(sets, "synthetic", _synthetic, "make synthetic house numbers, in the cache or in a folder")
    synthetic.add_argument("--root", help="write pictures, masks and digitStruct.mat there, as SVHN has them")
    synthetic.add_argument("--split", nargs="+", choices=("train", "test"), default=["train", "test"])
    synthetic.add_argument("--size", type=int, help="scenes a split (default: as many as SVHN has)")
    _add_seed(synthetic)
    compare = _add(sets, "compare", _compare, "how like SVHN the twin is: read and find real digits, compare the looks")
    compare.add_argument("--svhn", required=True, help="folder that holds SVHN's test/, or train/ with --split train")
    compare.add_argument("--split", choices=("train", "test"), default="test", help="of the real pictures")
    compare.add_argument("--size", type=int, help="synthetic scenes a split (default: as many as SVHN has)")
    compare.add_argument("--epochs", type=int, default=12)
    compare.add_argument("--record", type=Path, help="a JSON file that the figures go into as well")
    _add_device(compare)
    _add_seed(compare)


def _add_train(commands: Any) -> None:
    parser = _add(commands, "train", _train, "make the weights that ship with the package, alone or under torchrun")
    parser.add_argument("names", nargs="+", metavar="NAME", help="the weights to make, such as classification-vgg")
    parser.add_argument("--steps", type=int, help="updates (default: as many as the recipe asks)")
    parser.add_argument("--folder", help="where the file goes (default: into the package, or study/full for NAME-full)")
    _add_minutes(parser)
    _add_device(parser)
    _add_seed(parser)


def _add_study(commands: Any) -> None:
    parser = _add(commands, "study", _study, "the whole case study: train and attack four detectors")
    parser.add_argument("--plan", default="full", help="full (a GPU; the default), cpu (hours), quick (a minute)")
    parser.add_argument("--only", nargs="+", metavar="CONFIGURATION", help="these configurations alone")
    parser.add_argument("--data", default="house-numbers", help="svhn: the real scenes, which must lie in data/svhn")
    parser.add_argument("--folder", type=Path, help="checkpoints, weights and results (default: study/PLAN)")
    _add_minutes(parser)
    _add_device(parser)
    _add_seed(parser)


def _add_certify(commands: Any) -> None:
    parser = _add(commands, "certify", _certify, "certify the detector that ships, attack it, and put it on record")
    parser.add_argument("--size", type=int, help="pictures of the test split (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("study"), help="where the record goes (default: study)")
    _add_device(parser)


def _add_why(commands: Any) -> None:
    says = "why a fully 1-Lipschitz Tinier SSD does not learn: seven variants learn ten scenes by heart"
    parser = _add(commands, "why", _why, says)
    parser.add_argument("--only", nargs="+", metavar="CHANGE", help="these variants alone, in this order")
    parser.add_argument("--folder", type=Path, default=Path("study", "why"), help="weights and results (study/why)")
    _add_minutes(parser)
    _add_device(parser)
    _add_seed(parser)


def _add_compare(commands: Any) -> None:
    says = (
        "which brick to take: seven classifiers of one size learn for the same seconds, and the best with other losses"
    )
    parser = _add(commands, "compare", _compare_bricks, says)
    parser.add_argument("--folder", type=Path, default=Path("study", "compare"), help="runs and record (study/compare)")
    _add_minutes(parser)
    _add_device(parser)


def _add_losses(commands: Any) -> None:
    says = "what the dials of a loss do: a small network learns with some thirty settings, each with three seeds"
    parser = _add(commands, "losses", _losses, says)
    parser.add_argument("--folder", type=Path, default=Path("study", "losses"), help="runs and record (study/losses)")
    _add_minutes(parser)
    _add_device(parser)


def _add_minutes(parser: Parser) -> None:
    says = "stop before they are over, so that the same command goes on later"
    parser.add_argument("--minutes", type=_minutes, metavar="N", help=f"{says} (exit status {AGAIN})")


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise ValueError(text)  # argparse says which option has an invalid value
    return minutes


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there is one")


def _add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=int, default=0)


# -- commands ---------------------------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    from lipguide.book.build import Book, BuildError, build

    try:
        return build(Book(Path.cwd()), options.profile, options.device, options.only)
    except BuildError as error:
        raise WrongCall(error) from error


def _svhn(options: argparse.Namespace) -> int:
    from lipguide import data

    print(data.SVHN_TERMS.rstrip("\n"))
    for folder in data.download_svhn(options.root, extra=options.extra):
        print(f"{folder} is complete")
    return 0


def _synthetic(options: argparse.Namespace) -> int:
    from lipguide.data import SyntheticHouseNumbers

    for split in options.split:
        scenes = SyntheticHouseNumbers(split, options.size, options.seed)
        where = scenes.save(options.root) if options.root else "the cache"
        print(f"{split}: {len(scenes)} scenes in {where}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from lipguide.book.likeness import likeness, report
    from lipguide.distributed import choose_device
    from lipguide.files import write_json
    from lipguide.provenance import provenance

    device = choose_device(options.device)
    made_by = provenance(device, options.seed)
    found = likeness(options.svhn, options.split, options.size, options.epochs, device, options.seed)
    print(report(found))
    if options.record:
        write_json(options.record, {"provenance": made_by, "results": found})
    return 0


def _train(options: argparse.Namespace) -> int:
    from lipguide import distributed, tasks

    with _progress_on_stdout():
        for name in options.names:
            path = tasks.train(name, options.steps, options.device, options.seed, options.folder)
            if distributed.rank_and_ranks()[0] == 0:
                print(path)
    distributed.finish()
    return 0


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


def _study(options: argparse.Namespace) -> int:
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


def _certify(options: argparse.Namespace) -> int:
    from lipguide import distributed, tasks
    from lipguide.book.ledger import Ledger
    from lipguide.tasks.detection.certified import Plan, certified
    from lipguide.tasks.detection.data import load_split

    device = distributed.start(options.device)
    ledger = Ledger("certified", device.type, device.type, 0, folder=options.folder)
    scenes = load_split("test", options.size, tasks.TEST_SEED, device)
    ledger.used(scenes.name, scenes.hash)
    model, made = tasks.trained("detection-reader", device)
    twin, _ = tasks.trained("tinier-ssd-naive", device)
    with _progress_on_stdout():
        record = certified(model, twin, scenes, Plan())
    for what, value in (record | {"weights": {key: made[key] for key in ("commit", "steps", "seconds")}}).items():
        ledger[what] = value
    print(f"on record: {ledger.save()}")
    return 0


def _why(options: argparse.Namespace) -> int:
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


def _compare_bricks(options: argparse.Namespace) -> int:
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


def _losses(options: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())

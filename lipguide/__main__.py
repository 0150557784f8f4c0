"""The command line: `python -m lipguide` with `build`, `data`, `train`, `study`, `certify`, `why`, `compare`, `losses`.

What each of them does is in `lipguide.commands`. Here are their options, and here, and nowhere else, an error becomes
one line and an exit status: 0 well, 1 something failed, 2 wrongly called, 75 not finished when the time of `--minutes`
was up, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from lipguide import commands
from lipguide.deadline import OutOfTime, limit

__all__ = ["main"]

PROGRAM = "python -m lipguide"
AGAIN = 75  # what mail programs and queues know as "not now, try again"
VERSIONS = (1, 2, 3)  # of the twin: those of `lipguide.data.shn.looks`, which takes a second to import
Command = Callable[[argparse.Namespace], int]  # returns 0, or 1 or 75 where it has said itself what failed or is left


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
    except commands.WrongCall as error:
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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_build(subparsers)
    _add_data(subparsers)
    _add_train(subparsers)
    _add_study(subparsers)
    _add_certify(subparsers)
    _add_readers(subparsers)
    _add_why(subparsers)
    _add_compare(subparsers)
    _add_losses(subparsers)
    return parser


def _add(subparsers: Any, name: str, run: Command, says: str) -> Parser:
    parser = subparsers.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=run, program=parser.prog)
    return parser


def _add_build(subparsers: Any) -> None:
    parser = _add(subparsers, "build", commands.build_book, "execute the chapters and render the book")
    parser.add_argument("--profile", default="quick", help="quick (two CPU cores, minutes) or full (the real training)")
    _add_device(parser)
    parser.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute these chapters alone")
    _add_minutes(parser)


def _add_data(subparsers: Any) -> None:
    data = subparsers.add_parser("data", help="download SVHN, write the synthetic twin, compare the two")
    sets = data.add_subparsers(required=True, metavar="SET", parser_class=Parser)
    svhn = _add(sets, "svhn", commands.download_svhn, "download SVHN (non-commercial use only)")
    svhn.add_argument("--root", required=True, help="folder that train/ and test/ go into")
    svhn.add_argument("--extra", action="store_true", help="also the 531,131 digits of extra/ (2 GB)")
    synthetic = _add(
        sets, "synthetic", commands.write_synthetic, "make synthetic house numbers, in the cache or in a folder"
    )
    synthetic.add_argument("--root", help="write pictures, masks and digitStruct.mat there, as SVHN has them")
    synthetic.add_argument("--split", nargs="+", choices=("train", "test"), default=["train", "test"])
    synthetic.add_argument("--size", type=int, help="scenes a split (default: as many as SVHN has)")
    synthetic.add_argument("--version", type=int, choices=VERSIONS, default=VERSIONS[-1], help="of the twin (the last)")
    _add_seed(synthetic)
    compare = _add(
        sets,
        "compare",
        commands.compare_data,
        "how like SVHN the twin is: read and find real digits, compare the looks",
    )
    compare.add_argument("--svhn", required=True, help="folder that holds SVHN's test/, or train/ with --split train")
    compare.add_argument("--split", choices=("train", "test"), default="test", help="of the real pictures")
    compare.add_argument(
        "--versions", type=int, nargs="+", choices=VERSIONS, help="of the twin, to learn from and be tested on (all)"
    )
    compare.add_argument("--size", type=int, help="synthetic scenes that networks are tested on (2000)")
    compare.add_argument("--lessons", type=int, help="synthetic scenes that a small network learns from (12000)")
    compare.add_argument("--epochs", type=int, help="how often it sees them (12)")
    compare.add_argument("--classifier-steps", type=int, help="of a classifier trained here (default: the recipe's)")
    compare.add_argument("--detector-steps", type=int, help="of a detector trained here (default: the recipe's)")
    compare.add_argument("--seeds", type=int, help="by how many seeds the classifier learns (1)")
    compare.add_argument("--attacked", type=int, help="scenes that are attacked (250)")
    compare.add_argument("--attack-steps", type=int, help="of the attack (20)")
    compare.add_argument(
        "--folder", type=Path, default=Path("study", "likeness"), help="for what is trained, and for the record"
    )
    _add_device(compare)
    _add_seed(compare)


def _add_train(subparsers: Any) -> None:
    parser = _add(
        subparsers, "train", commands.train, "make the weights that ship with the package, alone or under torchrun"
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="the weights to make, such as classification-vgg")
    parser.add_argument("--steps", type=int, help="updates (default: as many as the recipe asks)")
    parser.add_argument("--folder", help="where the file goes (default: into the package, or study/full for NAME-full)")
    _add_minutes(parser)
    _add_device(parser)
    _add_seed(parser)


def _add_study(subparsers: Any) -> None:
    parser = _add(subparsers, "study", commands.run_study, "the whole case study: train and attack four detectors")
    parser.add_argument("--plan", default="full", help="full (a GPU; the default), cpu (hours), quick (a minute)")
    parser.add_argument("--only", nargs="+", metavar="CONFIGURATION", help="these configurations alone")
    parser.add_argument("--data", default="house-numbers", help="svhn: the real scenes, which must lie in data/svhn")
    parser.add_argument("--folder", type=Path, help="checkpoints, weights and results (default: study/PLAN)")
    _add_minutes(parser)
    _add_device(parser)
    _add_seed(parser)


def _add_certify(subparsers: Any) -> None:
    parser = _add(
        subparsers, "certify", commands.certify, "certify the detector that ships, attack it, and put it on record"
    )
    parser.add_argument("--size", type=int, help="pictures of the test split (default: all)")
    parser.add_argument("--svhn", help="folder that holds train/ of SVHN, or some of it: certify these scenes as well")
    parser.add_argument("--folder", type=Path, default=Path("study"), help="where the record goes (default: study)")
    _add_minutes(parser)
    _add_device(parser)


def _add_readers(subparsers: Any) -> None:
    says = "what each step to the certified detector has gained: its second training, a handicap, and fewer rivals"
    _add_record(subparsers, "readers", commands.compare_readers, says)


def _add_why(subparsers: Any) -> None:
    says = "why a fully 1-Lipschitz Tinier SSD does not learn: seven variants learn ten scenes by heart"
    parser = _add_record(subparsers, "why", commands.find_why, says)
    parser.add_argument("--only", nargs="+", metavar="CHANGE", help="these variants alone, in this order")
    _add_seed(parser)


def _add_compare(subparsers: Any) -> None:
    says = (
        "which brick to take: seven classifiers of one size learn for the same seconds, and the best with other losses"
    )
    _add_record(subparsers, "compare", commands.compare_bricks, says)


def _add_losses(subparsers: Any) -> None:
    says = "what the dials of a loss do: a small network learns with some forty settings, each with three seeds"
    _add_record(subparsers, "losses", commands.sweep_losses, says)


def _add_record(subparsers: Any, name: str, command: Command, says: str) -> Parser:
    """A command that trains and puts what it finds on record, in a folder of its own."""
    parser = _add(subparsers, name, command, says)
    folder = Path("study", name)
    parser.add_argument("--folder", type=Path, default=folder, help=f"for what is trained, and the record ({folder})")
    _add_minutes(parser)
    _add_device(parser)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())

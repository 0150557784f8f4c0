"""The command line: `python -m lipguide` with `build`, `data`, `train` or `study`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn

from lipguide.data.cli import add_commands
from lipguide.tasks.detection.cli import add_arguments as _add_study

__all__ = ["main"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 well, 1 something failed, 2 wrongly called, 130 interrupted."""
    options = _parser().parse_args(arguments)
    # A stop asked for by the system ends like Ctrl-C: kernels are shut down, temporary files go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="python -m lipguide", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    build = commands.add_parser("build", help="execute the chapters and render the book")
    build.add_argument("--profile", default="quick", help="quick (two CPU cores, minutes) or full (the real training)")
    build.add_argument("--device", default="auto", help="auto, cpu or cuda")
    build.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute these chapters alone")
    build.set_defaults(run=_build)
    data = commands.add_parser("data", help="download SVHN, write the synthetic twin, compare the two")
    add_commands(data.add_subparsers(required=True, metavar="SET", parser_class=Parser))
    train = commands.add_parser("train", help="make the weights that ship with the package")
    train.add_argument("names", nargs="+", metavar="NAME", help="the weights to make, such as classification-vgg")
    train.add_argument("--steps", type=int, help="updates (default: as many as the recipe asks)")
    train.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--folder", help="where the file goes (default: into the package, or study/full for NAME-full)")
    train.set_defaults(run=_train)
    _add_study(commands.add_parser("study", help="the whole case study: train and attack four detectors"))
    return parser


def _build(options: argparse.Namespace) -> int:
    # Imported here: the other commands should not wait for papermill, nor need it installed.
    from lipguide.book.build import Book, BuildError, build

    try:
        return build(Book(Path.cwd()), options.profile, options.device, options.only)
    except BuildError as error:
        print(f"python -m lipguide build: {error}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace) -> int:
    from lipguide import distributed, tasks

    logger, progress = logging.getLogger("lipguide"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(progress)
    logger.setLevel(logging.INFO)
    try:
        for name in options.names:
            path = tasks.train(name, options.steps, options.device, options.seed, options.folder)
            if distributed.rank_and_ranks()[0] == 0:
                print(path)
    except (FloatingPointError, RuntimeError, ValueError, OSError) as error:
        print(f"python -m lipguide train: {error}", file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(progress)
        logger.setLevel(level)
    distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())

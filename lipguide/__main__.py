"""The command line: `python -m lipguide` with `build`, `data`, `train` or `study`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from lipguide.data.cli import add_commands
from lipguide.tasks.detection.cli import add_arguments as _add_study
from lipguide.tasks.task import add_arguments

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
    add_arguments(commands.add_parser("train", help="make the weights that ship with the package"))
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


if __name__ == "__main__":
    sys.exit(main())

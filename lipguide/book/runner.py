"""One chapter under papermill, within its time.

    python -m lipguide.book.runner SOURCE NOTEBOOK PARAMETERS

is one chapter in a process of its own, so that several can be at work side by side: papermill changes the folder that
its process works in, and kernels inherit their stderr from it. It imports little, for every chapter waits for it.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError
from papermill.exceptions import PapermillExecutionError

from lipguide import deadline

__all__ = ["Ended", "main"]


@dataclass(frozen=True)
class Ended:
    """How a chapter ended: what went wrong, or what keeps it from being finished; both are empty if all is well.

    `heard` says whether a cell wrote to stderr.
    """

    problem: str = ""
    unfinished: str = ""
    heard: bool = False


def main(arguments: Sequence[str]) -> None:
    """Execute a chapter here and print how it ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the kernel is shut down
    source, path, parameters = arguments
    ended = _execute(Path(source), path, json.loads(parameters))
    sys.stdout.write(f"{json.dumps(asdict(ended))}\n")


def _execute(source: Path, path: str, parameters: dict[str, object]) -> Ended:
    options = {"kernel_name": "python3", "progress_bar": False, "cwd": str(source.parent)}
    if not math.isinf(deadline.left()):
        options["timeout_func"] = _what_is_left
    try:
        papermill.execute_notebook(path, path, parameters, **options)
    except PapermillExecutionError as error:
        if error.ename == deadline.OutOfTime.__name__:
            return Ended(unfinished=_first_line(error.evalue))
        return Ended(f"code cell {error.exec_count - 1} raised {error.ename}: {_first_line(error.evalue)}")
    except CellTimeoutError:
        return Ended(unfinished="it ran when the time was up, and starts over")
    return Ended()


def _what_is_left(cell: nbformat.NotebookNode) -> float:
    """Seconds that a cell may take: until the time is up, and some more, for trainings stop by themselves then."""
    return max(deadline.left() + deadline.grace(), 0.1)


def _first_line(text: str) -> str:
    """The first line of a message that says something.

    >>> _first_line(" no such file")
    'no such file'
    """
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "(no message)")


if __name__ == "__main__":
    main(sys.argv[1:])

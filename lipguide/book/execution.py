"""One chapter executed, in a process of its own (`runner`). What goes to stderr is in a log instead of on the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jupytext
import nbformat

from lipguide.book.runner import Ended
from lipguide.files import replacing

__all__ = [
    "Ended",
    "LedgerBefore",
    "as_written_now",
    "code_cells",
    "not_run",
    "run",
    "stop",
    "write_notebook",
]

# How Python writes a warning: the file that it is laid to, its line, its kind. A file of ours is one of the package or,
# by the name that the kernel gives it, a cell.
PACKAGE = re.escape(str(Path(__file__).resolve().parents[1]))
OURS = re.compile(rf"^(?:{PACKAGE}/.*|\S*/ipykernel_\d+/\d+)\.py:\d+: \w*Warning: .*$", re.MULTILINE)


BLANK = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 60" width="480" height="60">
<rect width="480" height="60" fill="white" stroke="#6E6E6E"/>
<text x="240" y="35" text-anchor="middle" font-family="sans-serif" font-size="14">The chapter has not run yet.</text>
</svg>
"""


def run(source: Path, path: Path, parameters: dict[str, object], log: Path, threads: int | None = None) -> Ended:
    """Execute a chapter into the notebook `path`, in a process of its own.

    A chapter fails where a cell raises. What its cells and its kernel write to stderr goes into the log; under
    continuous integration (the variable CI is set) a warning that is laid to lipguide or to a cell fails the chapter.

    Cells are counted as in the source, without the one that papermill injects before them.

    Args:
        threads: that the kernel computes with; those of the environment if None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_notebook(jupytext.read(source), path)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        ended = _apart([str(source), str(path), json.dumps(parameters)], file, threads)
    if ended.problem or ended.unfinished:
        return ended
    said = _move_stderr(path, log)
    ours = OURS.search(said)
    if ours and os.environ.get("CI"):
        return Ended(f"a warning of our own: {ours.group()}")
    return Ended(heard=bool(said))


@dataclass(frozen=True)
class LedgerBefore:
    """A ledger as it was before its chapter ran."""

    path: Path
    content: bytes | None
    mark: tuple[int, int] | None

    @classmethod
    def of(cls, path: Path) -> LedgerBefore:
        return cls(path, path.read_bytes() if path.exists() else None, _mark(path))

    def is_still_there(self) -> bool:
        return _mark(self.path) in (None, self.mark)

    def put_back(self) -> None:
        if _mark(self.path) == self.mark:
            return
        if self.content is None:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as temporary:
            temporary.write_bytes(self.content)


def _mark(path: Path) -> tuple[int, int] | None:
    """Which file this is: each save makes a new one, also where the numbers are the same."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


# -- in a process of its own ------------------------------------------------------------------------------------------

RUNNER = Ended.__module__
_AT_WORK: set[subprocess.Popen[str]] = set()
# The allocator of glibc returns every large tensor to the system at once. Taking the same memory again was 6 to 14 % of
# the trainings that were measured. Large pages (as Linux lends them to those who ask) were another 6 %.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# A kernel runs this file first. It looks for garbage less often, for that was a sixth of the time of all imports.
STARTS = {"PYTHONSTARTUP": str(Path(__file__).with_name("kernel.py"))}


def _apart(arguments: Sequence[str], stderr: IO[str], threads: int | None) -> Ended:
    environment = KEEPS_MEMORY | STARTS | os.environ
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", RUNNER, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True)
    _AT_WORK.add(process)
    said, _ = process.communicate()
    _AT_WORK.discard(process)
    if process.returncode:
        return Ended(f"its process ended with status {process.returncode}")
    return Ended(**json.loads(said.splitlines()[-1]))


def stop() -> None:
    """Ask the chapters that are at work to end, each once; their `run` returns then, with a problem."""
    for process in list(_AT_WORK):
        _AT_WORK.discard(process)
        process.terminate()


# -- notebooks --------------------------------------------------------------------------------------------------------


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook, whole or not at all."""
    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)


def _move_stderr(path: Path, log: Path) -> str:
    """Take what the cells wrote to stderr out of a notebook into its log, and return it.

    The log has what the kernel itself complains about already.
    """
    notebook = nbformat.read(path, as_version=4)
    said = ""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        heard = [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
        if heard:
            said += f"-- code cell {cell.execution_count - 1}\n" + "".join(output.text for output in heard)
            cell.outputs = [output for output in outputs if output not in heard]
    if said:
        write_notebook(notebook, path)
        with open(log, "a", encoding="utf-8") as file:
            file.write(said)
    return said


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells of a notebook that hold code, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def not_run(source: Path) -> nbformat.NotebookNode:
    """A chapter without its outputs. Blank frames stand for its figures, for the text speaks of them by number."""
    notebook = jupytext.read(source, fmt="md:myst")
    for cell in code_cells(notebook):
        if "figure" in cell.metadata.get("mystnb", {}):
            cell.outputs = [nbformat.v4.new_output("display_data", {"image/svg+xml": BLANK})]
    return _with_settled_names(notebook)


def as_written_now(source: Path, executed: Path) -> nbformat.NotebookNode:
    """Today's text, captions included, around the outputs of a run with the same code.

    Args:
        source: the chapter.
        executed: the notebook of its run.
    """
    today, ran = jupytext.read(source, fmt="md:myst"), nbformat.read(executed, as_version=4)
    for cell, then in zip(code_cells(today), code_cells(ran), strict=True):
        cell.source, cell.outputs, cell.execution_count = then.source, then.outputs, then.execution_count
    today.metadata = ran.metadata
    return _with_settled_names(today)


def _with_settled_names(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Cells are named by chance otherwise, and then every rendering would be another one."""
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"
    return notebook

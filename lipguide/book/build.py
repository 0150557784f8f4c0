"""Build the book: every chapter is executed with papermill, then Jupyter Book renders what came out.

    book/*.md ──jupytext──▶ notebook ──papermill──▶ _build/notebooks ──Jupyter Book──▶ _build/html

Two chapters run side by side on a CPU, where each has half of the cores: most of their work is too small for more.
Everything is written under a temporary name and renamed when it is whole, so an interruption at any moment leaves
either the old state or the new one. An executed notebook carries the hash of all that it depends on, and runs again
only when that changes. Prose is not among it: the text of today is set around the outputs of the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml
from tqdm import tqdm

from lipguide import deadline
from lipguide.book.contents import pages_of
from lipguide.book.execution import LedgerBefore, as_written_now, code_cells, not_run, run, stop, write_notebook
from lipguide.book.ledger import PROFILES, read
from lipguide.book.staleness import chapter_key, file_hash, modules_behind, records_read
from lipguide.distributed import choose_device
from lipguide.provenance import cores, device_name, lock_hash

__all__ = ["PROFILES", "Book", "BuildError", "build"]

SEED = 0
AT_ONCE = {"cpu": 2, "cuda": 1}  # chapters that run side by side


class BuildError(Exception):
    """Something that a reader can mend: one line for the terminal."""


# One pass over the book and out: to look for garbage would be a sixth of the time.
JUPYTER_BOOK = "import gc; gc.disable(); from jupyter_book.cli.main import main; main()"


@dataclass(frozen=True)
class Outcome:
    """How one chapter went; `problem` and `unfinished` are empty when all is well, `log` unless a cell used stderr."""

    chapter: str
    seconds: float
    state: str
    problem: str = ""
    unfinished: str = ""
    log: str = ""


class Book:
    """The sources of a book and the places where its parts are built.

    Args:
        root: the folder with _config.yml and _toc.yml.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        for name in ("_config.yml", "_toc.yml"):
            if not (self.root / name).exists():
                raise BuildError(f"{self.root} holds no {name}; run this from the root of the book's repository")
        self.out = self.root / "_build"
        self.notebooks, self.failed, self.stage = self.out / "notebooks", self.out / "failed", self.out / "stage"
        self.html = self.out / "html"
        self.pages = pages_of(self.root)
        for page in self.pages:
            if not self.source(page).exists():
                raise BuildError(f"_toc.yml names {page}, but there is no {page}.md")
        self.chapters = {Path(p).name: p for p in self.pages if _has_code(self.source(p))}

    def source(self, page: str) -> Path:
        return self.root / f"{page}.md"

    def executed(self, chapter: str, profile: str) -> Path:
        return self.notebooks / f"{chapter}.{profile}.ipynb"

    def log(self, chapter: str, profile: str) -> Path:
        return self.out / "logs" / f"{chapter}.{profile}.log"

    def ledger(self, chapter: str, profile: str) -> Path:
        return self.root / "book" / "results" / f"{chapter}.{profile}.json"


def build(book: Book, profile: str = "quick", device: str = "auto", only: list[str] | None = None) -> int:
    """Execute what has changed, render, and return the exit status: 0, or 1 if any chapter or the rendering failed.

    Args:
        book: the book.
        profile: "quick" for two CPU cores and two minutes a chapter, "full" for the real training.
        device: "cpu", "cuda" or "auto".
        only: the chapters to execute; all if None.

    Raises `lipguide.deadline.OutOfTime` where a time limit is set and something is left when it passes.
    """
    _check(profile, PROFILES, "profile")
    for name in only or []:
        _check(name, tuple(book.chapters), "chapter")
    try:
        device = choose_device(device).type
    except ValueError as error:
        raise BuildError(error) from error
    with _alone(book):
        outcomes = _execute_all(book, profile, device, only or list(book.chapters))
        problems = [o for o in outcomes if o.problem]
        if problems:
            print(f"{len(problems)} of {len(outcomes)} chapters failed; the last good HTML stays as it was:")
            for outcome in problems:
                print(f"  {outcome.problem}")
            return 1
        left = [f"{o.chapter} ({o.unfinished})" for o in outcomes if o.unfinished]
        if left:
            raise deadline.OutOfTime(f"{len(left)} of {len(outcomes)} chapters left: {', '.join(left)}")
        return _render(book, profile, device)


def _check(value: str, valid: tuple[str, ...], what: str) -> None:
    if value not in valid:
        raise BuildError(f"unknown {what} {value!r}; valid: {', '.join(valid)}")


@contextlib.contextmanager
def _alone(book: Book) -> Iterator[None]:
    """One build at a time in a folder."""
    book.out.mkdir(exist_ok=True)
    with open(book.out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"another build is at work in {book.out}; wait for it or stop it") from None
        yield


def _has_code(path: Path) -> bool:
    return "{code-cell}" in path.read_text(encoding="utf-8")


def _execute_all(book: Book, profile: str, device: str, chapters: list[str]) -> list[Outcome]:
    """Run what has changed, as many chapters at a time as suits the device, and say how each of them went."""
    outcomes = [Outcome(name, 0.0, "unchanged") for name in chapters if _is_true(book, name, profile, device)]
    for outcome in outcomes:
        _say(outcome)
    unchanged = {outcome.chapter for outcome in outcomes}
    changed = [name for name in _longest_first(book, profile, chapters) if name not in unchanged]
    bar = tqdm(total=len(chapters), initial=len(outcomes), disable=None, unit="chapter", leave=False)
    with bar, ThreadPoolExecutor(AT_ONCE[device]) as pool:
        futures = [
            pool.submit(_execute, book, name, profile, device, is_first=place == 0)
            for place, name in enumerate(changed)
        ]
        try:
            for future in as_completed(futures):
                outcomes.append(future.result())
                bar.clear()
                _say(outcomes[-1])
                bar.update()
        except BaseException:
            _stop(futures)
            raise
    return sorted(outcomes, key=lambda outcome: chapters.index(outcome.chapter))


def _say(outcome: Outcome) -> None:
    said = f"   stderr: {outcome.log}" if outcome.log else ""
    print(f"{outcome.chapter:<16} {outcome.state:<10} {outcome.seconds:7.1f} s{said}", flush=True)


def _longest_first(book: Book, profile: str, chapters: list[str]) -> list[str]:
    """The order in which chapters that run side by side are done soonest, as far as their last runs tell."""
    ledgers = {name: book.ledger(name, profile) for name in chapters}
    took = {name: read(path)["provenance"]["seconds"] for name, path in ledgers.items() if path.exists()}
    return sorted(chapters, key=lambda name: -took.get(name, 0))


def _stop(futures: list[Future[Outcome]]) -> None:
    """Begin no other chapter, and end those that run; what they have half done is put back."""
    for future in futures:
        future.cancel()
    while any(future.running() for future in futures):
        stop()  # again, for one may just be beginning
        wait(futures, timeout=0.2)


def _execute(book: Book, chapter: str, profile: str, device: str, is_first: bool) -> Outcome:
    """Run one chapter, unless the time that is left is too short."""
    began = time.perf_counter()
    target, ledger = book.executed(chapter, profile), book.ledger(chapter, profile)
    key = _key(book, chapter, profile, device)
    waits = _waits(ledger, device, is_first)
    if waits:
        return Outcome(chapter, time.perf_counter() - began, "left", unfinished=waits)
    failed = book.failed / f"{chapter}.{profile}.ipynb"
    before = LedgerBefore.of(ledger)
    log = book.log(chapter, profile)
    try:
        ended = run(book.source(book.chapters[chapter]), failed, _parameters(profile, device), log, _threads(device))
        problem = ended.problem
        if not problem and not ended.unfinished and before.is_still_there():
            problem = f"it ran, but saved no {ledger.name}"
        if not problem and not ended.unfinished:
            _keep(failed, target, {"key": key, "ledger": file_hash(ledger)})
            before = None
    finally:  # what a run that failed or was interrupted has saved must not be printed by the text of another run
        if before is not None:
            before.put_back()
    seconds = time.perf_counter() - began
    if problem:
        return Outcome(chapter, seconds, "FAILED", f"{chapter}: {problem}; see {failed.relative_to(book.root)}")
    if ended.unfinished:
        failed.unlink()
        return Outcome(chapter, seconds, "left", unfinished=ended.unfinished)
    return Outcome(chapter, seconds, "executed", log=str(log.relative_to(book.root)) if ended.heard else "")


def _threads(device: str) -> int | None:
    """That a chapter computes with: its share of the cores, if nobody has said how many."""
    if AT_ONCE[device] == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, (cores() or 1) // AT_ONCE[device])


def _waits(ledger: Path, device: str, is_first: bool) -> str:
    """Why a chapter is not begun in the time that is left, or nothing.

    The first one is begun in any case: it has the whole time, and more there will not be. Its trainings keep what they
    have reached.
    """
    left = deadline.left()
    if math.isinf(left):
        return ""
    if left <= 0:
        return "not begun"
    run = read(ledger)["provenance"] if ledger.exists() else {}
    takes = run["seconds"] if run.get("device") == device_name(device) else 0
    if takes < left or is_first:
        return ""
    return f"takes {takes:.0f} s, and {left:.0f} s are left"


def _keep(done: Path, target: Path, made_from: dict[str, str]) -> None:
    """Put an executed notebook in its place, with what it was made from and what it made."""
    notebook = nbformat.read(done, as_version=4)
    _fold_parameters(notebook)
    notebook.metadata["lipguide"] = made_from
    write_notebook(notebook, target)
    done.unlink()


def _parameters(profile: str, device: str) -> dict[str, object]:
    return {"profile": profile, "device": device, "seed": SEED}


def _key(book: Book, chapter: str, profile: str, device: str) -> str:
    """The hash of all that the outcome of a chapter depends on, as it stands now."""
    source = book.source(book.chapters[chapter])
    cells = code_cells(jupytext.read(source, fmt="md:myst"))
    code = "\n".join(cell.source for cell in cells)
    tagged = json.dumps([[cell.source, cell.metadata.get("tags", [])] for cell in cells])
    records = records_read(code, source.parent, book.ledger(chapter, profile))
    return chapter_key(code, tagged, _parameters(profile, device), lock_hash(), records)


def _made_from(notebook: Path) -> dict[str, str] | None:
    """What an executed notebook was made from and what it made: its key, and the hash of the ledger that it saved."""
    try:
        return nbformat.read(notebook, as_version=4).metadata.get("lipguide")
    except (OSError, ValueError):
        return None


def _is_whole(book: Book, chapter: str, profile: str) -> bool:
    """Whether a chapter has run and its ledger is the one that this run saved."""
    made = _made_from(book.executed(chapter, profile))
    return made is not None and made.get("ledger") == file_hash(book.ledger(chapter, profile))


def _is_true(book: Book, chapter: str, profile: str, device: str) -> bool:
    """Whether a chapter would come out today as it stands in its executed notebook."""
    now = {"key": _key(book, chapter, profile, device), "ledger": file_hash(book.ledger(chapter, profile))}
    return _made_from(book.executed(chapter, profile)) == now


def _fold_parameters(notebook: nbformat.NotebookNode) -> None:
    """Show the injected parameters in the chapter's own cell instead of in a second one."""
    injected = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    own = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for cell, value in zip(own, injected, strict=True):
        cell.source = "\n".join(line for line in value.source.splitlines() if not line.startswith("# Parameters"))
    notebook.cells = [c for c in notebook.cells if c not in injected]
    notebook.metadata.pop("papermill", None)  # holds absolute paths
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)


def _render(book: Book, profile: str, device: str) -> int:
    """Stage the executed notebooks, run Jupyter Book on them without execution, and put the new HTML in place."""
    began = time.perf_counter()
    missing, stale = _stage(book, profile, device)
    if missing:
        print(f"rendered without outputs, for they have not run with profile {profile}: {', '.join(missing)}")
    if stale:
        print(f"rendered as they ran last, before something that they depend on changed: {', '.join(stale)}")
    key = _rendering_key(book.stage, profile)
    mark = book.html / ".lipguide"
    old = book.html.with_name("html.old")
    if old.exists() and not book.html.exists():  # interrupted between the two renames below
        os.replace(old, book.html)
    if mark.exists() and mark.read_text() == key:
        print(f"{'html':<16} {'unchanged':<10} {time.perf_counter() - began:7.1f} s")
        return 0
    log = book.out / "render.log"
    deadline.check("the rendering is left")
    if _jupyter_book(["build", str(book.stage), "-W", "-n", "--keep-going", "--all"], book.root, log, profile):
        lines = [line for line in log.read_text(errors="replace").splitlines() if "WARNING" in line or "ERROR" in line]
        print(f"{'html':<16} FAILED; see {log.relative_to(book.root)}", *lines[:10], sep="\n  ")
        return 1
    new = book.stage / "_build" / "html"
    foreign = _foreign_hosts(new)
    if foreign:
        print(f"{'html':<16} FAILED; these pages would not read offline:", *foreign, sep="\n  ")
        return 1
    (new / ".lipguide").write_text(key)
    if book.html.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(book.html, old)
    os.replace(new, book.html)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{'html':<16} {'rendered':<10} {time.perf_counter() - began:7.1f} s   {book.html / 'index.html'}")
    return 0


def _jupyter_book(arguments: list[str], folder: Path, log: Path, profile: str) -> int:
    """The status of Jupyter Book, run in a process of its own within the time that is left; what it says is logged."""
    command = [sys.executable, "-c", JUPYTER_BOOK, *arguments]
    environment = {**os.environ, "LIPGUIDE_PROFILE": profile, "PYTHONWARNINGS": "ignore"}
    seconds = None if math.isinf(deadline.left()) else deadline.left() + deadline.grace()
    try:
        with open(log, "w") as file:
            return subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder, timeout=seconds
            ).returncode
    except subprocess.TimeoutExpired:
        raise deadline.OutOfTime("the rendering is left") from None


def _foreign_hosts(html: Path) -> list[str]:
    """Scripts, styles, pictures and frames that a page would fetch from another host."""
    fetch = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']((?:https?:)?//[^\"']+)")
    pages = sorted(html.rglob("*.html"))
    return [f"{p.relative_to(html)}: {url}" for p in pages for url in fetch.findall(p.read_text(encoding="utf-8"))]


def _stage(book: Book, profile: str, device: str) -> tuple[list[str], list[str]]:
    """Lay out a tree of executed notebooks for Jupyter Book; name chapters that have not run, and the stale ones."""
    shutil.rmtree(book.stage, ignore_errors=True)
    book.stage.mkdir(parents=True)
    config = yaml.safe_load((book.root / "_config.yml").read_text(encoding="utf-8"))
    config["execute"] = {"execute_notebooks": "off"}
    (book.stage / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shutil.copy(book.root / "_toc.yml", book.stage)
    shutil.copytree(book.root / "book", book.stage / "book", ignore=shutil.ignore_patterns("*.md", "*.ipynb", "_build"))
    missing, stale = [], []
    for page in book.pages:
        chapter = Path(page).name
        executed = book.executed(chapter, profile)
        if chapter not in book.chapters:
            shutil.copy(book.source(page), book.stage / f"{page}.md")
        elif _is_true(book, chapter, profile, device):
            nbformat.write(as_written_now(book.source(page), executed), book.stage / f"{page}.ipynb")
        elif _is_whole(book, chapter, profile):
            stale.append(chapter)
            shutil.copy(executed, book.stage / f"{page}.ipynb")
        else:
            missing.append(chapter)
            nbformat.write(not_run(book.source(page)), book.stage / f"{page}.ipynb")
    return missing, stale


def _rendering_key(folder: Path, profile: str) -> str:
    """A hash of all that the HTML depends on: the staged files, and what renders them."""
    digest = hashlib.sha256(json.dumps([profile, lock_hash()]).encode())
    renderers = modules_behind("from lipguide.book import addresses, api, citations, pages, records, roles")
    for path in sorted(renderers) + sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(os.path.relpath(path, folder).encode() + bytes.fromhex(file_hash(path)))
    return digest.hexdigest()

"""Build the book: every chapter is executed with papermill, then Jupyter Book renders what came out.

    book/*.md ──jupytext──▶ notebook ──papermill──▶ _build/notebooks ──Jupyter Book──▶ _build/html

Everything is written under a temporary name and renamed when it is whole, so an interruption at any moment leaves
either the old state or the new one. An executed notebook carries the hash of all that it depends on, and runs again
only when that changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from lipguide.book.staleness import chapter_key, records_read
from lipguide.distributed import choose_device
from lipguide.files import replacing
from lipguide.provenance import lock_hash

__all__ = ["PROFILES", "Book", "BuildError", "build"]

PROFILES = ("quick", "full")
SEED = 0


class BuildError(Exception):
    """Something that a reader can mend: one line for the terminal."""


@dataclass(frozen=True)
class Outcome:
    """How one chapter went; `problem` is empty when all is well."""

    chapter: str
    seconds: float
    problem: str = ""


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
        toc = yaml.safe_load((self.root / "_toc.yml").read_text(encoding="utf-8"))
        self.pages = list(_pages(toc))
        for page in self.pages:
            if not self.source(page).exists():
                raise BuildError(f"_toc.yml names {page}, but there is no {page}.md")
        self.chapters = {Path(p).name: p for p in self.pages if _has_code(self.source(p))}

    def source(self, page: str) -> Path:
        return self.root / f"{page}.md"

    def executed(self, chapter: str, profile: str) -> Path:
        return self.notebooks / f"{chapter}.{profile}.ipynb"

    def ledger(self, chapter: str, profile: str) -> Path:
        return self.root / "book" / "results" / f"{chapter}.{profile}.json"


def build(book: Book, profile: str = "quick", device: str = "auto", only: list[str] | None = None) -> int:
    """Execute what has changed, render, and return the exit status: 0, or 1 if any chapter or the rendering failed.

    Args:
        book: the book.
        profile: "quick" for two CPU cores and two minutes a chapter, "full" for the real training.
        device: "cpu", "cuda" or "auto".
        only: the chapters to execute; all if None.
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
        return _render(book, profile)


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


def _pages(entry: dict) -> Iterator[str]:
    """Every page of a table of contents, in reading order."""
    if "root" in entry or "file" in entry:
        yield entry.get("root") or entry["file"]
    for key in ("parts", "chapters", "sections"):
        for child in entry.get(key, []):
            yield from _pages(child)


def _has_code(path: Path) -> bool:
    return "{code-cell}" in path.read_text(encoding="utf-8")


def _execute_all(book: Book, profile: str, device: str, chapters: list[str]) -> list[Outcome]:
    outcomes = []
    with tqdm(total=len(chapters), disable=None, unit="chapter", leave=False) as bar:
        for chapter in chapters:
            bar.set_description(chapter)
            outcome, fresh = _execute(book, chapter, profile, device)
            state = "FAILED" if outcome.problem else "executed" if fresh else "unchanged"
            bar.write(f"{chapter:<16} {state:<10} {outcome.seconds:7.1f} s", file=sys.stdout)
            sys.stdout.flush()
            bar.update()
            outcomes.append(outcome)
    return outcomes


def _execute(book: Book, chapter: str, profile: str, device: str) -> tuple[Outcome, bool]:
    """Run one chapter unless its executed notebook is still true; say whether it ran."""
    began = time.perf_counter()
    source = book.source(book.chapters[chapter])
    notebook = jupytext.read(source)
    parameters = {"profile": profile, "device": device, "seed": SEED}
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    records = records_read(code, source.parent)
    key = chapter_key(code, source.read_text(encoding="utf-8"), parameters, lock_hash(), records)
    target = book.executed(chapter, profile)
    if _key_of(target) == key and book.ledger(chapter, profile).exists():
        return Outcome(chapter, time.perf_counter() - began), False
    failed = book.failed / f"{chapter}.{profile}.ipynb"
    problem = _run(notebook, failed, source.parent, parameters)
    seconds = time.perf_counter() - began
    if problem:
        return Outcome(chapter, seconds, f"{chapter}: {problem}; see {failed.relative_to(book.root)}"), True
    if not book.ledger(chapter, profile).exists():
        return Outcome(chapter, seconds, f"{chapter}: it ran, but saved no {book.ledger(chapter, profile).name}"), True
    done = nbformat.read(failed, as_version=4)
    _fold_parameters(done)
    done.metadata["lipguide"] = {"key": key}
    _write_notebook(done, target)
    failed.unlink()
    failed.with_suffix(".log").unlink(missing_ok=True)
    return Outcome(chapter, seconds), True


def _run(notebook: nbformat.NotebookNode, path: Path, folder: Path, parameters: dict[str, object]) -> str:
    """Execute a notebook into `path`; return what went wrong, or nothing.

    Cells are counted as in the source, without the one that papermill injects before them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_notebook(notebook, path)
    try:
        with _stderr_to(path.with_suffix(".log")):
            papermill.execute_notebook(
                str(path), str(path), parameters, kernel_name="python3", progress_bar=False, cwd=str(folder)
            )
    except PapermillExecutionError as error:
        return f"code cell {error.exec_count - 1} raised {error.ename}: {_first_line(error.evalue)}"
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                return f"code cell {cell.execution_count - 1} wrote to stderr: {_first_line(output.text)}"
    return ""


def _first_line(text: str) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "(no message)")


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Send what the kernel process itself complains about to a file; what its cells print is in the notebook."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(path, "w") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _key_of(path: Path) -> str | None:
    try:
        return nbformat.read(path, as_version=4).metadata.get("lipguide", {}).get("key")
    except (OSError, ValueError):
        return None


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


def _write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)


def _render(book: Book, profile: str) -> int:
    """Stage the executed notebooks, run Jupyter Book on them without execution, and put the new HTML in place."""
    began = time.perf_counter()
    missing = _stage(book, profile)
    if missing:
        print(f"rendered without outputs, for they have not run with profile {profile}: {', '.join(missing)}")
    key = _tree_hash(book.stage)
    mark = book.html / ".lipguide"
    old = book.html.with_name("html.old")
    if old.exists() and not book.html.exists():  # interrupted between the two renames below
        os.replace(old, book.html)
    if mark.exists() and mark.read_text() == key:
        print(f"{'html':<16} {'unchanged':<10} {time.perf_counter() - began:7.1f} s")
        return 0
    log = book.out / "render.log"
    call = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", call, "build", str(book.stage), "-W", "-n", "--keep-going", "--all"]
    environment = {**os.environ, "LIPGUIDE_PROFILE": profile, "PYTHONWARNINGS": "ignore"}
    with open(log, "w") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=book.root
        ).returncode
    if status:
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


def _foreign_hosts(html: Path) -> list[str]:
    """Scripts, styles, pictures and frames that a page would fetch from another host."""
    fetch = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']((?:https?:)?//[^\"']+)")
    pages = sorted(html.rglob("*.html"))
    return [f"{p.relative_to(html)}: {url}" for p in pages for url in fetch.findall(p.read_text(encoding="utf-8"))]


def _stage(book: Book, profile: str) -> list[str]:
    """Lay out a tree for Jupyter Book in which notebooks are executed already; name the chapters that are not."""
    shutil.rmtree(book.stage, ignore_errors=True)
    book.stage.mkdir(parents=True)
    config = yaml.safe_load((book.root / "_config.yml").read_text(encoding="utf-8"))
    config["execute"] = {"execute_notebooks": "off"}
    (book.stage / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shutil.copy(book.root / "_toc.yml", book.stage)
    shutil.copytree(book.root / "book", book.stage / "book", ignore=shutil.ignore_patterns("*.md", "*.ipynb", "_build"))
    missing = []
    for page in book.pages:
        chapter = Path(page).name
        executed = book.executed(chapter, profile)
        if chapter not in book.chapters:
            shutil.copy(book.source(page), book.stage / f"{page}.md")
        elif executed.exists():
            shutil.copy(executed, book.stage / f"{page}.ipynb")
        else:
            missing.append(chapter)
            jupytext.write(jupytext.read(book.source(page)), book.stage / f"{page}.ipynb", fmt="ipynb")
    return missing


def _tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(hashlib.sha256((Path(__file__).parent / "roles.py").read_bytes()).digest())
    return digest.hexdigest()

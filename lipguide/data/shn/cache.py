"""Making many scenes: in blocks, by several processes, kept in a cache that survives interruptions.

A block is a file of up to BLOCK scenes. Its folder's name is a hash of everything its pictures depend on: the source
of the generator, the figures it follows, the versions of the libraries that draw and compress, split, seed and
difficulty. Each block is written under a temporary name and renamed, so two processes may fill the same folder, and a
run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import scipy
from tqdm import tqdm

from lipguide.data.npz import DamagedFile
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.pages import FIELDS, Pages
from lipguide.data.shn.rendering import Encoded, render
from lipguide.files import cache_folder

__all__ = ["BLOCK", "block_path", "content_hash", "keep", "load_pages", "make_block", "sources"]

BLOCK = 256
PACKAGE = Path(__file__).resolve().parents[2]
FIGURES = PACKAGE / "data" / "svhn_facts.json"
DRAWING = PACKAGE / "data" / "shn" / "rendering.py"
WORKER = PACKAGE / "data" / "shn" / "worker.py"


# What pictures depend on


def sources() -> list[Path]:
    """The files that a picture depends on: what draws it, with all that this imports, and SVHN's figures.

    >>> {"ink.py", "facts.py", "svhn_facts.json"} <= {path.name for path in sources()}
    True
    """
    waiting = [DRAWING]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(path)
    return [*sorted(found), FIGURES]


def _imports(path: Path) -> list[Path]:
    """The modules of this package from which a module imports names."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lipguide."):
            modules.append(PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py"))
    return modules


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    versions = (np.__version__, scipy.__version__, PIL.__version__, matplotlib.__version__)
    digest.update(" ".join(versions).encode())
    return digest.hexdigest()


def content_hash(split: str, seed: int, difficulty: Difficulty) -> str:
    """Name of the folder for these scenes: 24 hexadecimal digits.

    >>> content_hash("train", 0, Difficulty()) == content_hash("test", 0, Difficulty())
    False
    """
    parameters = [split, seed, *map(float, astuple(difficulty))]
    layout = [BLOCK, *FIELDS]  # how the files are laid out: others must not be taken for these
    return hashlib.sha256((_source_hash() + json.dumps([parameters, layout])).encode()).hexdigest()[:24]


# The files


def block_path(folder: Path, block: int, count: int) -> Path:
    """The file of a block of `count` scenes."""
    return folder / f"{block:05d}-{count:03d}.npz"


def _stored(folder: Path, block: int, count: int) -> Pages | None:
    """A stored block of at least `count` scenes; a damaged file counts as none, and is made again."""
    for path in _files(folder, block):
        try:
            pages = Pages.load(path)
        except (OSError, DamagedFile):
            continue
        if len(pages) >= count:
            return pages.first(count)
    return None


def _files(folder: Path, block: int) -> list[Path]:
    """The files of a block, the longest first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    own = [name for name in names if name.startswith(f"{block:05d}-") and name.endswith(".npz")]
    return [folder / name for name in sorted(own, reverse=True)]


def keep(pages: Pages, path: Path) -> None:
    """Write a block into its file."""
    try:
        pages.save(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _prepare(folder: Path) -> None:
    """Make the folder, and see whether it can be written to: better now than after minutes of drawing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"scenes cannot be kept in {folder} ({error}): make room there, or set LIPGUIDE_CACHE to another folder "
        "(TMPDIR where cache=False)"
    )


# The making


def make_block(split: str, seed: int, difficulty: Difficulty, block: int, count: int) -> Iterator[Encoded]:
    """Draw the first `count` scenes of a block."""
    for index in range(block * BLOCK, block * BLOCK + count):
        yield render(split, seed, index, difficulty)


def load_pages(split: str, size: int, seed: int, difficulty: Difficulty, cache: bool = True, workers: int = 1) -> Pages:
    """The first `size` scenes, from the cache or made now, with a progress bar on a terminal.

    >>> pages = load_pages("test", 3, 0, Difficulty(), cache=False)
    >>> pages[2].picture == render("test", 0, 2, Difficulty()).picture
    True
    """
    counts = {block: min(BLOCK, size - block * BLOCK) for block in range(-(-size // BLOCK))}
    workers = min(workers, len(counts))
    with ExitStack() as stack:
        folder = None
        if cache:
            folder = cache_folder("shn", content_hash(split, seed, difficulty))
        elif workers > 1:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lipguide-")))
        parts = {block: _stored(folder, block, count) if folder else None for block, count in counts.items()}
        todo = [(block, count) for block, count in counts.items() if parts[block] is None]
        if todo:
            _make(parts, todo, folder, (split, seed, difficulty), workers)
        return Pages.joined([parts[block] for block in counts])


def _make(
    parts: dict[int, Pages | None],
    todo: list[tuple[int, int]],
    folder: Path | None,
    which: tuple[str, int, Difficulty],
    workers: int,
) -> None:
    """Fill in the missing parts, here or in processes of their own, and keep them in the folder if there is one."""
    if folder is not None:
        _prepare(folder)
    split, seed, difficulty = which
    total = sum(count for _, count in todo)
    with tqdm(total=total, unit="scene", desc=f"house numbers ({split})", disable=None) as bar:
        if workers > 1 and len(todo) > 1:
            task = {"folder": str(folder), "split": split, "seed": seed, "difficulty": asdict(difficulty)}
            _make_apart(task, todo, min(workers, len(todo)), bar)
            parts |= {block: Pages.load(block_path(folder, block, count)) for block, count in todo}
            return
        for block, count in todo:
            scenes = []
            for scene in make_block(split, seed, difficulty, block, count):
                scenes.append(scene)
                bar.update(1)
            parts[block] = Pages.of(scenes)
            if folder is not None:
                keep(parts[block], block_path(folder, block, count))


def _make_apart(task: dict, todo: list[tuple[int, int]], workers: int, bar: tqdm) -> None:
    """Share the blocks between processes, which report finished scenes through one pipe; end them all on any error.

    They are started afresh (no fork), so it does not matter what threads or devices this process holds.
    """
    processes: list[subprocess.Popen] = []
    receive, send = os.pipe()
    with open(receive, encoding="ascii") as reports, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            with open(send, "w", encoding="ascii") as output:
                for share in (todo[k::workers] for k in range(workers)):
                    command = _command({**task, "blocks": share})
                    processes.append(subprocess.Popen(command, stdout=output, stderr=complaints))
            for line in reports:
                bar.update(int(line))
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if any(statuses):
            complaints.seek(0)
            last = complaints.read().strip().splitlines()[-1:] or ["it left no message"]
            raise RuntimeError(f"a process that makes synthetic house numbers ended early: {last[0]}")


def _command(task: dict) -> list[str]:
    """The command line of a process that does its share of the blocks."""
    return [sys.executable, str(WORKER), json.dumps(task)]

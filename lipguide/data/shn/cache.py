"""Making many scenes: in blocks, by several processes, kept in a cache that survives interruptions.

A block is a file of up to BLOCK scenes. Its folder's name is a hash of everything its pictures depend on: what the
source of the generator says (its comments aside), the figures it follows, the versions of the libraries that draw and
compress, version, split, seed and difficulty. Each block is written under a temporary name and renamed, so two
processes may fill the same folder, and a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from lipguide.data.npz import DamagedFile
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.glyphs import glyphs_missing, keep_drawn, take_glyphs
from lipguide.data.shn.looks import DEFAULT
from lipguide.data.shn.pages import FIELDS, Pages
from lipguide.data.shn.processes import share
from lipguide.data.shn.rendering import Encoded, render
from lipguide.data.sources import hash_of
from lipguide.files import cache_folder

__all__ = [
    "BLOCK",
    "block_path",
    "content_hash",
    "keep",
    "load_pages",
    "make_block",
    "prepare",
    "sources",
    "stored",
    "unwritable",
]

BLOCK = 256
MANY = 64  # scenes, from which on a process keeps the glyphs that it has drawn for the next one
PACKAGE = Path(__file__).resolve().parents[2]
FIGURES = PACKAGE / "data" / "svhn_facts.json"
DRAWING = PACKAGE / "data" / "shn" / "rendering.py"
GLYPHS = PACKAGE / "data" / "shn" / "glyphs.py"
LIBRARIES = ("numpy", "scipy", "pillow", "matplotlib")  # that draw and compress


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
    return hash_of(sources()) + " ".join(version(name) for name in LIBRARIES)


def content_hash(split: str, seed: int, difficulty: Difficulty, version: int = DEFAULT) -> str:
    """Name of the folder for these scenes: 24 hexadecimal digits.

    >>> content_hash("train", 0, Difficulty()) == content_hash("test", 0, Difficulty())
    False
    """
    parameters = [version, split, seed, *map(float, astuple(difficulty))]
    layout = [BLOCK, *FIELDS]  # how the files are laid out: others must not be taken for these
    return hashlib.sha256((_source_hash() + json.dumps([parameters, layout])).encode()).hexdigest()[:24]


# The files


def block_path(folder: Path, block: int, count: int) -> Path:
    """The file of a block of `count` scenes."""
    return folder / f"{block:05d}-{count:03d}.npz"


def stored(folder: Path, block: int, count: int) -> Pages | None:
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
        raise unwritable(path.parent, error) from error


def prepare(folder: Path) -> None:
    """Make the folder, and see whether it can be written to: better now than after minutes of drawing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> OSError:
    """The error that says where nothing can be written, and what would do."""
    return OSError(
        f"scenes cannot be kept in {folder} ({error}): make room there, or set LIPGUIDE_CACHE to another folder "
        "(TMPDIR where cache=False)"
    )


# The making


def make_block(
    split: str, seed: int, difficulty: Difficulty, version: int, block: int, count: int
) -> Iterator[Encoded]:
    """Draw the first `count` scenes of a block."""
    for index in range(block * BLOCK, block * BLOCK + count):
        yield render(split, seed, index, difficulty, version)


def load_pages(
    split: str,
    size: int,
    seed: int,
    difficulty: Difficulty,
    cache: bool = True,
    workers: int = 1,
    version: int = DEFAULT,
) -> Pages:
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
            folder = cache_folder("shn", content_hash(split, seed, difficulty, version))
        elif workers > 1:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lipguide-")))
        parts = {block: stored(folder, block, count) if folder else None for block, count in counts.items()}
        todo = [(block, count) for block, count in counts.items() if parts[block] is None]
        if todo:
            _make(parts, todo, folder, (split, seed, difficulty, version), workers)
        return Pages.joined([parts[block] for block in counts])


def _make(
    parts: dict[int, Pages | None],
    todo: list[tuple[int, int]],
    folder: Path | None,
    which: tuple[str, int, Difficulty, int],
    workers: int,
) -> None:
    """Fill in the missing parts, here or in processes of their own, and keep them in the folder if there is one."""
    if folder is not None:
        prepare(folder)
    split, seed, difficulty, version = which
    total = sum(count for _, count in todo)
    with tqdm(total=total, unit="scene", desc=f"house numbers ({split})", disable=None) as bar:
        if workers > 1 and len(todo) > 1:
            glyphs = _shared_glyphs(folder.parent, workers, bar)
            task = {"make": "scenes", "folder": str(folder), "glyphs": str(glyphs)}
            task |= {"split": split, "seed": seed, "difficulty": asdict(difficulty), "version": version}
            share(task, todo, workers, bar)
            parts |= {block: Pages.load(block_path(folder, block, count)) for block, count in todo}
            return
        glyphs = _glyphs_folder(folder.parent) if folder is not None and total >= MANY else None
        if glyphs is not None:
            take_glyphs(glyphs)
        for block, count in todo:
            scenes = []
            for scene in make_block(*which, block, count):
                scenes.append(scene)
                bar.update(1)
            parts[block] = Pages.of(scenes)
            if folder is not None:
                keep(parts[block], block_path(folder, block, count))
        if glyphs is not None:
            prepare(glyphs)
            keep_drawn(glyphs)


def _glyphs_folder(folder: Path) -> Path:
    """The folder below this one for the typefaces, as this code draws them."""
    key = hashlib.sha256((_source_hash() + hash_of([GLYPHS])).encode()).hexdigest()[:24]
    return folder / f"glyphs-{key}"


def _shared_glyphs(folder: Path, workers: int, bar: tqdm) -> Path:
    """The folder below this one that holds all typefaces, drawn by processes if they are not there."""
    folder = _glyphs_folder(folder)
    missing = glyphs_missing(folder)
    if missing:
        share({"make": "glyphs", "folder": str(folder)}, missing, workers, bar)
    return folder

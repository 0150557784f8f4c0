"""Making many scenes: in blocks, by several processes, kept in a cache that survives interruptions.

A block is a file of up to BLOCK scenes. Its folder's name is a hash of everything its pictures depend on: the source
of the generator, the figures it follows, the versions of the libraries that draw and compress, split, seed and
difficulty. Each block is written under a temporary name and renamed, so two processes may fill the same folder, and a
run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
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

from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.rendering import Encoded, render
from lipguide.files import cache_folder, replacing

__all__ = ["BLOCK", "Pages", "content_hash", "load_pages"]

BLOCK = 256
_HERE = Path(__file__).parent
# What a picture depends on: everything in this folder, and the geometry that it keeps to.
SOURCES = (*sorted(_HERE.glob("*.py")), _HERE.parent / "facts.py", _HERE.parent / "svhn_facts.json")


class Pages:
    """Scenes one after the other in a few arrays, as a block file holds them.

    >>> pages = Pages.of([render("train", 0, k, Difficulty()) for k in range(2)])
    >>> len(pages), pages[1].picture == render("train", 0, 1, Difficulty()).picture
    (2, True)
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    @classmethod
    def of(cls, scenes: list[Encoded]) -> Pages:
        """Lay scenes one after the other."""
        counts = [len(s.labels) for s in scenes]
        lengths = [len(part) for s in scenes for part in (s.picture, s.mask)]
        return cls(
            {
                "bytes": np.frombuffer(b"".join(part for s in scenes for part in (s.picture, s.mask)), dtype=np.uint8),
                "ends": np.cumsum([0, *lengths]),
                "sizes": np.array([(s.width, s.height) for s in scenes], dtype=np.int32).reshape(-1, 2),
                "digits": np.cumsum([0, *counts]),
                "boxes": np.concatenate([np.zeros((0, 4)), *(s.boxes for s in scenes)]).astype(np.int32),
                "labels": np.concatenate([np.zeros(0), *(s.labels for s in scenes)]).astype(np.uint8),
            }
        )

    @classmethod
    def joined(cls, parts: list[Pages]) -> Pages:
        """The scenes of several pages in order."""
        if len(parts) == 1:
            return parts[0]
        arrays = {}
        for name in ("bytes", "sizes", "boxes", "labels"):
            arrays[name] = np.concatenate([part.arrays[name] for part in parts]) if parts else cls.of([]).arrays[name]
        for name in ("ends", "digits"):
            steps = [np.diff(part.arrays[name]) for part in parts]
            arrays[name] = np.cumsum(np.concatenate([[0], *steps])).astype(np.int64)
        return cls(arrays)

    def __len__(self) -> int:
        return len(self.arrays["sizes"])

    def __getitem__(self, index: int) -> Encoded:
        ends, digits = self.arrays["ends"], self.arrays["digits"]
        start, middle, stop = (int(e) for e in ends[2 * index : 2 * index + 3])
        own = slice(int(digits[index]), int(digits[index + 1]))
        width, height = (int(v) for v in self.arrays["sizes"][index])
        picture, mask = self.arrays["bytes"][start:middle].tobytes(), self.arrays["bytes"][middle:stop].tobytes()
        return Encoded(picture, mask, width, height, self.arrays["boxes"][own], self.arrays["labels"][own])

    def first(self, count: int) -> Pages:
        """The first `count` scenes."""
        if count == len(self):
            return self
        end, digits = int(self.arrays["ends"][2 * count]), int(self.arrays["digits"][count])
        cut = {"bytes": end, "ends": 2 * count + 1, "sizes": count, "digits": count + 1}
        cut |= {"boxes": digits, "labels": digits}
        return Pages({name: self.arrays[name][:n] for name, n in cut.items()})

    def save(self, path: Path) -> None:
        """Write the file at once: whole, or not at all."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **self.arrays)

    @classmethod
    def load(cls, path: Path) -> Pages:
        """Read a file of `save`; the archive's checksums show whether it is whole."""
        with np.load(path, allow_pickle=False) as file:
            return cls({name: file[name] for name in ("bytes", "ends", "sizes", "digits", "boxes", "labels")})


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in SOURCES:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    versions = (np.__version__, scipy.__version__, PIL.__version__, matplotlib.__version__)
    digest.update(" ".join(versions).encode())
    return digest.hexdigest()


def content_hash(split: str, seed: int, difficulty: Difficulty) -> str:
    """Name of the folder for these scenes: 24 hexadecimal digits.

    >>> content_hash("train", 0, Difficulty()) == content_hash("test", 0, Difficulty())
    False
    """
    parameters = json.dumps([split, seed, *map(float, astuple(difficulty))])
    return hashlib.sha256((_source_hash() + parameters).encode()).hexdigest()[:24]


def _block_path(folder: Path, block: int, count: int) -> Path:
    return folder / f"{block:05d}-{count:03d}.npz"


def _stored(folder: Path, block: int, count: int) -> Pages | None:
    """A stored block of at least `count` scenes; a damaged file counts as none, and is made again."""
    for path in sorted(folder.glob(f"{block:05d}-*.npz"), reverse=True):
        try:
            pages = Pages.load(path)
            if len(pages) >= count:
                return pages.first(count)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    return None


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the cache {folder} cannot be made ({error}): set LIPGUIDE_CACHE to another folder, or cache=False"
        raise OSError(message) from error


def _make_block(split: str, seed: int, difficulty: Difficulty, block: int, count: int) -> Iterator[Encoded]:
    for index in range(block * BLOCK, block * BLOCK + count):
        yield render(split, seed, index, difficulty)


def _make_apart(task: dict, todo: list[tuple[int, int]], workers: int, bar: tqdm) -> None:
    """Share the blocks between processes, which report finished scenes through one pipe; end them all on any error.

    They are started afresh (no fork), so it does not matter what threads or devices this process holds.
    """
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    processes: list[subprocess.Popen] = []
    receive, send = os.pipe()
    with open(receive, encoding="ascii") as reports, tempfile.TemporaryFile("w+") as complaints:
        try:
            with open(send, "w", encoding="ascii") as output:
                for share in (todo[k::workers] for k in range(workers)):
                    command = [sys.executable, "-m", "lipguide.data.shn.worker", json.dumps({**task, "blocks": share})]
                    environment = {**os.environ, "PYTHONPATH": path}
                    processes.append(subprocess.Popen(command, stdout=output, stderr=complaints, env=environment))
            for line in reports:
                bar.update(int(line))
            failed = [process.args for process in processes if process.wait() != 0]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if failed:
            complaints.seek(0)
            last = complaints.read().strip().splitlines()[-1:] or ["it left no message"]
            raise RuntimeError(f"a process that makes synthetic house numbers ended early: {last[0]}")


def load_pages(split: str, size: int, seed: int, difficulty: Difficulty, cache: bool = True, workers: int = 1) -> Pages:
    """The first `size` scenes, from the cache or made now, with a progress bar on a terminal.

    >>> pages = load_pages("test", 3, 0, Difficulty(), cache=False)
    >>> pages[2].picture == render("test", 0, 2, Difficulty()).picture
    True
    """
    sizes = [(b, min(BLOCK, size - b * BLOCK)) for b in range(-(-size // BLOCK))]
    with ExitStack() as stack:
        folder = cache_folder("shn", content_hash(split, seed, difficulty)) if cache else None
        if folder is not None:
            _make_writable(folder)
        if folder is None and workers > 1 and len(sizes) > 1:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lipguide-")))
        parts = {b: _stored(folder, b, n) if folder else None for b, n in sizes}
        todo = [(b, n) for b, n in sizes if parts[b] is None]
        total = sum(n for _, n in todo)
        with tqdm(total=total, unit="scene", desc=f"house numbers ({split})", disable=None if todo else True) as bar:
            if workers > 1 and len(todo) > 1:
                task = {"folder": str(folder), "split": split, "seed": seed, "difficulty": asdict(difficulty)}
                _make_apart(task, todo, min(workers, len(todo)), bar)
                parts |= {b: Pages.load(_block_path(folder, b, n)) for b, n in todo}
                todo = []
            for block, count in todo:
                made = []
                for scene in _make_block(split, seed, difficulty, block, count):
                    made.append(scene)
                    bar.update(1)
                parts[block] = Pages.of(made)
                if folder is not None:
                    parts[block].save(_block_path(folder, block, count))
        return Pages.joined([parts[b] for b, _ in sizes])

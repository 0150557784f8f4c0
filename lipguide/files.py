"""Where files are kept, and how they are written: under a temporary name first, renamed when whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "replacing", "write_json"]


def cache_folder(*parts: str) -> Path:
    """A folder for what can be made again: $LIPGUIDE_CACHE, else $XDG_CACHE_HOME/lipguide, else ~/.cache/lipguide.

    >>> cache_folder("shn").name
    'shn'
    """
    own = os.environ.get("LIPGUIDE_CACHE")
    if own:
        return Path(own).joinpath(*parts)
    shared = os.environ.get("XDG_CACHE_HOME")
    caches = Path(shared) if shared else Path.home() / ".cache"
    return caches.joinpath("lipguide", *parts)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` if the block ends well.

    If the block raises, the temporary file goes away and `path` stays as it was. Whatever happens, the power cut
    included, `path` holds the old content or the new one, never a part. Of two processes that write the same file,
    each puts a whole one in its place, and the later one stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     (Path(folder) / "a.txt").read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, for the user alone
        _flush_to_disk(temporary)  # before the rename: a name must never point to data that is still on its way
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, whole or not at all, and return the path. NaN and infinity, which JSON does not have, are an error.

    >>> import tempfile
    >>> write_json(Path(tempfile.mkdtemp()) / "a.json", {"b": 1}).read_text()
    '{\\n  "b": 1\\n}\\n'
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)

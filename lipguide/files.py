"""Where files are kept, and how they are written: to a temporary name first, renamed when whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["cache_folder", "replacing"]


def cache_folder(*parts: str) -> Path:
    """A folder for what can be made again: $LIPGUIDE_CACHE, else $XDG_CACHE_HOME/lipguide, else ~/.cache/lipguide.

    >>> cache_folder("shn").name
    'shn'
    """
    own, shared = os.environ.get("LIPGUIDE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "lipguide"
    return base.joinpath(*parts)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` if the block ends well, and goes away
    if not. Two processes that write the same file each rename a whole one.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     (Path(folder) / "a.txt").read_text()
    'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise

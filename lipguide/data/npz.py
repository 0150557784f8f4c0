"""Arrays in a file: written whole or not at all, and read only if the file is whole.

NumPy believes a file that says how large its arrays are. Here every size is compared with the file's own first, so a
damaged file is an error of its kind, and not a lack of memory.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from lipguide.files import replacing

__all__ = ["DamagedFile", "load_arrays", "save_arrays"]


class DamagedFile(ValueError):
    """A file does not hold what it should, or not all of it; the message names it."""


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays into one file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.npz"
    >>> save_arrays(path, {"a": np.arange(3)})
    >>> load_arrays(path, ["a"])["a"].tolist()
    [0, 1, 2]
    """
    content = io.BytesIO()  # with NumPy 1 an archive on a full disk complains once more when it is thrown away
    np.savez(content, **arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays of a file that `save_arrays` wrote.

    `DamagedFile` says that they are not all there, `OSError` that the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _array(_content(archive, f"{name}.npy", size)) for name in names}
        except (
            OSError,
            EOFError,
            KeyError,
            ValueError,
            RuntimeError,
            MemoryError,
            OverflowError,
            struct.error,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise DamagedFile(f"{path} is damaged: {error}") from error


def _content(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """A part of an archive of `size` bytes; its checksum is compared by `read`."""
    part = archive.getinfo(name)
    if part.compress_type != zipfile.ZIP_STORED or max(part.file_size, part.compress_size) > size:
        raise ValueError(f"{name} claims {part.file_size} bytes of a file of {size}")
    return archive.read(part)


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file."""
    file = io.BytesIO(content)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array is of another format")
    shape, in_columns, dtype = npy.read_array_header_1_0(file)
    start = file.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"{len(content) - start} bytes are no array of {shape} {dtype}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if in_columns else "C")

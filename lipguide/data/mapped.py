"""Arrays in a file that is mapped into memory: nothing is read before it is looked at, and processes share it.

The file is a line of JSON, filled up with blanks, and the arrays. It is written in parts, by several processes if need
be: `reserve` makes room, `put` fills it, `seal` adds the checksums. What has none is no file of this kind.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

from lipguide.data.npz import DamagedFile

__all__ = ["map_arrays", "put", "reserve", "seal"]

HEAD = 4096  # bytes for the line of JSON
ALIGNED = 64  # every array begins at a multiple of so many bytes
Kinds = dict[str, tuple[str, tuple[int, ...]]]


def reserve(path: Path, kinds: Kinds) -> None:
    """Make room for arrays: type and shape by name.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.map"
    >>> reserve(path, {"a": ("int32", (3,))})
    >>> put(path, "a", 1, np.array([5, 7]))
    >>> seal(path)
    >>> map_arrays(path)["a"].tolist()
    [0, 5, 7]
    """
    arrays, end = {}, HEAD
    for name, (dtype, shape) in kinds.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        arrays[name] = {"dtype": dtype, "shape": list(shape), "start": end, "size": size}
        end += -(-size // ALIGNED) * ALIGNED
    with open(path, "wb") as file:
        file.truncate(end)
        file.write(_head(arrays))


def _head(arrays: dict) -> bytes:
    text = json.dumps(arrays)
    line = json.dumps({"crc": zlib.crc32(text.encode()), "arrays": arrays}).encode()
    if len(line) >= HEAD:
        raise ValueError(f"{len(arrays)} arrays are too many for one file: their list is longer than {HEAD} bytes")
    return line.ljust(HEAD - 1) + b"\n"


def put(path: Path, name: str, first: int, values: np.ndarray) -> None:
    """Write rows of an array, from the row `first` on. Several processes may write to rows of their own."""
    with open(path, "r+b", buffering=0) as file:
        array = _arrays(file.read(HEAD), path)[name]
        shape = array["shape"]
        if values.shape[1:] != tuple(shape[1:]) or first + len(values) > shape[0]:
            raise ValueError(f"rows {first} to {first + len(values)} of shape {values.shape[1:]} do not fit {shape}")
        content = np.ascontiguousarray(values, dtype=array["dtype"])
        left = memoryview(content.reshape(-1).view(np.uint8))
        file.seek(array["start"] + first * (array["size"] // shape[0] if shape[0] else 0))
        while len(left):  # the system may write less than it was given
            left = left[file.write(left) :]


def seal(path: Path) -> None:
    """Add the checksums: the file is whole now."""
    arrays, content = _content(path)
    for array in arrays.values():
        array["crc"] = zlib.crc32(content[array["start"] : array["start"] + array["size"]])
    with open(path, "r+b") as file:
        file.write(_head(arrays))


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, mapped. Who writes to one changes his own copy, never the file.

    `DamagedFile` says that they are not all there, `OSError` that the file cannot be opened.
    """
    arrays, content = _content(path)
    found = {}
    for name, array in arrays.items():
        part = content[array["start"] : array["start"] + array["size"]]
        if zlib.crc32(part) != array.get("crc"):
            raise DamagedFile(f"{path} is damaged: {name} is not what was written")
        found[name] = part.view(array["dtype"]).reshape(array["shape"])
    return found


def _content(path: Path) -> tuple[dict, np.ndarray]:
    """The list of arrays, and the whole file as bytes; its size is compared with the list."""
    with open(path, "rb") as file:
        arrays = _arrays(file.read(HEAD), path)
        size = os.fstat(file.fileno()).st_size
    if size < max([HEAD, *(array["start"] + array["size"] for array in arrays.values())]):
        raise DamagedFile(f"{path} is damaged: it ends too early")
    return arrays, np.asarray(np.memmap(path, np.uint8, mode="c"))


def _arrays(head: bytes, path: Path) -> dict:
    """The list of arrays in a head whose checksum fits."""
    try:
        content = json.loads(head)
        if zlib.crc32(json.dumps(content["arrays"]).encode()) == content["crc"]:
            return content["arrays"]
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedFile(f"{path} is damaged: its list of arrays is not what was written")

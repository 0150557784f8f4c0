"""SVHN's annotations: `digitStruct.mat`, a MATLAB 7.3 file, which is HDF5 behind a block of 512 bytes.

`/digitStruct/name` and `/digitStruct/bbox` are columns of references. A name is a column of 16-bit characters. A bbox
is a group of `height`, `label`, `left`, `top`, `width`: for one digit each is the number itself, for more it is a
column of references to numbers. Label 10 stands for the digit 0.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from h5py import h5d, h5f, h5g, h5r, h5s, h5t

from lipguide.data.items import Annotation
from lipguide.data.npz import DamagedFile, load_arrays, save_arrays
from lipguide.data.svhn.lone_numbers import LoneNumbers
from lipguide.files import cache_folder, replacing

__all__ = ["DigitStruct", "DigitStructError", "load_digit_struct", "read_digit_struct", "write_digit_struct"]

FIELDS = (b"left", b"top", b"width", b"height", b"label")
LEAST = 16  # bytes of the smallest object in an HDF5 file, and every entry refers to two of its own
MOST = 64  # digits in one number: more means a damaged or foreign file
NAME = re.compile(r"[0-9]{1,9}\.png")


class DigitStructError(ValueError):
    """The file is not SVHN's digitStruct.mat, or not all of it; the message names the file and the entry."""


class DigitStruct(NamedTuple):
    """All annotations of a split.

    Args:
        names: of the N pictures.
        digits: (N + 1,) where each picture's digits start.
        boxes: (D, 4) left, top, width, height in pixels.
        labels: (D,) 0 to 9.
    """

    names: list[str]
    digits: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


ONE = h5s.create_simple((1,))


def _open(reference: h5py.Reference, file: h5f.FileID, kind: type):
    found = h5r.dereference(reference, file) if reference else None
    if not isinstance(found, kind):
        raise ValueError(f"a reference leads to {type(found).__name__}, not {kind.__name__}")
    return found


def _count(data: h5d.DatasetID, most: int) -> int:
    count = data.get_space().get_simple_extent_npoints()
    if not 1 <= count <= most:
        raise ValueError(f"a field has {count} values, not 1 to {most}")
    return count


def _number(data: h5d.DatasetID) -> float:
    """One number; HDF5 itself refuses to read anything else into ONE."""
    number = np.empty(1, dtype=np.float64)
    data.read(ONE, h5s.ALL, number, h5t.NATIVE_DOUBLE)
    return float(number[0])


def _fields(group: h5g.GroupID) -> tuple[list[h5d.DatasetID], int]:
    """The five fields of a bbox, and how many references each of them holds: 0 if they are the numbers themselves."""
    fields = [h5d.open(group, field) for field in FIELDS]
    refers = fields[0].get_type().get_class() == h5t.REFERENCE
    return fields, _count(fields[0], MOST) if refers else 0


def _follow(group: h5g.GroupID, file: h5f.FileID) -> np.ndarray:
    """(5, n) numbers of a bbox whose fields hold references, one by one."""
    fields, count = _fields(group)
    references, space = np.empty(count, dtype=h5py.ref_dtype), h5s.create_simple((count,))
    rows = []
    for field in fields:
        field.read(space, h5s.ALL, references)
        rows.append([_number(_open(reference, file, h5d.DatasetID)) for reference in references])
    return np.array(rows)


def _addresses(fields: list[h5d.DatasetID], count: int) -> np.ndarray:
    """(5, n) addresses that the references of a bbox hold; a field of another length is refused by HDF5."""
    addresses, space = np.empty((len(fields), count), dtype=np.uint64), h5s.create_simple((count,))
    for row, field in zip(addresses, fields, strict=True):
        field.read(space, h5s.ALL, row, h5t.STD_REF_OBJ)
    return addresses


def _name(data: h5d.DatasetID) -> str:
    characters = np.empty(_count(data, 16), dtype=np.uint16)
    data.read(h5s.create_simple(characters.shape), h5s.ALL, characters)
    name = "".join(map(chr, characters))
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a picture, such as 1.png")
    return name


def _check(table: np.ndarray) -> tuple[int, str] | None:
    """The first row of (D, 5) that is no box with a label from 1 to 10, and what is wrong with it."""
    with np.errstate(invalid="ignore"):
        for good, wrong in (
            (np.abs(table).max(axis=1, initial=0.0) <= 1e6, "a box is not finite"),
            ((table[:, 2:4] > 0).all(axis=1), "a box is empty"),
            (np.isin(table[:, 4], range(1, 11)), "a label is not 1 to 10"),
        ):
            if not good.all():
                row = int(np.argmin(good))
                return row, f"{wrong}: left, top, width, height, label = {table[row].tolist()}"
    return None


def _references(file: h5py.File, path: str, where: Path) -> np.ndarray:
    data = file.get(path)
    if not isinstance(data, h5py.Dataset) or h5py.check_ref_dtype(data.dtype) is not h5py.Reference:
        raise DigitStructError(f"{where} is HDF5, but not SVHN's digitStruct.mat: it has no references at {path}")
    size = where.stat().st_size
    entries = math.prod(data.shape)  # `data.size` is one of 64 bits in some versions of h5py, whose product would wrap
    if entries * LEAST > size:
        raise DigitStructError(f"{where} claims {entries} entries at {path}: more than its {size} bytes can hold")
    return data[()].reshape(-1)


def read_digit_struct(path: str | Path) -> DigitStruct:
    """Read the file entry by entry; about 10 s for the 33,402 entries of train.

    A missing, truncated or foreign file, and an entry that is no number, raise `DigitStructError` (or
    `FileNotFoundError`) that names the file and the entry, counted from 1 as the pictures are.

    >>> import tempfile
    >>> note = Annotation("1.png", 40, 20, np.array([[3.0, 4.0, 8.0, 12.0]]), np.array([0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_digit_struct(Path(folder) / "digitStruct.mat", [note])
    ...     read_digit_struct(Path(folder) / "digitStruct.mat").labels.tolist()
    [0]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: download the data set, or check the folder's name")
    try:
        with h5py.File(path, "r") as file:
            return _read(file, path)
    except DigitStructError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DigitStructError(f"{path} cannot be read as digitStruct.mat, it may be truncated: {error}") from error


def _read(file: h5py.File, path: Path) -> DigitStruct:
    names = _references(file, "digitStruct/name", path)
    boxes = _references(file, "digitStruct/bbox", path)
    if len(names) != len(boxes):
        raise DigitStructError(f"{path} has {len(names)} names but {len(boxes)} boxes")
    found: dict[str, int] = {}  # the entry of each name
    tables, pending = [], []
    for entry, (name, box) in enumerate(zip(names, boxes, strict=True)):
        with _naming(path, entry, len(names)):
            fields, count = _fields(_open(box, file.id, h5g.GroupID))
            if count:
                pending.append(entry)
                tables.append(_addresses(fields, count))
            else:
                tables.append(np.array([[_number(field)] for field in fields]))
            own = _name(_open(name, file.id, h5d.DatasetID))
            if own in found:
                raise ValueError(f"its picture is {own}, which is the picture of entry {found[own] + 1} already")
            found[own] = entry
    _resolve(file, path, boxes, tables, pending)
    digits = np.cumsum([0, *(table.shape[1] for table in tables)])
    table = np.concatenate([np.zeros((5, 0)), *tables], axis=1).T
    fault = _check(table)
    if fault is not None:
        with _naming(path, int(np.searchsorted(digits, fault[0], side="right")) - 1, len(names)):
            raise ValueError(fault[1])
    return DigitStruct(list(found), digits, table[:, :4], (table[:, 4] % 10).astype(np.int64))


def _resolve(file: h5py.File, path: Path, boxes: np.ndarray, tables: list[np.ndarray], pending: list[int]) -> None:
    """Replace the addresses in the tables of the pending entries by the numbers they lead to."""
    if not pending:
        return
    with _naming(path, pending[0], len(boxes)):
        fields, count = _fields(_open(boxes[pending[0]], file.id, h5g.GroupID))
        references = np.empty(count, dtype=h5py.ref_dtype)
        fields[0].read(h5s.create_simple((count,)), h5s.ALL, references)
        like = _open(references[0], file.id, h5d.DatasetID)
        fast = LoneNumbers(file, path, like, int(tables[pending[0]][0, 0]), _number(like))
    known = np.zeros(0, dtype=bool)
    if fast.usable:
        values, known = fast.read(np.concatenate([tables[entry].ravel() for entry in pending]))
    start = 0
    for entry in pending:
        part = slice(start, start + tables[entry].size)
        start = part.stop
        if len(known) and known[part].all():
            tables[entry] = values[part].reshape(5, -1)
            continue
        with _naming(path, entry, len(boxes)):
            tables[entry] = _follow(_open(boxes[entry], file.id, h5g.GroupID), file.id)


@contextmanager
def _naming(path: Path, entry: int, entries: int) -> Iterator[None]:
    """Whatever goes wrong is reported with the file and the entry, counted from 1."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DigitStructError(f"{path}, entry {entry + 1} of {entries}: {error}") from error


def load_digit_struct(path: str | Path) -> DigitStruct:
    """As `read_digit_struct`, but the second time from an index in the cache, as long as the file has not changed."""
    path = Path(path).resolve()
    if not path.is_file():
        return read_digit_struct(path)
    index = _index(path)
    try:
        stored = load_arrays(index, INDEX)
    except (OSError, DamagedFile):
        data = read_digit_struct(path)
    else:
        return DigitStruct([name.decode() for name in stored["names"]], *(stored[part] for part in INDEX[1:]))
    try:
        save_arrays(index, data._asdict() | {"names": np.array(data.names, dtype="S13")})
    except OSError as error:
        warnings.warn(f"{path} will be read anew each time: its index {index} cannot be kept ({error})", stacklevel=2)
    return data


INDEX = DigitStruct._fields


def _index(path: Path) -> Path:
    """The file in the cache that holds what was read from this one in its present state by this reader."""
    state = path.stat()
    key = b"\0".join(
        [os.fsencode(path), str(state.st_size).encode(), str(state.st_mtime_ns).encode(), Path(__file__).read_bytes()]
    )
    return cache_folder("svhn") / f"{hashlib.sha256(key).hexdigest()[:24]}.npz"


def write_digit_struct(path: str | Path, annotations: list[Annotation]) -> None:
    """Write annotations as SVHN has them, down to MATLAB's header and its references."""
    with replacing(Path(path)) as temporary:
        with h5py.File(temporary, "w", userblock_size=512, libver="earliest") as file:
            pool = file.create_group("#refs#")
            writer = _Writer(file, pool)
            names = [writer.text(note.name) for note in annotations]
            boxes = [writer.box(note) for note in annotations]
            group = file.create_group("digitStruct")
            group.attrs["MATLAB_class"] = np.bytes_("struct")
            for field, references in (("name", names), ("bbox", boxes)):
                data = group.create_dataset(field, (len(references), 1), dtype=h5py.ref_dtype)
                data.attrs["MATLAB_class"] = np.bytes_("cell")
                if references:
                    data[:, 0] = np.array(references, dtype=h5py.ref_dtype)
        header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Oct  3 12:00:00 2011 HDF5 schema 1.00 ."
        with open(temporary, "r+b") as raw:
            raw.write(header.ljust(116) + bytes(8) + b"\x00\x02IM")


class _Writer:
    """Puts values into the pool `#refs#` under running names, and returns references to them."""

    def __init__(self, file: h5py.File, pool: h5py.Group) -> None:
        self.file, self.pool, self.count = file, pool, 0
        self.scalar = h5s.create_simple((1, 1))

    def _next(self) -> bytes:
        self.count += 1
        return f"r{self.count}".encode()

    def _number(self, where: h5g.GroupID, name: bytes, value: float) -> None:
        data = h5d.create(where, name, h5t.IEEE_F64LE, self.scalar)
        data.write(h5s.ALL, h5s.ALL, np.array([[value]], dtype=np.float64))

    def text(self, text: str) -> h5py.Reference:
        """A column of 16-bit characters."""
        name = self._next()
        characters = np.array([[ord(c)] for c in text], dtype=np.uint16)
        data = h5d.create(self.pool.id, name, h5t.STD_U16LE, h5s.create_simple(characters.shape))
        data.write(h5s.ALL, h5s.ALL, characters)
        return h5r.create(self.pool.id, name, h5r.OBJECT)

    def box(self, note: Annotation) -> h5py.Reference:
        """A group of five fields: numbers for one digit, columns of references for more."""
        name = self._next()
        group = h5g.create(self.pool.id, name)
        labels = np.where(note.labels == 0, 10, note.labels)
        columns = dict(zip(FIELDS, [*np.asarray(note.boxes, dtype=float).T, labels], strict=True))
        for field, values in sorted(columns.items()):
            if len(values) == 1:
                self._number(group, field, values[0])
                continue
            references = np.empty((len(values), 1), dtype=h5py.ref_dtype)
            for k, value in enumerate(values):
                own = self._next()
                self._number(self.pool.id, own, value)
                references[k, 0] = h5r.create(self.pool.id, own, h5r.OBJECT)
            space = h5s.create_simple(references.shape)
            data = h5d.create(group, field, h5t.STD_REF_OBJ, space)
            data.write(h5s.ALL, h5s.ALL, references)
        return h5r.create(self.pool.id, name, h5r.OBJECT)

"""Many lone numbers of an HDF5 file at once.

MATLAB stores every element of a cell array as a data set of its own, and to open one takes HDF5 longer than to read
thousands of bytes. But an object header that equals, byte for byte, one that HDF5 has just read, save for the address
of the data and the time of writing, says the same: a number of that type, at that address. So HDF5 reads one number,
NumPy fetches all whose headers agree, and whatever differs in any other byte is left to HDF5.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from h5py import h5d

__all__ = ["LoneNumbers"]

PREFIX = 16  # bytes of a version 1 object header before its messages
LONGEST = 2048  # bytes of a header that is worth comparing
BATCH = 50_000
IGNORED = (0x0000, 0x000E, 0x0012)  # messages that say nothing of the data: padding, times of writing


def _what_matters(header: np.ndarray) -> np.ndarray:
    """Which bytes of a version 1 object header have to agree: all but the count of links and what is IGNORED."""
    matters = np.ones(len(header), dtype=bool)
    matters[4:8] = False
    at = PREFIX
    while at + 8 <= len(header):
        kind, size = (int(v) for v in header[at : at + 4].view("<u2"))
        if kind in IGNORED:
            matters[at + 8 : at + 8 + size] = False
        at += 8 + size
    return matters


class LoneNumbers:
    """Numbers by the addresses that object references hold, of one open file.

    `usable` says whether the header of `like` was understood.

    Args:
        file: that holds them, open.
        path: of the file.
        like: a float64 data set of one element, read already.
        address: of its header.
        value: what it holds.
    """

    def __init__(self, file: h5py.File, path: Path, like: h5d.DatasetID, address: int, value: float) -> None:
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self.base = file.userblock_size
        self.template = np.zeros(0, dtype=np.uint8)
        start = address + self.base
        header = self.bytes[start : start + PREFIX]
        if len(header) < PREFIX or header[0] != 1 or like.get_storage_size() != 8 or like.get_offset() is None:
            return
        length = PREFIX + int(header[8:12].view("<u4")[0])
        if length > LONGEST or start + length > len(self.bytes):
            return
        template = np.array(self.bytes[start : start + length])
        for offset in {like.get_offset(), like.get_offset() - self.base}:
            at = template.tobytes().find(int(offset).to_bytes(8, "little"))
            if at >= 0 and self._floats(np.array([offset + self.base]))[0] == value:
                self.template, self.at, self.matters = template, at, _what_matters(template)

    @property
    def usable(self) -> bool:
        return len(self.template) > 0

    def _gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(n, length) bytes from each start on; zeros where that is beyond the file's end."""
        inside = starts < len(self.bytes) - length
        index = np.where(inside, starts, 0)[:, None] + np.arange(length)
        return self.bytes[index] * inside[:, None].astype(np.uint8)

    def _floats(self, starts: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._gather(starts, 8)).view("<f8")[:, 0]

    def read(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values at the addresses, and which of them are known to be right."""
        values, known = np.full(len(addresses), np.nan), np.zeros(len(addresses), dtype=bool)
        length, hole = len(self.template), slice(self.at, self.at + 8)
        for first in range(0, len(addresses), BATCH):
            part = slice(first, first + BATCH)
            where = addresses[part].astype(np.int64)
            headers = self._gather(np.maximum(where, 0) + self.base, length)
            data = np.ascontiguousarray(headers[:, hole]).view("<i8")[:, 0]
            headers[:, hole] = self.template[hole]
            known[part] = (headers == self.template)[:, self.matters].all(axis=1) & (where > 0) & (data > 0)
            known[part] &= data < len(self.bytes) - self.base - 8
            values[part] = self._floats(np.where(known[part], data, 0) + self.base)
        return values, known

"""The ledger: every number that the book prints comes from a run that is on record.

A chapter opens a `Ledger`, writes its numbers into it and closes it; the file `results/<chapter>.<profile>.json` beside
the chapter then holds them together with their provenance. The text takes its numbers from that file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lipguide.files import write_json

__all__ = ["PROFILES", "Ledger", "lookup", "read"]

PROFILES = ("quick", "full")  # how much a chapter computes: two CPU cores and two minutes, or the real training


class Ledger:
    """Collects a chapter's numbers and saves them with where, when and how they came about.

    Args:
        chapter: the chapter's name; the file is `results/<chapter>.<profile>.json`.
        profile, device, seed: the chapter's parameters.
        folder: where the file goes; by default `results` in the working folder, which is the chapter's own.

    >>> import tempfile, torch
    >>> ledger = Ledger("why", "quick", "cpu", 0, folder=tempfile.mkdtemp())
    >>> ledger["radius"] = torch.tensor(0.25)
    >>> read(ledger.save())["results"]
    {'radius': 0.25}
    """

    def __init__(self, chapter: str, profile: str, device: str, seed: int, folder: str | Path | None = None) -> None:
        import torch  # not before: pages that only read ledgers are rendered without it

        from lipguide.provenance import provenance

        self.path = Path(folder or os.environ.get("LIPGUIDE_RESULTS", "results")) / f"{chapter}.{profile}.json"
        self.results: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        made_by = provenance(device, seed, ignoring=["book/results"])  # which is where ledgers go
        self.provenance: dict[str, Any] = {"profile": profile, **made_by, "data": None}

    def __setitem__(self, key: str, value: Any) -> None:
        self.results[key] = _plain(value, key)

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def used(self, name: str, fingerprint: str) -> None:
        """Name the data set behind the numbers and the hash of its content."""
        self.provenance["data"] = {"name": name, "hash": fingerprint}

    def save(self, seconds: float | None = None) -> Path:
        """Write the file, whole or not at all, and return its path.

        Args:
            seconds: that the results took; None for the time since the ledger was opened.
        """
        self.provenance["seconds"] = round(time.perf_counter() - self._began if seconds is None else seconds, 2)
        self.provenance["peak_memory_mib"] = round(self._peak_memory() / 2**20)
        return write_json(self.path, {"provenance": self.provenance, "results": self.results})

    def _peak_memory(self) -> int:
        """Bytes: of the GPU where there is one, else of this process."""
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def read(path: str | Path) -> dict[str, Any]:
    """The content of a ledger file; an unreadable one is named.

    >>> read("nowhere.json")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no ledger nowhere.json: run the chapter first (python -m lipguide build --only CHAPTER)
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no ledger {path}: run the chapter first (python -m lipguide build --only CHAPTER)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a ledger: {error}; delete it and run the chapter again") from error
    if not isinstance(content, dict) or set(content) != {"provenance", "results"}:
        raise ValueError(f"{path} is not a ledger: it should hold 'provenance' and 'results'")
    return content


def lookup(content: Any, key: str) -> Any:
    """A value by its path: names, which may hold dots themselves, and list positions, separated by dots.

    >>> lookup({"curve": [{"clean.map": 0.5}]}, "curve.0.clean.map")
    0.5
    """
    if not key:
        return content
    for name, rest in _splits(key):
        if isinstance(content, dict) and name in content:
            return lookup(content[name], rest)
        if isinstance(content, list) and name.isdigit() and int(name) < len(content):
            return lookup(content[int(name)], rest)
    raise KeyError(f"nothing at {key!r}; there is: {_names_in(content)}")


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Every way to split off a first name, the longest first, for names may hold dots themselves.

    >>> list(_splits("curve.0"))
    [('curve.0', ''), ('curve', '0')]
    """
    parts = key.split(".")
    for i in range(len(parts), 0, -1):
        yield ".".join(parts[:i]), ".".join(parts[i:])


def _names_in(content: Any) -> str:
    if isinstance(content, dict):
        return ", ".join(content)
    if isinstance(content, list):
        return f"{len(content)} items"
    return str(content)


def _plain(value: Any, key: str) -> Any:
    """Tensors, arrays and numbers as JSON has them. NaN has no place in a ledger."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{key}.{i}") for i, v in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}: only finite numbers go on record")
        return float(f"{value:.6g}")
    if value is None or isinstance(value, str | int | bool):
        return value
    raise TypeError(f"{key} is a {type(value).__name__}; record numbers, text, or lists and dicts of those")

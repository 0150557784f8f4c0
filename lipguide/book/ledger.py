"""The ledger: every number that the book prints comes from a run that is on record.

A chapter opens a `Ledger`, writes its numbers into it and closes it; the file `results/<chapter>.<profile>.json` beside
the chapter then holds them together with their provenance. The text takes its numbers from that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["Ledger", "device_name", "lock_hash", "lookup", "read", "write_json"]

PACKAGE = Path(__file__).resolve().parents[1]


class Ledger:
    """Collects a chapter's numbers and saves them with where, when and how they came about.

    Args:
        chapter: the chapter's name; the file is `results/<chapter>.<profile>.json`.
        profile, device, seed: the chapter's parameters.
        folder: where the file goes; by default `results` in the working folder, which is the chapter's own.

    >>> import tempfile
    >>> ledger = Ledger("why", "quick", "cpu", 0, folder=tempfile.mkdtemp())
    >>> ledger["radius"] = torch.tensor(0.25)
    >>> read(ledger.save())["results"]
    {'radius': 0.25}
    """

    def __init__(self, chapter: str, profile: str, device: str, seed: int, folder: str | Path | None = None) -> None:
        self.path = Path(folder or os.environ.get("LIPGUIDE_RESULTS", "results")) / f"{chapter}.{profile}.json"
        self.results: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self.provenance: dict[str, Any] = {
            "commit": _commit("book/results", *(["lipguide/weights"] if profile == "train" else [])),
            "lock": lock_hash(),
            "profile": profile,
            "device": device_name(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seed": seed,
            "data": None,
            "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

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
        peak = torch.cuda.max_memory_allocated() if self._cuda else _peak_memory()
        self.provenance["peak_memory_mib"] = round(peak / 2**20)
        return write_json(self.path, {"provenance": self.provenance, "results": self.results})


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
    if isinstance(content, dict) and key in content:
        return content[key]
    # Names may hold dots themselves: try every way to split off a first one.
    parts = key.split(".")
    for i in range(1, len(parts)):
        first, rest = ".".join(parts[:i]), ".".join(parts[i:])
        if isinstance(content, dict) and first in content:
            return lookup(content[first], rest)
    if isinstance(content, list) and parts[0].isdigit() and int(parts[0]) < len(content):
        return lookup(content[int(parts[0])], ".".join(parts[1:])) if parts[1:] else content[int(parts[0])]
    there = (
        ", ".join(content)
        if isinstance(content, dict)
        else f"{len(content)} items"
        if isinstance(content, list)
        else content
    )
    raise KeyError(f"nothing at {key!r}; there is: {there}")


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON under a temporary name, then rename: readers see the old file or the new one, never half of one.

    >>> import tempfile
    >>> write_json(Path(tempfile.mkdtemp()) / "a.json", {"b": 1}).read_text()
    '{\\n  "b": 1\\n}\\n'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(
            json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def lock_hash() -> str:
    """The first 12 digits of the SHA-256 of environment.yml, or "none" where the package stands without it.

    >>> len(lock_hash()) in (4, 12)
    True
    """
    lock = PACKAGE.parent / "environment.yml"
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:12] if lock.exists() else "none"


def device_name(device: str) -> str:
    """What the device is called, for people.

    >>> device_name("cpu") != ""
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} ({len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores)"


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


def _commit(*products: str) -> str:
    """The commit of the checkout, with a plus sign where tracked files differ from it, apart from what runs write."""
    try:
        git = ["git", "-C", str(PACKAGE.parent)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        others = [f":!{path}" for path in products]  # they say nothing about the code that ran
        changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *others]
        status = subprocess.run(changed, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024

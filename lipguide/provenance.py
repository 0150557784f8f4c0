"""What a run was made by: the commit, the locked environment, the machine, the seed, and when it began."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["commit", "cores", "device_name", "lock_hash", "provenance"]

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, where the package lies in one


def provenance(device: str | torch.device, seed: int, ignoring: Sequence[str] = ()) -> dict[str, Any]:
    """What a run that begins now is made by, in values that JSON can hold.

    Call it before the run: code that changes while it runs is not the code that ran.

    Args:
        device: that the run computes on.
        seed: of the run.
        ignoring: paths of the checkout that runs write, such as "book/results": that they differ from the commit says
            nothing about the code that ran.

    >>> made_by = provenance("cpu", seed=0)
    >>> sorted(made_by)
    ['commit', 'device', 'lock', 'python', 'seed', 'start', 'threads', 'torch']
    """
    return {
        "commit": commit(ignoring),
        "lock": lock_hash(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit(ignoring: Sequence[str] = ()) -> str:
    """The commit of the checkout, with a plus sign where its files differ from it; "unknown" outside a checkout.

    Args:
        ignoring: paths that may differ.

    >>> commit() == "unknown" or len(commit()) in (12, 13)
    True
    """
    try:
        # A package installed somewhere below another project's repository must not name that project's commit.
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        head = _git("rev-parse", "--short=12", "HEAD")
        others = [f":!{path}" for path in ignoring]
        changed = _git("status", "--porcelain", "--", ".", *others)  # new files count too, those of .gitignore do not
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changed else head


def _git(*arguments: str) -> str:
    """What git says about the checkout; asked so that it takes no lock, which could stop a git at work beside it."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def lock_hash() -> str:
    """The first 12 digits of the SHA-256 of environment.yml, or "none" where the package stands without it.

    >>> len(lock_hash()) in (4, 12)
    True
    """
    lock = ROOT / "environment.yml"
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:12] if lock.exists() else "none"


def device_name(device: str | torch.device) -> str:
    """What the device is called, for people.

    >>> device_name("cpu") != ""
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return f"{_processor()} ({cores()} cores)"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int | None:
    """The cores that this process may use, where the system says it.

    >>> cores() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()

"""Work shared between processes, which are started afresh (no fork): it does not matter what threads or devices the
process that starts them holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

__all__ = ["command", "share"]

WORKER = Path(__file__).with_name("worker.py")


def command(task: dict) -> list[str]:
    """The command line of a process that does a task; see `worker`.

    >>> Path(command({"make": "glyphs"})[1]).name
    'worker.py'
    """
    return [sys.executable, str(WORKER), json.dumps(task)]


def share(task: dict, parts: list, workers: int, bar: tqdm) -> None:
    """Let processes do the parts of a task; they report what is done through one pipe. End them all on any error."""
    processes: list[subprocess.Popen] = []
    receive, send = os.pipe()
    workers = min(workers, len(parts))
    with open(receive, encoding="ascii") as reports, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            with open(send, "w", encoding="ascii") as output:
                for own in (parts[k::workers] for k in range(workers)):
                    line = command({**task, "parts": own})
                    processes.append(subprocess.Popen(line, stdout=output, stderr=complaints, env=_environment()))
            for done in reports:
                bar.update(int(done))
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if any(statuses):
            complaints.seek(0)
            last = complaints.read().strip().splitlines()[-1:] or ["it left no message"]
            raise RuntimeError(f"a process that makes synthetic house numbers ended early: {last[0]}")


def _environment() -> dict[str, str]:
    """Of processes of one thread, as there is one a core; and a memory that glibc keeps instead of handing it back to
    the system and asking for it again, a thousand pages a scene."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    memory = {"MALLOC_MMAP_THRESHOLD_": 1 << 25, "MALLOC_TRIM_THRESHOLD_": 1 << 28, "MALLOC_TOP_PAD_": 1 << 25}
    return os.environ | threads | {name: str(size) for name, size in memory.items()}

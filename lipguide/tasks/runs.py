"""Records made of many runs: each run is made once, and several seeds are told by their mean and their range."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lipguide import deadline
from lipguide.files import write_json

__all__ = ["once", "spread"]


def once(path: Path, wanted: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a run gave: read from its file, or made and written there.

    Args:
        path: the file of the run.
        wanted: what the run is asked to be, as JSON has it. A file that says otherwise is an error.
        make: trains and measures.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "run.json")
    >>> once(path, {"seed": 0}, lambda: {"accuracy": 0.5}) == once(path, {"seed": 0}, lambda: 1 / 0)
    True
    """
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if any(kept.get(key) != value for key, value in wanted.items()):
            raise ValueError(f"{path} was made by another run ({wanted} here): move it away or name another folder")
        return kept
    deadline.check(f"{path.stem} has not been begun")
    entry = {**wanted, **make()}
    write_json(path, entry)
    return entry


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean of several seeds, and from the least to the largest.

    >>> spread([1.0, 2.0, 6.0])
    {'mean': 3.0, 'least': 1.0, 'most': 6.0}
    """
    return {"mean": statistics.mean(values), "least": min(values), "most": max(values)}

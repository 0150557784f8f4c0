"""`make bench`: every result of a run goes into one table and one JSON file with its provenance.

LIPGUIDE_BENCH=full runs the whole grid (some ten minutes on two cores) and replaces the ledger that the book shows; the
quick grid goes to _build. LIPGUIDE_DEVICE=cuda runs either on a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

from lipguide.book.ledger import Ledger

PROFILE = os.environ.get("LIPGUIDE_BENCH", "quick")
DEVICE = os.environ.get("LIPGUIDE_DEVICE", "cpu")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results" if PROFILE == "full" else ROOT / "_build" / "bench"
LEDGER = pytest.StashKey[Ledger]()


def pytest_configure(config: pytest.Config) -> None:
    if PROFILE not in ("quick", "full"):
        raise pytest.UsageError(f"LIPGUIDE_BENCH={PROFILE!r}: choose quick or full")
    # Tests keep to one thread each; what is timed has the machine to itself.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    config.stash[LEDGER] = Ledger("bench", PROFILE, DEVICE, 0, folder=RESULTS)


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Puts a named table of costs on record."""

    def put(name: str, rows: dict[str, dict[str, object]]) -> None:
        request.config.stash[LEDGER][name] = rows

    return put


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    ledger = session.config.stash[LEDGER]
    whole = session.testscollected and not session.config.option.keyword and not session.config.option.markexpr
    if exitstatus == 0 and whole and ledger.results:  # a part of the grid must not replace the whole
        ledger.provenance["threads"] = torch.get_num_threads()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        ledger.provenance["load"] = load
        ledger.save()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    ledger = config.stash[LEDGER]
    for name, rows in ledger.results.items():
        terminalreporter.section(name)
        columns = list(next(iter(rows.values())))
        width = max(map(len, rows))
        terminalreporter.write_line(" " * width + "".join(f"{column:>12}" for column in columns))
        for row, values in rows.items():
            cells = "".join(f"{v:>12.4g}" if isinstance(v, float | int) else f"{v!s:>12}" for v in values.values())
            terminalreporter.write_line(f"{row:<{width}}{cells}")
    if ledger.path.exists() and ledger.results:
        terminalreporter.write_line(f"on record: {ledger.path}")

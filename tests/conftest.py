"""Tests run in several processes side by side (pytest -n), so each keeps to one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from tests.forked import Forked

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, empty at its beginning."""
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def forked():
    """Runs code in processes of their own that have torch already."""
    forked = Forked()
    yield forked
    forked.close()

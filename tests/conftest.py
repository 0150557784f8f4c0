"""Tests run in several processes side by side (pytest -n), so each keeps to one thread."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from tests.forked import Forked

gc.disable()  # until all tests are collected: what that makes stays to the end, and to look through it takes time


def pytest_collection_finish():
    """What is there now no collection needs to look through again, and what comes need not be looked through often:
    that would be a sixth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, empty at its beginning."""
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def forked():
    """Runs code in processes of their own that have torch and torchvision, and what an optimizer imports at first."""
    forked = Forked("torch._dynamo", "torchvision")
    yield forked
    forked.close()

"""Scenes a second of one core, from the seed to the squares that a network reads.

The fastest of several rounds counts: other processes can only slow a round down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lipguide.data import Difficulty
from lipguide.data.crops import Cutting
from lipguide.data.shn.cuttings import make_rows
from lipguide.data.shn.pages import Pages
from lipguide.data.shn.rendering import render
from tests.benchmarks.conftest import PROFILE

SCENES, ROUNDS = (400, 5) if PROFILE == "full" else (60, 3)


def seconds_each(work: Callable[[int], object]) -> float:
    """Seconds a scene, each scene at its fastest."""
    best = [float("inf")] * SCENES
    for _ in range(ROUNDS):
        for index in range(SCENES):
            start = time.perf_counter()
            work(index)
            best[index] = min(best[index], time.perf_counter() - start)
    return sum(best) / SCENES


def test_scenes_a_second(record):
    drawn = [render("train", 0, index, Difficulty()) for index in range(SCENES)]
    pages = Pages.of(drawn)
    stages = {"draw": seconds_each(lambda k: render("train", 0, k, Difficulty()))}
    for view, side in (("number", 74), ("frame", 74), ("digits", 32)):
        cutting = Cutting(view, side)
        stages[f"cut, {view}"] = seconds_each(lambda k, cutting=cutting: make_rows(pages, range(k, k + 1), cutting))
    record(
        "scenes of one core", {name: {"ms/scene": 1e3 * each, "scenes/s": 1 / each} for name, each in stages.items()}
    )
    assert stages["cut, digits"] < stages["draw"]

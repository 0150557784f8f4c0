"""A time limit: `--minutes N` sets it, and whatever takes long looks at it and stops where it can go on later.

Queues, notebooks and clouds hand out time in slices. The limit is an environment variable, so that the kernels which
run the chapters, and the trainings inside them, inherit it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["OutOfTime", "check", "grace", "is_up", "left", "limit"]

VARIABLE = "LIPGUIDE_DEADLINE"
KEPT = 0.05  # the share of a slice that is kept for writing down what there is


class OutOfTime(Exception):
    """The time is up: what is whole is kept, and the same call goes on from there."""


@contextmanager
def limit(minutes: float) -> Iterator[None]:
    """Within it, work stops in time for the block to be over after `minutes`: when a twentieth of them is left.

    Args:
        minutes: from now.

    >>> with limit(1.0):
    ...     56 < left() < 57.1
    True
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}: it must be a positive number")
    before = os.environ.get(VARIABLE)
    kept = 60 * minutes * KEPT
    os.environ[VARIABLE] = f"{time.time() + 60 * minutes - kept} {kept}"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def left() -> float:
    """Seconds until work should stop; infinite where no limit was set, negative where it has passed.

    >>> left()
    inf
    """
    if VARIABLE not in os.environ:
        return math.inf
    moment, _ = os.environ[VARIABLE].split()
    return float(moment) - time.time()


def grace() -> float:
    """Seconds that work has from then on, before whoever started it must end it: half of what is kept.

    >>> with limit(10.0):
    ...     round(grace())
    15
    """
    _, kept = os.environ[VARIABLE].split()
    return float(kept) / 2


def is_up() -> bool:
    """Whether the time is up. Processes that run together ask together, and hear the same.

    >>> is_up()
    False
    """
    if VARIABLE not in os.environ:
        return False
    from lipguide.distributed import gathered  # not before: the command line waits for no torch

    return any(gathered(left() <= 0))


def check(unfinished: str) -> None:
    """Raise OutOfTime if the time is up, as `is_up` says.

    Args:
        unfinished: what is left to do, for the message.

    >>> check("7 of 10 chapters are left")
    """
    if is_up():
        raise OutOfTime(unfinished)

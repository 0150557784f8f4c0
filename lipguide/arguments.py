"""What every room asks of the numbers that it is called with; without torch, for workers that make scenes need it."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

__all__ = ["pair", "whole"]


def whole(name: str, value: SupportsIndex, why: str = "", least: int = 1) -> int:
    """The value as an `int`, if it is a whole number and large enough; else a `ValueError` that names it.

    A whole number of numpy or of torch is one. True and False are none, and neither is 2.0.

    Args:
        name: what the caller calls it.
        value: to be looked at.
        why: it must be one, for the message.
        least: the smallest that is allowed.

    >>> whole("kernel_size", 2, "a window has one pixel or more an axis")
    2
    >>> whole("steps", True)
    Traceback (most recent call last):
    ...
    ValueError: steps is True: give it a whole number ≥ 1
    """
    number = _as_int(value)
    if number is None or number < least:
        because = f"{why}, so give" if why else "give"
        raise ValueError(f"{name} is {value!r}: {because} it a whole number ≥ {least}")
    return number


def _as_int(value: Any) -> int | None:
    """The `int` that a value stands for, or None; what has a truth for a type stands for none, torch's tensors too."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def pair(name: str, value: SupportsIndex | tuple[int, int], why: str) -> tuple[int, int]:
    """One whole number for both axes, or two.

    >>> pair("kernel_size", 2, "a window has one pixel or more an axis")
    (2, 2)
    """
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{name} is {value!r}: a picture has two axes, so give it one whole number or two")
    return whole(name, both[0], why), whole(name, both[1], why)

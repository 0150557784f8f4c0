"""What layers ask of the numbers that they are built with."""

from __future__ import annotations

__all__ = ["pair", "whole"]


def whole(name: str, value: int, why: str, least: int = 1) -> int:
    """The value, if it is a whole number and large enough; else a `ValueError` that says why it must be.

    >>> whole("kernel_size", 2, "a window has one pixel or more an axis")
    2
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: {why}, so give it a whole number ≥ {least}")
    return value


def pair(name: str, value: int | tuple[int, int], why: str) -> tuple[int, int]:
    """One whole number for both axes, or two.

    >>> pair("kernel_size", 2, "a window has one pixel or more an axis")
    (2, 2)
    """
    both = (value, value) if not isinstance(value, tuple | list) else tuple(value)
    if len(both) != 2:
        raise ValueError(f"{name} is {value!r}: a picture has two axes, so give it one whole number or two")
    return whole(name, both[0], why), whole(name, both[1], why)

"""What functions of the data ask of the numbers that they are called with."""

from __future__ import annotations

import operator
from typing import SupportsIndex

__all__ = ["whole"]


def whole(name: str, value: SupportsIndex, least: int) -> int:
    """The value, if it is a whole number and large enough; else a `ValueError` that names it.

    >>> whole("size", 74, 1)
    74
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}: give it a whole number ≥ {least}")
    return number

"""What a rule for a layer is asked about, a call of it, and how it says that it knows no bound."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

__all__ = ["Call", "NoBound", "check_batched"]


class Call(NamedTuple):
    """The shapes of a layer's input and output in one forward pass."""

    input: tuple[int, ...]
    output: tuple[int, ...]


class NoBound(Exception):
    """A layer, or something in a forward, that has no Lipschitz bound or none that is known; the text says why."""


def check_batched(layer: nn.Module, call: Call) -> None:
    """A layer named …2d takes (C, H, W) for one sample, where the pictures at hand were meant as (N, H, W).

    >>> check_batched(nn.MaxPool2d(3), Call((1, 8, 8), (1, 2, 2)))
    Traceback (most recent call last):
    lipguide.bounds.calls.NoBound: it gets (1, 8, 8), which it takes for one sample ...
    """
    names = (re.search(r"([123])d$", kind.__name__) for kind in type(layer).__mro__)
    axes = next((int(name[1]) for name in names if name), None)
    if axes is not None and len(call.input) != axes + 2:
        wanted = ", ".join(("N", "C", *"DHW"[3 - axes :])) if axes > 1 else "N, C, L"
        raise NoBound(
            f"it gets {call.input}, which it takes for one sample of {call.input[0]} channels; give it ({wanted})"
        )

"""SVHN's geometry in figures, as published: what its synthetic twin is drawn from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["PERCENTILES", "svhn_facts"]

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@cache
def svhn_facts() -> dict[str, Any]:
    """SVHN's geometry in figures for "train" and "test": counts, and percentiles 1, 5, 25, 50, 75, 95, 99.

    Computed from the public annotations; label 10 stands for the digit 0, as in SVHN itself.

    >>> svhn_facts()["train"]["images"]
    33402
    """
    return json.loads(Path(__file__).with_name("svhn_facts.json").read_text(encoding="utf-8"))

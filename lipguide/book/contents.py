"""The pages of a book in reading order, as its table of contents has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

__all__ = ["pages_of"]


def pages_of(root: Path) -> list[str]:
    """Every page that `_toc.yml` names, in reading order, without the ending.

    Args:
        root: the folder with _toc.yml.

    >>> pages_of(Path(__file__).parents[2])[:2]
    ['book/index', 'book/quickstart']
    """
    return list(_pages(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def _pages(entry: dict) -> Iterator[str]:
    if "root" in entry or "file" in entry:
        yield entry.get("root") or entry["file"]
    for key in ("parts", "chapters", "sections"):
        for child in entry.get(key, []):
            yield from _pages(child)

"""Notebooks to take away: the roles and directives of the book become the text that its pages show.

Jupyter knows plain Markdown. A reader who opens a chapter there should find "classifies 99 % of new points", not a role
that only this book's builder understands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import nbformat

__all__ = ["Resolver", "plain_markdown", "resolve_notebook"]

ROLE = re.compile(r"\{([a-z][\w:-]*)\}`([^`]*)`", re.S)
FENCE = re.compile(r"^(?P<mark>`{3,}|:{3,})\{(?P<name>[\w:-]+)\}[ ]*(?P<title>.*)$")
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
BOOKKEEPING = ("run-box",)  # of the built page; a notebook that runs anew has no use for it


class Resolver(Protocol):
    """What stands behind the names in a chapter's text."""

    def role(self, name: str, text: str) -> str:
        """The words that the page shows for a role."""

    def number(self, kind: str, label: str) -> str:
        """The number that the page shows for a theorem, an exercise or an equation; empty if it has none."""


def resolve_notebook(path: Path, resolver: Resolver) -> None:
    """Rewrite the Markdown cells of a notebook file in place."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "remove-cell" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain_markdown(cell.source, resolver)
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    nbformat.write(notebook, path)


def plain_markdown(text: str, resolver: Resolver) -> str:
    """A text without roles and directives.

    >>> class Page:
    ...     role = staticmethod(lambda name, text: "0.25")
    ...     number = staticmethod(lambda kind, label: "4")
    >>> print(plain_markdown("It is {ledger}`radius:.2f`.", Page()))
    It is 0.25.
    >>> print(plain_markdown("```{prf:theorem} Margin\\n:label: margin\\nIt holds.\\n```", Page()))
    > **Theorem 4 (Margin).**
    > It holds.
    """
    lines = list(_resolved(text.splitlines(), resolver))
    return ROLE.sub(lambda found: resolver.role(found[1], found[2]), "\n".join(lines))


def _resolved(lines: list[str], resolver: Resolver) -> Iterator[str]:
    """The lines with each directive replaced by plain Markdown, from the outside in."""
    place = 0
    while place < len(lines):
        line = lines[place]
        opened = FENCE.match(line)
        if opened is None:
            if not re.match(r"^\([\w-]+\)=$", line):  # a label
                yield line
            place += 1
            continue
        end = _end(lines, place, opened["mark"])
        options, body = _split(lines[place + 1 : end])
        yield from _directive(opened["name"], opened["title"].strip(), options, body, resolver)
        place = end + 1


def _end(lines: list[str], start: int, mark: str) -> int:
    """Where the fence that opens at `start` closes; at the end of the text if nowhere."""
    for place in range(start + 1, len(lines)):
        bare = lines[place].strip()
        if set(bare) == {mark[0]} and len(bare) >= len(mark):
            return place
    return len(lines)


def _split(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """A directive's options and its body."""
    options = {}
    while lines and (found := OPTION.match(lines[0])):
        options[found[1]] = found[2]
        lines = lines[1:]
    return options, lines


def _directive(name: str, title: str, options: dict[str, str], body: list[str], resolver: Resolver) -> Iterator[str]:
    label = options.get("label", "")
    if name in BOOKKEEPING:
        return
    if name == "math":
        number = resolver.number("equation", label) if label else ""
        yield from ["$$", *body, *([rf"\tag{{{number}}}"] if number else []), "$$"]
        return
    inner = list(_resolved(body, resolver))
    if name == "solution":
        heading = f"Solution of exercise {resolver.number('exercise', title)}".strip()
        yield from ["<details>", f"<summary>{heading}</summary>", "", *inner, "", "</details>"]
        return
    if name == "div":
        yield from inner
        return
    yield from _quoted(_heading(name, title, label, resolver), inner)


def _heading(name: str, title: str, label: str, resolver: Resolver) -> str:
    kind = name.rpartition(":")[2]
    if kind == "admonition":
        return title
    number = resolver.number(kind, label) if label else ""
    return f"{kind.capitalize()} {number}".strip() + (f" ({title})" if title else "")


def _quoted(heading: str, lines: list[str]) -> Iterator[str]:
    yield f"> **{heading}.**"
    yield from (f"> {line}".rstrip() for line in lines)

"""The guide's advice at a glance: one row each, with a verdict, the number that says so, the chapter and the call.

The rows are `book/guidelines.yml`. The directive `{guidelines}` makes tables of them, and each row links to the
sentence that bears it (`lipguide.book.marks`). What a row lacks fails the build (`faults`). A verdict that the ledgers
no longer bear fails the tests, on the ledgers that are committed: those of a busy machine should not decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.util.docutils import SphinxDirective

__all__ = ["VERDICTS", "Guidelines", "counts", "faults", "sections", "table", "tie"]

VERDICTS = ("agreed", "refined", "contradicted", "not tested")
FIELDS = {"at", "says", "verdict", "found", "chapter", "mark"}
NUMBER = re.compile(r"\{ledger\}`([\w-]+):([^`]+):[^`:]*`")
Row = dict[str, str]


def sections(path: str | Path) -> list[dict[str, Any]]:
    """The rows of the file, section by section.

    Args:
        path: a file such as `book/guidelines.yml`.
    """
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def faults(row: Row, chapters: set[str], number: Callable[[str, str], Any] | None) -> list[str]:
    """What a row lacks, in words; nothing if it is as it should be.

    Args:
        row: one entry of the file.
        chapters: the names of the pages that a row may link to.
        number: of a chapter's ledger, by the chapter's name and the key. It raises an error where there is none.
            Only a row with a condition (`holds`) asks for one.

    >>> row = {"at": "C", "says": "a", "verdict": "agreed", "found": "{ledger}`why:radius:.1f`", "chapter": "why"}
    >>> row["mark"] = "gap"
    >>> faults(row, {"why"}, lambda chapter, key: 0.5)
    []
    >>> faults(row | {"chapter": "whither", "found": "it is so"}, {"why"}, lambda chapter, key: 0.5)
    ["'a' links to no page: whither", "'a' has no number from a ledger"]
    >>> faults(row | {"holds": "why:radius > 0.7"}, {"why"}, lambda chapter, key: 0.5)
    ["'a': why:radius > 0.7 is no longer so (0.5, 0.7)"]
    """
    name = row.get("says", "a row without `says`")
    found = [f"{name!r} lacks {field}" for field in sorted(FIELDS - row.keys())]
    found += [f"{name!r} has a field that nobody reads: {f}" for f in sorted(row.keys() - FIELDS - {"call", "holds"})]
    if found:
        return found
    if row["verdict"] not in VERDICTS:
        found.append(f"{name!r} has a verdict that is none of {', '.join(VERDICTS)}: {row['verdict']}")
    if row["chapter"] not in chapters:
        found.append(f"{name!r} links to no page: {row['chapter']}")
    if row["verdict"] != "not tested" and not NUMBER.search(row["found"]):
        found.append(f"{name!r} has no number from a ledger")
    return found + _broken(row, number)


def _broken(row: Row, number: Callable[[str, str], Any]) -> list[str]:
    """Whether the condition of a verdict still holds."""
    if "holds" not in row:
        return []
    parts = re.fullmatch(r"(.+?) ([<>]) (.+)", row["holds"])
    if parts is None:
        return [f"{row['says']!r}: holds should read `key < key` or `key > number`, not {row['holds']!r}"]
    left, sign, right = parts.groups()
    a, b = _value(left, number), _value(right, number)
    if a < b if sign == "<" else a > b:
        return []
    return [f"{row['says']!r}: {row['holds']} is no longer so ({a:g}, {b:g})"]


def _value(text: str, number: Callable[[str, str], Any]) -> float:
    chapter, colon, key = text.partition(":")
    return float(number(chapter, key) if colon else text)


def counts(parts: list[dict[str, Any]]) -> dict[str, int]:
    """How many rows have each verdict.

    >>> counts([{"section": "A", "rows": [{"verdict": "agreed"}, {"verdict": "refined"}, {"verdict": "agreed"}]}])
    {'agreed': 2, 'refined': 1, 'contradicted': 0, 'not tested': 0}
    """
    found = [row["verdict"] for part in parts for row in part["rows"]]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def table(rows: list[Row]) -> list[str]:
    """The rows as lines of a MyST table.

    >>> row = {"at": "C", "says": "Be careful.", "verdict": "agreed", "found": "so", "chapter": "why", "call": "export"}
    >>> table([row])[2]
    '| C | Be careful. | **agreed** | so | {doc}`why` `lip.export` |'
    """
    lines = ["| § | the guide says | verdict | what a run says | chapter and call |", "|---|---|---|---|---|"]
    for row in rows:
        call = f" `lip.{row['call']}`" if "call" in row else ""
        where = f"{{doc}}`{row['chapter']}`{call}"
        cells = (row["at"], row["says"], f"**{row['verdict']}**", row["found"], where)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class Guidelines(SphinxDirective):
    """One table a section of `guidelines.yml`, which lies beside the page."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / Path(self.env.docname).parent / "guidelines.yml"
        self.env.note_dependency(str(path))
        parts = sections(path)
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts(parts).items())
        lines = [f"Of {sum(counts(parts).values())} pieces of advice: {told}.", ""]
        for part in parts:
            lines += [f"**{part['section']}**", "", *table(part["rows"]), ""]
        holder = nodes.container(classes=["guidelines"])
        self.state.nested_parse(StringList(lines, str(path)), self.content_offset, holder)
        tie(holder, [row for part in parts for row in part["rows"]])
        return [holder]


def tie(holder: nodes.Element, rows: list[Row]) -> None:
    """Give each line of the tables an anchor, and let its link to the chapter lead to the row's mark there.

    `lipguide.book.marks.aim` puts the anchor behind the address, when that is known.
    """
    lines = [line for body in holder.findall(nodes.tbody) for line in body]
    for line, row in zip(lines, rows, strict=True):
        line["ids"].append(f"guide-{row['mark']}")
        link = next(iter(line[-1].findall(pending_xref)))
        link.replace_self(nodes.inline("", "", link.deepcopy(), aim=f"advice-{row['mark']}"))

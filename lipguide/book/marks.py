"""Marks tie a row of the guide at a glance to the sentence that bears it.

    ... the attack broke none of them. {advice}`l2-attacks`

A mark is a small link to the row of `guidelines.yml` that has its key; the row links back to the very place. Before the
pages are read, all sources are looked through once (`faults_of_marks`): a row without its mark, a mark without its row,
or a row without evidence stops the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxRole

from lipguide.book.guidelines import Row, faults, sections

__all__ = ["Advice", "aim", "check", "faults_of_marks", "marks", "prose", "row_of", "words"]

MARK = re.compile(r"\{advice\}`([^`]*)`")
CELL = re.compile(r"^(`{3,})\{code-cell\}.*?^\1\s*$", re.S | re.M)
Parts = list[dict[str, Any]]


def marks(text: str) -> list[str]:
    """The keys of the marks in a text, in their order.

    >>> marks("It held. {advice}`l2-attacks` It did not. {advice}`environment`")
    ['l2-attacks', 'environment']
    """
    return MARK.findall(text)


def prose(path: Path) -> str:
    """What a page's source says besides code: of a chapter as it is written, or of its notebook.

    Args:
        path: a file of Markdown, or of a notebook.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return CELL.sub("", text)
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def faults_of_marks(parts: Parts, texts: dict[str, str]) -> list[str]:
    """What is wrong between rows and marks, in words; nothing if each row is tied to one place.

    Whether the verdicts still hold is not asked: that the tests ask, of the ledgers that are committed.

    Args:
        parts: the rows, section by section.
        texts: of each page by its name, what it says besides code.

    >>> row = {"at": "C", "says": "a", "verdict": "agreed", "found": "{ledger}`why:radius:.1f`", "chapter": "why"}
    >>> parts = [{"section": "A", "rows": [row | {"mark": "gap"}]}]
    >>> faults_of_marks(parts, {"why": "So it is. {advice}`gap`"})
    []
    >>> faults_of_marks(parts, {"why": "So it is."})
    ["'a' has no mark: put {advice}`gap` into why.md, behind the sentence that bears it"]
    """
    rows: list[Row] = [row for part in parts for row in part["rows"]]
    found = [said for row in rows for said in faults({k: v for k, v in row.items() if k != "holds"}, set(texts), None)]
    places = [(key, page) for page, text in texts.items() for key in marks(text)]
    keys = [row.get("mark", "") for row in rows]
    for row in rows:
        if row.get("chapter") in texts and "mark" in row and (row["mark"], row["chapter"]) not in places:
            where = f"put {{advice}}`{row['mark']}` into {row['chapter']}.md, behind the sentence that bears it"
            found.append(f"{row['says']!r} has no mark: {where}")
    for key in dict.fromkeys(key for key, _ in places):
        pages = [page for other, page in places if other == key]
        if key not in keys:
            found.append(f"{pages[0]}.md: the mark {key!r} names no row of guidelines.yml")
        if len(pages) > 1:
            found.append(f"the mark {key!r} stands {len(pages)} times, and should once: {', '.join(pages)}")
    return found + [f"the mark {key!r} is that of several rows" for key in _twice(keys)]


def _twice(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [name for name in dict.fromkeys(names) if name and names.count(name) > 1]


def row_of(env: BuildEnvironment, docname: str, key: str) -> Row:
    """The row of a mark, from the `guidelines.yml` that lies beside the page."""
    path = rows_beside(env, docname)
    for row in _rows(path, path.stat().st_mtime_ns):
        if row.get("mark") == key:
            return row
    raise KeyError(f"no row of {path.name} has the mark {key}")


def rows_beside(env: BuildEnvironment, docname: str) -> Path:
    """Where the rows of a page's marks are."""
    return Path(env.srcdir) / Path(docname).parent / "guidelines.yml"


@lru_cache(maxsize=4)
def _rows(path: Path, changed: int) -> list[Row]:
    """The file read once, and again after a change."""
    return [row for part in sections(path) for row in part["rows"]]


def words(row: Row) -> str:
    """What a mark says.

    >>> words({"at": "A.2", "verdict": "agreed"})
    'guide A.2: agreed'
    """
    return f"guide {row['at']}: {row['verdict']}"


class Advice(SphinxRole):
    """A link to the row of a mark; a key that no row has is a warning, and so fails the build."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        docname = self.env.docname
        try:
            self.env.note_dependency(str(rows_beside(self.env, docname)))
            row = row_of(self.env, docname, self.text)
        except (OSError, KeyError) as error:
            message = self.inliner.reporter.warning(f"advice role {self.text!r}: {error}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        to = {"refdomain": "std", "reftype": "doc", "reftarget": "guidelines", "refdoc": docname, "refwarn": True}
        link = pending_xref("", nodes.inline("", words(row)), refexplicit=True, **to)
        place = nodes.inline("", "", link, classes=["advice"], ids=[f"advice-{self.text}"])
        place["aim"], place["says"] = f"guide-{self.text}", row["says"]
        return [place], []


def check(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Stop before anything is read if rows and marks do not fit. A book without `guidelines` has nothing to check."""
    page = next((doc for doc in sorted(env.found_docs) if Path(doc).name == "guidelines"), None)
    if page is None:
        return
    texts = {Path(doc).name: prose(Path(env.doc2path(doc))) for doc in sorted(env.found_docs)}
    found = faults_of_marks(sections(rows_beside(env, page)), texts)
    if found:
        # The word ERROR is what `lipguide build` looks for in the log.
        raise SphinxError("\n".join(f"ERROR: guidelines.yml: {said}" for said in found))


def aim(app: Sphinx, document: nodes.document, docname: str) -> None:
    """Let the links between marks and rows lead to the place and not only to its page."""
    for place in document.findall(lambda node: isinstance(node, nodes.inline) and "aim" in node):
        for link in place.findall(nodes.reference):
            link["refuri"] += f"#{place['aim']}"
            if "says" in place:
                link["reftitle"] = place["says"]

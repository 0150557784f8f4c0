"""What a role says in words: the same numbers, names and titles as on the page, for notebooks that leave the book."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.environment import BuildEnvironment

from lipguide.book.citations import citations
from lipguide.book.marks import row_of, words
from lipguide.book.roles import number

__all__ = ["Words"]


class Words:
    """The words behind the roles of one page; it answers what `lipguide.book.downloads` asks.

    Args:
        env: Sphinx's environment after all pages have been read.
        docname: the page.
    """

    def __init__(self, env: BuildEnvironment, docname: str) -> None:
        self.env, self.docname = env, docname
        self.cited: dict[str, str] = {}
        for path in env.config.bibtex_bibfiles:
            self.cited |= citations(Path(env.srcdir) / path)

    def role(self, name: str, text: str) -> str:
        """The words for one role; an unknown role keeps its text as code."""
        text = re.sub(r"\s+", " ", text)
        kind = name.partition(":")[0]
        if kind == "ledger":
            return self._measured(text)
        if kind == "advice":
            return self._advised(text)
        if kind == "cite":
            return self._cited(text, name == "cite:t")
        title, target = re.fullmatch(r"(?:(.*?)\s*<)?([^<>]*)>?", text).groups()
        if kind == "doc":
            return self._page(title, Path(target).name)
        if kind == "eq":
            return f"({self.number('equation', target)})"
        if name in ("prf:ref", "numref"):
            return title or f"{self._kind(target).capitalize()} {self.number(self._kind(target), target)}".strip()
        if kind == "ref":
            label = self.env.get_domain("std").labels.get(target)
            return title or (label[2] if label else target)
        return f"`{text}`"

    def number(self, kind: str, label: str) -> str:
        """The number of a theorem, an exercise, a figure or an equation; empty if it has none."""
        if kind == "equation":
            found = self.env.get_domain("math").equations.get(label)
            return str(found[1]) if found else ""
        for numbers in self.env.toc_fignumbers.values():
            if label in numbers.get(kind, {}):
                return ".".join(map(str, numbers[kind][label]))
        return ""

    def _measured(self, text: str) -> str:
        """A number of a ledger. One that is not there has failed the build of its page already."""
        try:
            return number(self.env, text, self.docname)
        except (OSError, KeyError, ValueError, TypeError):
            return "?"

    def _advised(self, key: str) -> str:
        """Which advice of the guide the sentence before bears on. A key without a row has failed the build already."""
        try:
            return f"*({words(row_of(self.env, self.docname, key))})*"
        except (OSError, KeyError):
            return ""

    def _cited(self, keys: str, in_text: bool) -> str:
        names = [self.cited[key.strip()] for key in keys.split(",")]
        return "; ".join(names) if in_text else f"[{'; '.join(names)}]"

    def _page(self, title: str | None, name: str) -> str:
        """A link to another notebook; pages without code are only named."""
        page = next((doc for doc in self.env.found_docs if Path(doc).name == name), None)
        title = title or (self.env.titles[page].astext() if page else name)
        is_notebook = page is not None and self.env.doc2path(page).endswith(".ipynb")
        return f"[{title}]({name}.ipynb)" if is_notebook else f"*{title}*"

    def _kind(self, label: str) -> str:
        for numbers in self.env.toc_fignumbers.values():
            for kind, found in numbers.items():
                if label in found:
                    return kind
        return "theorem"

"""References as the text cites them: the list is labelled by authors and year, and sorted by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pybtex.database import Entry, parse_file
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx.application import Sphinx

__all__ = ["AuthorYearLabels", "BookStyle", "citation", "citations", "setup"]


def citation(entry: Entry) -> str:
    r"""Authors and year, as a citation in the text has them.

    >>> from pybtex.database import parse_string
    >>> source = "@misc{b, author = {B{\\'e}thune, Louis and {van} Laarhoven, Twan}, year = {2022}}"
    >>> citation(parse_string(source, "bibtex").entries["b"])
    'Béthune and van Laarhoven, 2022'
    """
    names = [" ".join(str(part) for part in person.rich_last_names) for person in entry.persons["author"]]
    who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    return f"{who}, {entry.fields['year']}"


def citations(path: Path) -> dict[str, str]:
    """How each entry of a bibliography is cited, by its key."""
    return {key: citation(entry) for key, entry in parse_file(str(path), "bibtex").entries.items()}


class AuthorYearLabels(BaseLabelStyle):
    """The label of an entry is its citation."""

    def format_labels(self, sorted_entries: Iterable[Entry]) -> Iterator[str]:
        for entry in sorted_entries:
            yield citation(entry)


class BookStyle(PlainStyle):
    """pybtex's plain style with labels that match the text."""

    default_label_style = AuthorYearLabels


def setup(app: Sphinx) -> dict[str, bool]:
    register_plugin("pybtex.style.formatting", "lipguide", BookStyle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

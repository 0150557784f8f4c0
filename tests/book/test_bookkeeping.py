"""What a page leaves out of its code, and what it must not."""

import ast
from pathlib import Path

import jupytext
import pytest
from docutils import nodes

from lipguide.book.bookkeeping import leave_out_records, without_records
from lipguide.book.build import Book

BOOK = Book(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    "record",
    [
        "ledger['a'] = a",
        "ledger['a'], ledger['b'] = a, {'mean': a.mean(), 'n': len(a)}",
        "ledger['a'] = {\n    name: row['x']\n    for name, row in rows.items()\n}",
        "ledger[f'a.{name}'] = a",
        "ledger.used(name, content)",
    ],
)
def test_a_line_that_only_records_is_left_out(record):
    assert without_records([f"a = measure()\n{record}\nplot(a)"]) == ["a = measure()\nplot(a)"]


@pytest.mark.parametrize(
    "kept",
    [
        "ledger['a'] = measure(x)",  # measures
        "ledger['a'] = {'n': [measure(x) for x in few]}",
        "ledger['a'] = (x > 0).sum()",
        "ledger['a'] = a\ntable(ledger['a'])",  # is read
        "ledger['a'] = a\ntable(ledger.results['a'])",
        "ledger['a.b'] = a\nfor n in 'bc':\n    table(ledger[f'a.{n}'])",
        "ledger['a'] = a\nfor n in names:\n    table(ledger[n])",  # who knows which
        "ledger[f'{name}'] = a",
        "x = ledger = a",
        "for n in names:\n    ledger[f'a.{n}'] = a",  # not a line by itself
        "% a line for the shell\nledger['a'] = a",
    ],
)
def test_a_line_that_does_more_stays(kept):
    assert without_records([f"a = 1\n{kept}"]) == [f"a = 1\n{kept}"]


def test_what_another_cell_reads_stays_and_no_cell_becomes_empty():
    cells = ["a = 1\nledger['a.b'] = a", "print(ledger['a']['b'])", "ledger['c'] = a", "# why\nledger['d'] = a"]
    assert without_records(cells) == cells


def test_the_cells_of_a_page_and_nothing_else():
    def page(code):
        source = nodes.container("", nodes.literal_block(code, code), classes=["cell_input"])
        return nodes.section("", source, nodes.literal_block(code, code))

    code = "a = 1\nledger['a'] = a"
    document = page(code)
    leave_out_records(None, document)
    assert [block.astext() for block in document.findall(nodes.literal_block)] == ["a = 1", code]
    assert document[0][0].rawsource == "a = 1"


@pytest.mark.parametrize("chapter", BOOK.chapters)
def test_a_chapter_is_left_with_python_that_reads_nothing_that_was_taken_out(chapter):
    cells = [c.source for c in jupytext.read(BOOK.source(BOOK.chapters[chapter])).cells if c.cell_type == "code"]
    for before, after in zip(cells, without_records(cells), strict=True):
        assert after.strip() and set(after.splitlines()) <= set(before.splitlines())
        ast.parse(after)

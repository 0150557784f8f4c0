"""Notebooks to take away hold plain Markdown: no role, no directive, nothing lost."""

import re
from types import SimpleNamespace

import nbformat
import pytest

from lipguide.book.downloads import plain_markdown, resolve_notebook
from lipguide.book.words import Words


class Page:
    """Answers as the book would, in a way that a test can tell apart."""

    def role(self, name, text):
        return f"<{name}|{text}>"

    def number(self, kind, label):
        return {"equation": "7", "theorem": "4", "exercise": "2"}.get(kind, "") if label else ""


@pytest.mark.parametrize(
    "source, expected",
    [
        ("It is {ledger}`a.b:.0f` %.", "It is <ledger|a.b:.0f> %."),
        ("as {cite:p}`x,y` say", "as <cite:p|x,y> say"),
        ("```{run-box}\n```", ""),
        ("```{math}\n:label: law\nx = y\n```", "$$\nx = y\n\\tag{7}\n$$"),
        (
            "```{prf:theorem} Margin\n:label: m\nIt {cite:p}`x` holds.\n```",
            "> **Theorem 4 (Margin).**\n> It <cite:p|x> holds.",
        ),
        ("```{prf:proof}\nClear.\n```", "> **Proof.**\n> Clear."),
        ("```{exercise}\n:label: e\nWhy?\n```", "> **Exercise 2.**\n> Why?"),
        (":::{div} drawing\n![a](b.svg)\n:::", "![a](b.svg)"),
        ("(label)=\n## Title", "## Title"),
        ("```python\nx = {'a': `1`}\n```", "```python\nx = {'a': `1`}\n```"),
    ],
)
def test_what_a_page_shows_is_what_a_notebook_says(source, expected):
    assert plain_markdown(source, Page()) == expected


def test_a_solution_folds_and_keeps_what_it_holds():
    source = "````{solution} e\n:class: dropdown\nBecause:\n```{math}\nx\n```\nand {ledger}`n:d`.\n````\nafter"
    text = plain_markdown(source, Page())
    assert text.startswith("<details>\n<summary>Solution of exercise 2</summary>")
    assert "$$\nx\n$$" in text and "<ledger|n:d>" in text and text.endswith("</details>\nafter")


def test_a_notebook_is_rewritten_in_place_without_its_bookkeeping(tmp_path):
    v4 = nbformat.v4
    book = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# T\n\n```{run-box}\n```"),
            v4.new_code_cell("1 + 1"),
            v4.new_code_cell("ledger.save()", metadata={"tags": ["remove-cell"]}),
            v4.new_markdown_cell("{ledger}`a:d`"),
        ]
    )
    path = tmp_path / "a.ipynb"
    nbformat.write(book, path)
    resolve_notebook(path, Page())
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.source.strip() for cell in cells] == ["# T", "1 + 1", "<ledger|a:d>"]
    assert not any(re.search(r"\{[a-z:]+\}`", cell.source) for cell in cells)


@pytest.mark.parametrize(
    "role, label, words",
    [
        ("numref", "fig-a-one", "Figure 3.1"),
        ("numref", "a-exercise", "Exercise 3.2"),
        ("prf:ref", "a-theorem", "Theorem 3.4"),
    ],
)
def test_a_notebook_names_what_its_page_numbers(role, label, words):
    numbers = {"figure": {"fig-a-one": (3, 1)}, "exercise": {"a-exercise": (3, 2)}, "theorem": {"a-theorem": (3, 4)}}
    env = SimpleNamespace(toc_fignumbers={"book/a": numbers}, config=SimpleNamespace(bibtex_bibfiles=[]), srcdir=".")
    assert Words(env, "book/a").role(role, label) == words


def test_a_notebook_says_which_advice_a_sentence_bears_on(tmp_path):
    (tmp_path / "book").mkdir()
    rows = "- section: A\n  rows:\n  - at: A.2\n    verdict: agreed\n    mark: gap\n"
    (tmp_path / "book" / "guidelines.yml").write_text(rows)
    env = SimpleNamespace(config=SimpleNamespace(bibtex_bibfiles=[]), srcdir=tmp_path)
    assert plain_markdown("So it is. {advice}`gap`", Words(env, "book/why")) == "So it is. *(guide A.2: agreed)*"

"""Each row of the guide at a glance has its evidence, its mark and a verdict that the ledgers bear."""

import io
import json
import re
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import docutils_namespace, patch_docutils

import lipguide as lip
from lipguide.book.build import Book
from lipguide.book.guidelines import NUMBER, VERDICTS, faults, sections
from lipguide.book.ledger import lookup, read
from lipguide.book.marks import faults_of_marks, marks, prose
from lipguide.book.roles import parts as parts_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row for part in sections(ROOT / "book" / "guidelines.yml") for row in part["rows"]]
PAGES = {Path(page).name for page in Book(ROOT).pages}
GOOD = {"at": "C", "says": "a", "verdict": "agreed", "found": "{ledger}`why:x:.1f`", "chapter": "why", "mark": "gap"}


def number(chapter, key):
    return lookup(read(ROOT / "book" / "results" / f"{chapter}.quick.json")["results"], key)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["says"][:30])
def test_the_row_has_evidence_a_link_and_a_verdict_that_stands(row):
    assert faults(row, PAGES, number) == []
    for role in row["found"].split("{ledger}`")[1:]:
        chapter, key, form = parts_of(role.partition("`")[0])
        assert format(number(chapter, key), form)
    called = lip
    for name in row.get("call", "").split("."):
        called = getattr(called, name) if name else called


def test_the_whole_guide_is_there():
    at = {row["at"] for row in ROWS}
    assert {"A.2", "C", "C.1.1.1", "C.1.1.2", "C.1.1.3", "C.1.1.4", "C.1.2", "C.2", "C.2.2", "C.2.3", "C.3"} <= at
    assert {"D.1", "D.2", "D.3", "E.1", "E.2", "E.3", "E.4", "F.1", "F.2", "F.3"} <= at
    assert {row["verdict"] for row in ROWS} == set(VERDICTS)
    assert len({row["says"] for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize(
    "change, said",
    [
        ({"verdict": "perhaps"}, "none of agreed"),
        ({"chapter": "nowhere"}, "links to no page"),
        ({"found": "4 per cent"}, "no number from a ledger"),
        ({"holds": "why:x > 0.6"}, "no longer so"),
        ({"holds": "why:x < why:y"}, "no longer so"),
        ({"holds": "x is large"}, "should read"),
        ({"note": "more"}, "nobody reads"),
    ],
)
def test_a_row_that_lacks_something_is_named(change, said):
    values = {"x": 0.5, "y": 0.25}
    assert faults(GOOD, {"why"}, lambda _, key: values[key]) == []
    (complaint,) = faults(GOOD | change, {"why"}, lambda _, key: values[key])
    assert said in complaint


def test_missing_fields_are_named():
    assert "lacks found" in faults({k: v for k, v in GOOD.items() if k != "found"}, {"why"}, None)[0]
    assert NUMBER.search("a {ledger}`tinier-ssd:lost.pgd:s` b").groups() == ("tinier-ssd", "lost.pgd")


# -- the marks in the chapters ---------------------------------------------------------------------------------------


def complaints(*texts, **change):
    """What is said of one row and of the chapter `why`, and others if there are more texts."""
    pages = dict(zip(("why", "whither"), texts, strict=False))
    return faults_of_marks([{"section": "A", "rows": [GOOD | change]}], pages)


def test_every_mark_stands_where_its_row_says():
    texts = {Path(page).name: prose(ROOT / f"{page}.md") for page in Book(ROOT).pages}
    parts = sections(ROOT / "book" / "guidelines.yml")
    assert faults_of_marks(parts, texts) == []
    assert sum(len(marks(text)) for text in texts.values()) == len(ROWS)
    for text in texts.values():  # behind a sentence, and no more than two at one place
        assert not re.search(r"(?:^|\n\n)\s*\{advice\}|(?:\{advice\}`[^`]*`\s*){3}", text)


@pytest.mark.parametrize(
    "texts, change, said",
    [
        (["It is so."], {}, "'a' has no mark: put {advice}`gap` into why.md"),
        (["It is so.", "{advice}`gap`"], {}, "'a' has no mark: put {advice}`gap` into why.md"),
        (["{advice}`gap` {advice}`gab`"], {}, "why.md: the mark 'gab' names no row"),
        (["{advice}`gap`", "{advice}`gap`"], {}, "the mark 'gap' stands 2 times, and should once: why, whither"),
        (["{advice}`gap`"], {"found": "4 per cent"}, "no number from a ledger"),
        (["{advice}`gap`"], {"chapter": "nowhere"}, "links to no page: nowhere"),
    ],
)
def test_a_row_and_a_mark_that_do_not_fit_are_named(texts, change, said):
    assert complaints("So it is. {advice}`gap`", "Nothing.", holds="why:x > 9") == []  # that is asked by the tests only
    (complaint,) = complaints(*texts, **change)
    assert said in complaint


def test_a_mark_belongs_to_one_row():
    parts = [{"section": "A", "rows": [GOOD, GOOD | {"says": "b"}]}]
    assert faults_of_marks(parts, {"why": "{advice}`gap`"}) == ["the mark 'gap' is that of several rows"]


def test_marks_in_code_are_none(tmp_path):
    cells = [("code", "s = '{advice}`no`'"), ("markdown", "Yes. {advice}`yes`")]
    notebook = {"cells": [{"cell_type": kind, "source": [text]} for kind, text in cells]}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "a.md").write_text("```{code-cell} ipython3\ns = '{advice}`no`'\n```\nYes. {advice}`yes`\n")
    assert marks(prose(tmp_path / "a.ipynb")) == marks(prose(tmp_path / "a.md")) == ["yes"]


# -- on the pages -----------------------------------------------------------------------------------------------------


def pages_of(folder, text):
    """A book of a chapter with this text and the page of its one row, as HTML by name."""
    (folder / "book" / "results").mkdir(parents=True)
    (folder / "index.md").write_text("# I\n\n```{toctree}\nbook/why\nbook/guidelines\n```\n")
    (folder / "book" / "why.md").write_text(f"# Why $x$\n\n{text}\n")
    (folder / "book" / "guidelines.md").write_text("# G\n\n```{guidelines}\n```\n")
    row = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in (GOOD | {"says": 'No "<b>" & c.'}).items())
    (folder / "book" / "guidelines.yml").write_text(f"- section: A\n  rows:\n  - {row.lstrip()}")
    (folder / "book" / "results" / "why.quick.json").write_text('{"provenance": {}, "results": {"x": 0.25}}')
    warnings, extensions = io.StringIO(), ["myst_parser", "lipguide.book.roles"]
    settings = {"extensions": extensions, "html_theme": "basic", "myst_enable_extensions": ["dollarmath"]}
    with patch_docutils(), docutils_namespace():
        places = [folder, None, folder / "out", folder / "trees"]
        app = Sphinx(*places, "html", settings, status=None, warning=warnings)
        app.build()
    assert warnings.getvalue() == ""
    return {name: (folder / "out" / "book" / f"{name}.html").read_text() for name in ("why", "guidelines")}


def test_mark_and_row_link_to_each_other(tmp_path, monkeypatch):
    monkeypatch.delenv("LIPGUIDE_PROFILE", raising=False)
    pages = pages_of(tmp_path, "So it is. {advice}`gap`")
    (chip,) = re.findall(r'<span class="advice" id="advice-gap"><a [^>]*>.*?</a></span>', pages["why"])
    assert 'href="guidelines.html#guide-gap"' in chip and ">guide C: agreed<" in chip
    assert 'title="No &quot;&lt;b&gt;&quot; &amp; c."' in chip
    (row,) = re.findall(r'<tr[^>]* id="guide-gap">.*?</tr>', pages["guidelines"], re.S)
    assert re.search(r'href="why.html#advice-gap".*Why ', row) and "0.2" in row


def test_a_book_whose_marks_do_not_fit_is_not_built(tmp_path):
    with pytest.raises(SphinxError, match="ERROR: guidelines.yml: .* has no mark: put {advice}`gap` into why.md"):
        pages_of(tmp_path, "So it is.")
    assert not (tmp_path / "out" / "book").exists()

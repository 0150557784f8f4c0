"""Each row of the guide at a glance has its evidence, its link and a verdict that the ledgers bear."""

from pathlib import Path

import pytest

import lipguide as lip
from lipguide.book.build import Book
from lipguide.book.guidelines import NUMBER, VERDICTS, faults, sections
from lipguide.book.ledger import lookup, read
from lipguide.book.roles import parts as parts_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row for part in sections(ROOT / "book" / "guidelines.yml") for row in part["rows"]]
PAGES = {Path(page).name for page in Book(ROOT).pages}
GOOD = {"at": "C", "says": "a", "verdict": "agreed", "found": "{ledger}`why:x:.1f`", "chapter": "why"}


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

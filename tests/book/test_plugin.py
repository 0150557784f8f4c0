"""What MyST's tools read of the book: the same numbers as Sphinx puts into it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from lipguide.book.guidelines import sections
from lipguide.book.marks import words
from lipguide.book.roles import number

ROOT = Path(__file__).resolve().parents[2]
ROLE = re.compile(r"\{ledger\}`([^`]+)`")
in_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node here")


def told(script: str, given: object = None):
    """What a script in node prints, which has the plugin's functions at hand."""
    plugin = (ROOT / "book" / "plugin.mjs").as_uri()
    imported = f"import {{ number, guidelines, mark }} from {json.dumps(plugin)};"
    source = f"{imported}\nconst given = {json.dumps(given)};\n{script}"
    command = ["node", "--input-type=module", "-e", source]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@in_node
def test_every_number_is_written_as_sphinx_writes_it(monkeypatch):
    monkeypatch.delenv("LIPGUIDE_PROFILE", raising=False)
    pages = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book").glob("*.md"))}
    pages["guidelines"] += (ROOT / "book" / "guidelines.yml").read_text(encoding="utf-8").partition("\n- ")[2]
    roles = [[text, page] for page, source in pages.items() for text in ROLE.findall(source)]
    env = SimpleNamespace(srcdir=ROOT, docname="")
    expected = [number(env, text, page) for text, page in roles]
    found = told("console.log(JSON.stringify(given.map(([text, page]) => number(text, page))));", roles)
    assert len(roles) > 1000
    assert [pair for pair in zip(roles, found, expected, strict=True) if pair[1] != pair[2]] == []


@in_node
def test_the_rows_of_advice_are_read_as_yaml_reads_them():
    assert told("console.log(JSON.stringify(guidelines()));") == sections(ROOT / "book" / "guidelines.yml")


@in_node
def test_a_mark_is_a_link_to_the_rows_that_says_what_sphinx_says():
    rows = [row for part in sections(ROOT / "book" / "guidelines.yml") for row in part["rows"]]
    links = told("console.log(JSON.stringify(given.map(mark)));", [row["mark"] for row in rows])
    assert {(link["type"], link["url"]) for link in links} == {("link", "guidelines")}
    assert [link["title"] for link in links] == [row["says"] for row in rows]
    assert [link["children"] for link in links] == [[{"type": "text", "value": words(row)}] for row in rows]


@in_node
def test_the_plugin_knows_every_role_of_the_book():
    plugin = json.dumps((ROOT / "book" / "plugin.mjs").as_uri())
    names = told(f"console.log(JSON.stringify((await import({plugin})).default.roles.map((role) => role.name)));")
    assert names == re.findall(r'app\.add_role\("(\w+)"', (ROOT / "lipguide/book/roles.py").read_text(encoding="utf-8"))

"""What MyST's tools read of the book: the same numbers as Sphinx puts into it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from lipguide.book.guidelines import sections
from lipguide.book.roles import number

ROOT = Path(__file__).resolve().parents[2]
ROLE = re.compile(r"\{ledger\}`([^`]+)`")
in_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node here")


def told(script: str, given: object = None):
    """What a script in node prints, which has the plugin's functions at hand."""
    plugin = (ROOT / "book" / "plugin.mjs").as_uri()
    source = f"import {{ number, guidelines }} from {json.dumps(plugin)};\nconst given = {json.dumps(given)};\n{script}"
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

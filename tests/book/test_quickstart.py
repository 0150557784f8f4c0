"""The quick start: certified is not above attacked, and what is handed over works where lipguide is not."""

import re
import subprocess
from pathlib import Path

import jupytext
import pytest

from lipguide.book.build import Book
from lipguide.book.ledger import read

ROOT = Path(__file__).resolve().parents[2]
BOOK = Book(ROOT)
CELLS = [c.source for c in jupytext.read(BOOK.source(BOOK.chapters["quickstart"])).cells if c.cell_type == "code"]
WITHOUT_LIPGUIDE = "import sys; sys.modules['lipguide'] = None\n"  # importing it is an error


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def cell(beginning: str) -> str:
    (found,) = [source for source in CELLS if source.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def handed(tmp_path_factory, forked):
    """A folder with what was handed over, and what the page printed before."""
    folder = tmp_path_factory.mktemp("handed")
    return folder, said(forked.run(cell("# All the way") + "\n" + cell("# To hand over"), folder))


def test_what_is_printed_as_certified_is_not_above_what_is_printed_as_attacked(handed):
    clean, certified, attacked = (float(n) for n in re.findall(r"([\d.]+)%", handed[1]))
    assert clean >= attacked >= certified > 0


def test_record_does_not_say_that_more_is_certified_than_stands():
    record = read(BOOK.ledger("quickstart", "quick"))["results"]["classifier"]
    printed = [round(record[name], 1) for name in ("clean", "attacked", "certified")]
    assert printed == sorted(printed, reverse=True)


def test_the_other_side_certifies_without_lipguide(handed, forked):
    folder, _ = handed
    printed = said(forked.run(WITHOUT_LIPGUIDE + cell("# On the other side"), folder))
    assert len(re.findall(r"\d\.\d+", printed)) >= 5
    off = float(re.search(r"off by (\S+)", printed).group(1))
    assert off < 1e-9


def test_files_that_are_handed_over_name_no_code_of_lipguide(handed):
    folder, _ = handed
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "certificate.pt"}
    checkout = str(ROOT).encode()  # may have any name; exported programs know the file that asked for them
    assert not any(b"lipguide" in path.read_bytes().replace(checkout, b"") for path in folder.iterdir())

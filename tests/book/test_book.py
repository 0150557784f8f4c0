"""The rules of the book, held against every chapter's source."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jupytext
import pytest
import yaml

from lipguide.book.build import Book

ROOT = Path(__file__).resolve().parents[2]
BOOK = Book(ROOT)
CHAPTERS = sorted(BOOK.chapters)
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]
FOLDED = {name.removeprefix("nb_"): text for name, text in CONFIG.items() if name.startswith("nb_code_prompt")}
VAGUE = re.compile(
    r"\b(plot|figure|panel|picture|drawing|exercise|theorem)s? (above|below)"
    r"|\b(first|second|third|last) exercise\b|chapter (before|above|below)",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])|\d\s?%")


@cache  # twenty chapters are read by twenty tests; none may change what it gets
def notebook(chapter):
    return jupytext.read(BOOK.source(BOOK.chapters[chapter]))


def code_cells(chapter):
    return [c for c in notebook(chapter).cells if c.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def prose(text):
    """The sentences of a text without what may hold numbers: code, mathematics, roles, links, and cited facts."""
    text = re.sub(r"^(`{3,}|:{3,})\{(?!exercise|solution|prf).*?^\1\s*$", "", text, flags=re.S | re.M)
    text = re.sub(r"```python.*?```", "", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$]+\$|(?<!\})`[^`]*`|\]\([^)]*\)", " ", text, flags=re.S)
    rows = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    paragraphs = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|")).split("\n\n")
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.:;])\s+", p)]
    uncited = [s for s in rows + sentences if "{cite" not in s and ":label:" not in s]
    return [re.sub(r"\{[a-z:]+\}`[^`]*`", " ", s) for s in uncited]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_front_matter_names_a_kernel(chapter):
    assert notebook(chapter).metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_exactly_one_parameters_cell_of_literals(chapter):
    cells = [c for c in code_cells(chapter) if "parameters" in tags(c)]
    assert len(cells) == 1
    values = {}
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert values == {"profile": "quick", "device": "cpu", "seed": 0}


def most_lines(chapter, cell):
    """25; more for the one cell that goes all the way from data to certificate."""
    return 40 if chapter == "quickstart" and cell.source.startswith("# All the way") else 25


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_cell_uses_a_name_that_no_cell_defines(chapter, tmp_path):
    code = "\n".join(cell.source for cell in code_cells(chapter))
    (tmp_path / "cells.py").write_text(re.sub(r"^[%!].*$", "", code, flags=re.M), encoding="utf-8")
    call = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--quiet", tmp_path]
    found = subprocess.run(call, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_are_short_and_narrow(chapter):
    text = BOOK.source(BOOK.chapters[chapter]).read_text(encoding="utf-8")
    written = [body for _, body in re.findall(r"^(`{3,})\{code-cell\}[^\n]*\n(.*?)^\1\s*$", text, flags=re.S | re.M)]
    assert len(written) == len(code_cells(chapter))
    for body, cell in zip(written, code_cells(chapter), strict=True):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert max(map(len, lines)) <= 88, max(lines, key=len)
        # its header too: readers of the source see that
        assert sum(bool(line.strip()) for line in body.splitlines()) <= most_lines(chapter, cell), body


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_import_what_they_use_by_name(chapter):
    for cell in code_cells(chapter):
        assert "import *" not in cell.source and "!pip" not in cell.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_typed_results(chapter):
    for cell in notebook(chapter).cells:
        if cell.cell_type == "markdown":
            for line in prose(cell.source):
                # "%" after a ledger role is its unit, not a number
                assert not NUMBER.search(line), line


@pytest.mark.parametrize(
    "text, typed",
    [
        ("it reaches 93.5 of them", True),
        ("about 4 % more", True),
        ("$0.3$ of it", False),
        ("{ledger}`a:.2f` %", False),
        ("torch 2 and 1-Lipschitz", False),
        ("They read\n86.9 % of it {cite:p}`shu2018`. We agree.", False),
        ("They read it {cite:p}`shu2018`. We read 86.9 %.", True),
        ("| a | 3.5 |\n| b {cite:p}`x` | 4.5 |", True),
    ],
)
def test_the_rule_on_typed_results_sees_what_it_should(text, typed):
    assert any(NUMBER.search(line) for line in prose(text)) is typed


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_hidden_code_says_what_it_is(chapter):
    for cell in code_cells(chapter):
        if "hide-input" in tags(cell):
            settings = FOLDED | cell.metadata.get("mystnb", {})
            assert settings.get("code_prompt_show", "").startswith("Show the "), cell.source
            assert settings.get("code_prompt_hide", "").startswith("Hide the "), cell.source
            if "code_prompt_show" not in cell.metadata.get("mystnb", {}):
                assert re.search(r"plt\.show\(\)|\bax\b", cell.source), cell.source  # it is a figure's


@pytest.mark.parametrize("page", BOOK.pages)
def test_no_line_begins_as_a_comment_of_myst_does(page):
    """A line of prose that begins with a per cent sign would vanish."""
    text = BOOK.source(page).read_text(encoding="utf-8")
    prose = re.sub(r"^(`{3,})[^\n]*\n.*?^\1\s*$", "", text, flags=re.S | re.M)
    assert not re.findall(r"^\s*%.*$", prose, re.M)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_to_copy_print_what_they_prove(chapter):
    for cell in code_cells(chapter):
        if "copy-this" in tags(cell):
            assert "print(" in cell.source or "report=print" in cell.source, cell.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_cell_echoes_a_value(chapter):
    """What a cell shows, it shows by a call: `table`, `print`, `plt.show`. A dict on a page is nothing to read."""
    for cell in code_cells(chapter):
        last = ast.parse(cell.source).body[-1]
        shown = last.value if isinstance(last, ast.Expr) else None
        assert shown is None or isinstance(shown, ast.Call | ast.IfExp), cell.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_errors_are_printed_whole(chapter):
    for cell in code_cells(chapter):
        assert not re.search(r"str\(error\)\[", cell.source), cell.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_plot_has_alt_text(chapter):
    for cell in code_cells(chapter):
        if "plt.show()" in cell.source:
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 40, cell.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_figure_has_a_name_and_says_its_finding(chapter):
    """A caption is what gives a figure its number; without typed results, as in the text."""
    shown = [c for c in code_cells(chapter) if {"image", "figure"} & c.metadata.get("mystnb", {}).keys()]
    figures = [cell.metadata["mystnb"].get("figure", {}) for cell in shown]
    assert all(re.fullmatch(rf"fig-{chapter}-[\w-]+", figure.get("name", "")) for figure in figures), figures
    assert len({figure["name"] for figure in figures}) == len(figures)
    for figure in figures:
        assert len(figure["caption"]) > 25 and figure["caption"].endswith("."), figure
        assert not NUMBER.search(figure["caption"]), figure


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_figure_is_spoken_of(chapter):
    text = BOOK.source(BOOK.chapters[chapter]).read_text(encoding="utf-8")
    names = re.findall(rf"name: (fig-{chapter}-[\w-]+)", text)
    assert not [name for name in names if f"{{numref}}`{name}`" not in text]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_code_of_a_figure_is_folded(chapter):
    """A line or two may stand open; what places axes and labels teaches nothing of the subject."""
    for cell in code_cells(chapter):
        if "figure" in cell.metadata.get("mystnb", {}) and len(cell.source.splitlines()) > 3:
            assert {"hide-input", "remove-input"} & set(tags(cell)), cell.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_opens_with_what_to_do_in_three_to_five_lines(chapter):
    text = BOOK.source(BOOK.chapters[chapter]).read_text(encoding="utf-8")
    before = text[: text.index("\n## ")]
    boxes = re.findall(r"^```\{admonition\} What to do\n:class: tip\n(.*?)^```$", before, flags=re.S | re.M)
    assert len(boxes) == 1 and 3 <= len(re.findall(r"^- ", boxes[0], flags=re.M)) <= 5


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_references_name_what_they_refer_to(chapter):
    """Not "the figure above": a reader may come by search, and sections move."""
    for cell in notebook(chapter).cells:
        if cell.cell_type == "markdown":
            found = VAGUE.search(re.sub(r"\s+", " ", cell.source))
            assert not found, found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_ordinary_networks_have_one_colour_and_nothing_else_has_it(chapter):
    """It is called by what it means; `lines` gives it to no curve by chance."""
    for cell in code_cells(chapter):
        assert "orange" not in cell.source and "#E69F00" not in cell.source, cell.source


def test_chapters_are_numbered_and_reference_is_not():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    numbered = {part["caption"] for part in parts if part.get("numbered")}
    assert {part["caption"] for part in parts} - numbered == {"Start", "Reference", "Appendix"}
    assert CONFIG["numfig"] is True


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_opens_with_its_run_and_ends_with_its_ledger(chapter):
    text = BOOK.source(BOOK.chapters[chapter]).read_text(encoding="utf-8")
    title = text.index("\n# ")
    assert text.index("```{run-box}") < text.index("```{code-cell}") and title < text.index("```{run-box}")
    assert code_cells(chapter)[-1].source.strip() == "ledger.save()"
    assert f'Ledger("{chapter}", profile, device, seed)' in text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_two_or_three_exercises_each_with_its_solution(chapter):
    text = BOOK.source(BOOK.chapters[chapter]).read_text(encoding="utf-8")
    exercises = re.findall(r"\{exercise\}.*?\n:label: (\S+)", text)
    assert 2 <= len(exercises) <= 3
    assert sorted(exercises) == sorted(re.findall(r"\{solution\} (\S+)", text))


COPY = [(ch, i) for ch in CHAPTERS for i, c in enumerate(code_cells(ch)) if "copy-this" in tags(c)]


@pytest.mark.parametrize("chapter, index", COPY)
def test_copied_cells_run_alone(chapter, index, forked, tmp_path):
    """Each in a process of its own, with nothing but what it imports itself; see `tests.forked`."""
    done = forked.run(code_cells(chapter)[index].source, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_run_is_on_record(chapter):
    assert BOOK.ledger(chapter, "quick").exists(), (
        f"run python -m lipguide build --only {chapter} and commit its ledger"
    )


def test_make_installs_exactly_what_conda_would():
    """The Makefile reads its requirements out of environment.yml; not a line may be lost on the way."""
    command = re.search(r"\t(sed .*?) > ", (ROOT / "Makefile").read_text()).group(1).replace("$$", "$")
    read = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    lock = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert read == lock and len(lock) > 100 and all("==" in line for line in lock)


def test_the_lock_satisfies_the_loose_bounds():
    """Every requirement of pyproject.toml is in environment.yml, at a version that it admits."""
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement

    lock = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    pinned = {Requirement(line).name.lower().replace("_", "-"): line.split("==")[1].split(";")[0] for line in lock}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        wanted = Requirement(line)
        name = wanted.name.lower().replace("_", "-")
        if name == "lipguide":  # a part that builds on other parts
            assert wanted.extras <= set(project["optional-dependencies"])
            continue
        assert name in pinned, f"{name} is not in environment.yml"
        assert wanted.specifier.contains(pinned[name], prereleases=True), line

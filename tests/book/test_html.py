"""The built pages: what a reader would stumble over. `make check-pages` asks; skipped where no book is built."""

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from tests.book.browser import chromium, inspect

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
AXE = ROOT / "_build" / "tools" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = sorted(path for path in (HTML / "book").glob("*.html")) if HTML.exists() else []
HEAVY = 3 * 2**20

pytestmark = pytest.mark.skipif(not PAGES, reason="no built book in _build/html: run `make book` first")
in_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium here: the pages are not looked at in a browser")


class Reader(HTMLParser):
    """Links, identifiers and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.silent: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.ids.append(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.silent.append(found.get("src", ""))


@pytest.fixture(scope="module")
def read():
    return {path: Reader(path) for path in PAGES}


@pytest.fixture(scope="module")
def seen():
    reports = {report["path"]: report for report in inspect(HTML, AXE if AXE.exists() else None)}
    assert set(reports) == {f"/book/{path.name}" for path in PAGES}
    return reports


def test_links_lead_somewhere(read):
    for path, page in read.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor and target in read:
                assert anchor in read[target].ids, f"{path.name}: {link}"


def test_identifiers_are_there_once(read):
    for path, page in read.items():
        twice = {name for name in page.ids if page.ids.count(name) > 1}
        assert not twice, f"{path.name}: {twice}"


def test_pictures_say_what_they_show(read):
    assert not {path.name: page.silent for path, page in read.items() if page.silent}


def test_chapters_and_figures_are_numbered():
    numbers = {}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        title = re.search(r'<h1><span class="section-number">(\d+)\. </span>', text)
        figures = re.findall(r'<span class="caption-number">Fig\. ([\w.]+)\s*</span>', text)
        if title:
            numbers[path.stem] = int(title[1])
            assert figures == [f"{title[1]}.{k + 1}" for k in range(len(figures))], path.name
        letter = re.search(r"<h1>([A-Z])\. ", text)
        if letter:
            assert figures == [f"{letter[1]}.{k + 1}" for k in range(len(figures))], path.name
        pictures = re.findall(r'<div class="output image_[^>]*>|<div class="cell_output[^>]*>\s*<figure', text)
        assert len(figures) == text.count("<figcaption>") and len(pictures) <= len(figures), path.name
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1)) and len(numbers) >= 15
    assert numbers["why"] == 1 and numbers["procedure"] == numbers["evaluation"] + 1


def test_every_page_has_licence_and_version():
    for path in PAGES:
        assert "MIT licence" in path.read_text(encoding="utf-8"), path.name


def test_no_line_was_taken_for_a_comment():
    for path in (ROOT / "book").glob("*.md"):
        fenced = re.sub(r"^(`{3,}).*?^\1\s*$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        assert not re.search(r"^\s*%", fenced, flags=re.M), path.name


def test_downloads_hold_no_role():
    for path in (HTML / "_sources" / "book").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                found = re.search(r"\{[a-z][\w:-]*\}`|^(`{3,}|:{3,})\{", cell.source, flags=re.M)
                assert not found, f"{path.name}: {cell.source[max(0, found.start() - 60) : found.end() + 60]}"


def test_no_result_is_an_echoed_dict():
    echo = re.compile(
        r'<div class="output text_plain[^"]*">.*?<pre><span></span>(?:<span class="p">)?[\[({]+(?:<[^>]*>)*&#39;'
    )
    count = sum(len(echo.findall(re.sub(r"\n", " ", path.read_text(encoding="utf-8")))) for path in PAGES)
    assert not count, f"{count} outputs are dicts; show them with lipguide.book.tables.table"


@in_browser
def test_curves_of_sliders_are_lines_and_not_filled(seen):
    """A slider that lost its style sheet is a black patch."""
    assert not {path: report["patches"] for path, report in seen.items() if report["patches"]}


@in_browser
def test_nothing_sticks_out_of_the_page(seen):
    assert not {path: report["overflow"] for path, report in seen.items() if max(report["overflow"].values()) > 0}


@in_browser
def test_the_guide_at_a_glance_is_read_on_a_phone_without_pushing(seen):
    assert seen["/book/guidelines.html"]["sideways"] == []


@in_browser
def test_no_formula_is_cut(seen):
    assert not {path: report["cut"] for path, report in seen.items() if any(report["cut"].values())}
    assert not {path: report["failed"] for path, report in seen.items() if report["failed"]}


@in_browser
def test_the_console_stays_silent(seen):
    assert not {path: report["errors"] for path, report in seen.items() if report["errors"]}


@in_browser
def test_pages_are_light(seen):
    heavy = {path: report["weight"] for path, report in seen.items() if report["weight"] > HEAVY}
    assert not heavy


@in_browser
@pytest.mark.skipif(not AXE.exists(), reason="no axe-core in _build/tools: npm install --prefix _build/tools axe-core")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(seen, theme):
    assert not {path: report["axe"][theme] for path, report in seen.items() if report["axe"][theme]}


DICTIONARIES = [Path("/usr/share/dict") / name for name in ("british-english", "american-english")]


@pytest.mark.skipif(not all(map(Path.exists, DICTIONARIES)), reason="no word lists: apt-get install wbritish wamerican")
def test_words_are_spelled_as_in_a_dictionary():
    known = {word for path in DICTIONARIES for word in path.read_text(encoding="utf-8").lower().split()}
    known |= set((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())
    odd: dict[str, str] = {}
    for path in sorted((ROOT / "book").glob("*.md")):
        for word in words(path.read_text(encoding="utf-8")):
            if word not in known:
                odd.setdefault(word, path.name)
    assert not odd, "mend them, or add them to tests/book/words.txt"


def words(text: str) -> set[str]:
    """The words of a page's prose, without code, mathematics, roles and names that only computers read."""
    text = re.sub(r"\A---\n.*?^---$", "", text, flags=re.S | re.M)
    text = re.sub(r"^(`{3,})(\{code-cell\}|\{math\}|\w*$).*?^\1\s*$", "", text, flags=re.S | re.M)
    text = re.sub(
        r"^[`:]{3,}.*$|^:\w+:.*$|^\([\w-]+\)=$", "", text, flags=re.M
    )  # other directives: their bodies are prose
    text = re.sub(r"\$\$.*?\$\$|\$[^$]+\$|(\{[\w:-]+\})?`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", text, flags=re.S)
    return {word.lower() for word in re.findall(r"(?<![\w.-])[A-Za-z][a-z]{3,}(?![\w.-]*[\w])", text)}

"""What the pages are mended with: icons, links, one document for print, records and names."""

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydata_sphinx_theme
import pytest
from docutils import nodes
from fontTools.ttLib import TTFont
from PIL import Image
from pybtex.database import parse_file

import lipguide as lip
from lipguide.book import pages
from lipguide.book.api import _label, docstring, names
from lipguide.book.citations import citations
from lipguide.book.icons import icon_sheet
from lipguide.book.pages import by_letter, mended
from lipguide.book.pdf import one_document
from lipguide.book.records import flat

ROOT = Path(__file__).resolve().parents[2]
THEME = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
AWESOME = next((THEME / "vendor" / "fontawesome").glob("*"))


def test_icons_of_a_page_are_embedded_and_small():
    page = '<i class="fa-solid fa-list"></i><i class="fa-brands fa-square-github"></i>'
    sheet = icon_sheet([page], ['p:before{content:"\\f0eb"}'], AWESOME)
    assert ".fa-list::before" in sheet and ".fa-square-github::before" in sheet
    assert sheet.count("@font-face") >= 2
    letters = set()
    for font in re.findall(r"base64,([^)]*)\)", sheet):
        letters |= set(TTFont(io.BytesIO(base64.b64decode(font))).getBestCmap())
    assert {0xF0EB, 0xF03A} <= letters and len(letters) < 6
    assert "url(data:" in sheet and len(sheet) < 20_000


def test_a_page_loses_the_heavy_icons_and_keeps_its_text():
    head = '<link href="_static/vendor/fontawesome/6/css/all.min.css" rel="stylesheet" />'
    script = '<script src="_static/vendor/fontawesome/6/js/all.min.js?digest=1"></script>'
    page = mended(f'<head>{head}<!-- Pre-loaded -->{script}</head><p id="search-input"><p id="search-input">kept', "..")
    assert "fontawesome" not in page and "../_static/icons.css" in page and page.endswith("kept")
    assert re.findall('id="([^"]*)"', page) == ["search-input", "search-input-2"]


def test_an_appendix_counts_by_its_letter():
    data, layers = {"figure": {"a": (1,), "b": (2,)}, "exercise": {"c": (1,)}}, {"figure": {"d": (3, 1)}}
    titles = {"data": nodes.title("", "A. Data"), "layers": nodes.title("", "Affine layers")}
    env = SimpleNamespace(toc_fignumbers={"data": data, "layers": layers}, titles=titles)
    for _ in range(2):  # a second build finds what the first has done
        by_letter(None, env)
    assert data == {"figure": {"a": ("A", 1), "b": ("A", 2)}, "exercise": {"c": ("A", 1)}}
    assert layers == {"figure": {"d": (3, 1)}}


def test_one_document_keeps_every_link_inside(tmp_path):
    (tmp_path / "book").mkdir()
    for name, other in (("a", "b"), ("b", "a")):
        body = f'<section id="s"><a href="{other}.html#s">x</a><a href="#s">y</a><a href="{other}.html">z</a></section>'
        page = f'<head></head><article class="bd-article">{body}</article>'
        (tmp_path / "book" / f"{name}.html").write_text(page)
    text = one_document(tmp_path, ["a", "b"])
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert sorted(ids) == ["a", "a--s", "b", "b--s"]
    assert {link for link in re.findall(r'href="#([^"]+)"', text)} == set(ids)


def test_every_offered_name_has_an_entry_of_its_own():
    found = names()
    offered = {name for name in lip.__all__ if callable(getattr(lip, name)) and getattr(lip, name).__doc__}
    assert offered <= set(found)
    assert {f"losses.{name}" for name in lip.losses.__all__} <= set(found)
    labels = [_label(name) for name in found]
    assert len(set(labels)) == len(labels)


def test_no_word_of_a_docstring_is_lost():
    for value in names().values():
        text = value.__doc__
        shown = " ".join(node.astext() for node in docstring(__import__("inspect").cleandoc(text)))
        words = set(re.findall(r"\w{4,}", text)) - {"Args", "Returns", "Raises", "Attributes", "math"}
        assert words <= set(re.findall(r"\w{4,}", shown)), value


def test_formulas_of_docstrings_are_mathematics():
    formulas = 0
    for name, value in names().items():
        text = __import__("inspect").cleandoc(value.__doc__)
        for node in docstring(text):
            assert "math:" not in node.astext(), name
            formulas += len(list(node.findall(lambda found: isinstance(found, nodes.math | nodes.math_block))))
        formulas -= text.count(":math:`") + text.count(".. math::")
    assert formulas == 0


def test_citations_read_as_in_the_text():
    found = citations(ROOT / "book" / "references.bib")
    assert found["anil2019"] == "Anil et al., 2019" and found["arjovsky2017"] == "Arjovsky et al., 2017"
    assert found["prach2022"] == "Prach and Lampert, 2022"
    assert not any(set("{}\\") & set(text) for text in found.values())


def test_sources_can_be_found():
    """A DOI or an address; of an old journal, volume and pages."""
    for key, entry in parse_file(str(ROOT / "book" / "references.bib"), "bibtex").entries.items():
        has = set(entry.fields)
        assert {"doi", "url", "eprint"} & has or {"journal", "volume", "pages"} <= has, key


def test_a_record_is_flattened_under_the_names_that_roles_use():
    from lipguide.book.ledger import lookup

    content = {"a.b": {"c": [{"d": 1}, {"d": 2}]}, "e": 3}
    for key, value in flat(content):
        assert lookup(content, key) == value


@pytest.mark.parametrize("term, place", [("temperature", "losses#temperature"), ("certified radius", "why")])
def test_search_terms_lead_to_pages_that_are_there(term, place):
    import yaml

    terms = yaml.safe_load((ROOT / "book" / "terms.yml").read_text(encoding="utf-8"))
    assert terms[term] == place
    for where in terms.values():
        page, _, heading = where.partition("#")
        text = (ROOT / "book" / f"{page}.md").read_text(encoding="utf-8")
        titles = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in re.findall(r"^#+ (.*)", text, re.M)]
        assert not heading or heading in titles, where


def drawing(*pictures):
    """An SVG with bitmaps inside, as matplotlib writes them."""

    def inside(picture):
        file = io.BytesIO()
        picture.save(file, "png")
        return f'<image xlink:href="data:image/png;base64,\n{base64.b64encode(file.getvalue()).decode()}"/>'

    return f"<svg>{''.join(map(inside, pictures))}</svg>"


def bitmaps(text):
    found = re.findall(r'data:image/(\w+);base64,([^"]+)', text)
    return [(kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))) for kind, data in found]


def test_heavy_drawings_carry_lighter_bitmaps_that_look_the_same(tmp_path):
    rng = np.random.default_rng(0)
    photo = np.kron(rng.integers(0, 256, (20, 20, 3)), np.ones((20, 20, 1))) + rng.normal(0, 4, (400, 400, 3))
    photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
    seen_through = photo.convert("RGBA")
    seen_through.putalpha(Image.fromarray(np.tri(400, dtype=np.uint8) * 200))
    flat = Image.new("RGB", (8, 8), "navy")
    heavy, light = drawing(photo, seen_through, flat), drawing(flat)
    (tmp_path / "heavy.svg").write_text(heavy)
    (tmp_path / "light.svg").write_text(light)
    pages._lighten_drawings(tmp_path)
    assert (tmp_path / "light.svg").read_text() == light
    now = (tmp_path / "heavy.svg").read_text()
    assert len(now) < 0.8 * len(heavy)
    for (kind, after), (_, before) in zip(bitmaps(now)[:2], bitmaps(heavy)[:2], strict=True):
        assert kind == "webp" and after.shape == before.shape
        assert np.abs(after[..., 3].astype(int) - before[..., 3]).max() == 0
        shown = before[..., 3] > 0
        assert np.abs(after[shown].astype(int) - before[shown]).mean() < 6

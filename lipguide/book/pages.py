"""What the theme leaves to be desired, mended in one place: head, foot, identifiers, search, weight, downloads."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path

import yaml
from docutils import nodes
from PIL import Image
from sphinx.addnodes import index as index_node
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

import lipguide
from lipguide.book.bookkeeping import leave_out_records
from lipguide.book.downloads import resolve_notebook
from lipguide.book.icons import icon_sheet
from lipguide.book.words import Words

__all__ = ["by_letter", "footer", "mended", "setup"]

REPLACED = {
    # a first visit has no mode on record, and the theme complains of an empty one
    'localStorage.getItem("mode") || ""': 'localStorage.getItem("mode") || "auto"',
    'data-default-mode=""': 'data-default-mode="auto"',
    # names for screen readers that are not what is to be seen, and roles that are none
    ' aria-label="Toggle hidden content"': "",
    ' title="Search" aria-label="Search"': ' title="Search"',
    ' role="doc-biblioentry"': "",
    '<div role="list" class="citation-list">': '<div class="citation-list">',
    '<div class="bd-sidebar-primary bd-sidebar">': '<div class="bd-sidebar-primary bd-sidebar" role="complementary">',
}
HEAVY = 150_000  # bytes: a bitmap above this is kept as WebP


def prepare(app: Sphinx, config: Config) -> None:
    """The footer, and whatever follows from the repository's address: without one there are no buttons."""
    options = config.html_theme_options
    options["extra_footer"] = footer(config.lipguide_repository)
    if config.lipguide_repository:
        options |= {"repository_url": config.lipguide_repository, "repository_branch": "main"}
        options |= {"use_repository_button": True, "use_issues_button": True}


def footer(repository: str) -> str:
    """The last line of every page.

    >>> footer("")
    'lipguide 0.1.0 · MIT licence · every measured number comes from a run on record'
    >>> footer("https://example.org/lipguide").endswith('<a href="https://example.org/lipguide">source</a>')
    True
    """
    parts = [f"lipguide {lipguide.__version__}", "MIT licence", "every measured number comes from a run on record"]
    if repository:
        parts.append(f'<a href="{repository}">source</a>')
    return " · ".join(parts)


def leave_out_scripts(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Drop scripts that are there twice, and those that load kernels from another host."""
    if "script_files" not in context:
        return
    seen, kept = set(), []
    for script in context["script_files"]:
        body = getattr(script, "attributes", {}).get("body", "") or ""
        name = f"{getattr(script, 'filename', script)} {body}"
        if "thebe" in name.lower() or (body and body in seen):
            continue
        seen.add(body)
        kept.append(script)
    context["script_files"][:] = kept  # in place, for Sphinx appends to this list what a page asks for itself
    if page == app.config.root_doc:
        for name in ("moons-data.js", "moons.js"):
            app.add_js_file(name)


def by_letter(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """An appendix has a letter in its title, and its figures and exercises count by that: Fig. A.1.

    No page has to be read again for it.
    """
    for docname, kinds in env.toc_fignumbers.items():
        letter = re.match(r"([A-Z])\. ", env.titles[docname].astext())
        for numbers in kinds.values() if letter else ():  # counted on from other pages without a number until here
            in_order = sorted(numbers, key=lambda name: numbers[name])
            numbers.update({name: (letter[1], place + 1) for place, name in enumerate(in_order)})
    return []


def tidy(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """No identifier twice on a page, and nothing for kernels that the page does not offer."""
    for node in list(doctree.findall(nodes.Element)):
        ids = node.get("ids", [])
        node["ids"] = [i for i in ids if i not in ("exercise-content", "solution-content", "proof-content", "proof")]
    for node in list(doctree.findall(nodes.raw)):
        if "text/x-thebe-config" in node.astext() or node.astext().strip().startswith("<script>kernelName"):
            node.parent.remove(node)


class Terms(SphinxTransform):
    """Words that readers look for, each with the section that answers: search then puts it first."""

    default_priority = 720  # before the index is collected

    def apply(self, **kwargs: object) -> None:
        path = Path(self.env.srcdir) / "book" / "terms.yml"
        if not path.exists():
            return
        self.env.note_dependency(str(path))
        page = Path(self.env.docname).name
        for term, place in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            where, _, heading = place.partition("#")
            if where == page:
                self._mark(term, heading)

    def _mark(self, term: str, heading: str) -> None:
        for section in self.document.findall(nodes.section):
            if not heading or nodes.make_id(heading) in section["ids"]:
                entry = ("single", term, section["ids"][0], "main", None)
                section.insert(1, index_node(entries=[entry], inline=False))
                return
        self.document.reporter.warning(f"terms.yml sends {term!r} to a section {heading!r} that is not on this page")


def finish(app: Sphinx, error: Exception | None) -> None:
    """Mend what templates and other extensions have written."""
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    smaller = _lighten(out / "_images")
    _lighten_drawings(out / "_images")
    pages = {path: path.read_text(encoding="utf-8") for path in out.rglob("*.html")}
    awesome = next((out / "_static" / "vendor" / "fontawesome").glob("*"), None)
    if awesome is not None:
        sheets = [
            path.read_text(encoding="utf-8") for path in (out / "_static").rglob("*.css") if awesome not in path.parents
        ]
        sheet = icon_sheet(list(pages.values()), sheets, awesome)
        (out / "_static" / "icons.css").write_text(sheet, encoding="utf-8")
    for path, text in pages.items():
        text = mended(text, os.path.relpath(out, path.parent))
        for old, new in smaller.items():
            text = text.replace(f"_images/{old}", f"_images/{new}")
        path.write_text(text, encoding="utf-8")
    for docname in app.env.found_docs:
        notebook = out / "_sources" / f"{docname}.ipynb"
        if notebook.exists():
            resolve_notebook(notebook, Words(app.env, docname))


def mended(text: str, root: str) -> str:
    """One page, with what no template or style sheet can reach set right.

    >>> mended('<html><p><i class="x"></i></p></html>', ".")
    '<html><p><i class="x"></i></p></html>'
    """
    awesome = r"\s*<(?:link|script)\b[^>]*vendor/fontawesome[^>]*>(?:</script>)?"
    sheet = f'<link rel="stylesheet" href="{root}/_static/icons.css" />\n  '
    favicon = f'<link rel="icon" type="image/svg+xml" href="{root}/_static/favicon.svg" />\n  '
    if re.search(awesome, text):
        text = re.sub(awesome, "", text).replace("<!-- Pre-loaded", f"{sheet}{favicon}<!-- Pre-loaded", 1)
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    text = re.sub(r'<th class="head([^"]*)"><p></p></th>', r'<td class="head\1"></td>', text)
    return _unique(text, "search-input")


def _unique(text: str, name: str) -> str:
    """Number the second and later elements of one identifier."""
    count = 0

    def numbered(found: re.Match) -> str:
        nonlocal count
        count += 1
        return found[0] if count == 1 else f'id="{name}-{count}"'

    return re.sub(rf'id="{name}"', numbered, text)


def _lighten(folder: Path) -> dict[str, str]:
    """Heavy bitmaps become WebP where that is smaller; old names to new ones."""
    renamed = {}
    for path in sorted(folder.glob("*.png")):
        if path.stat().st_size < HEAVY:
            continue
        small = path.with_suffix(".webp")
        Image.open(path).convert("RGB").save(small, quality=80, method=4)
        if small.stat().st_size < path.stat().st_size:
            path.unlink()
            renamed[path.name] = small.name
        else:
            small.unlink()
    return renamed


def _lighten_drawings(folder: Path) -> None:
    """The same for the bitmaps inside of drawings, each where it stands."""
    for path in sorted(folder.glob("*.svg")):
        text = path.read_text(encoding="utf-8")
        if len(text) > HEAVY:
            path.write_text(re.sub(r'data:image/png;base64,([^"]+)', _as_webp, text), encoding="utf-8")


def _as_webp(found: re.Match) -> str:
    given = base64.b64decode(found[1])
    picture = Image.open(io.BytesIO(given))
    opaque = "A" not in picture.mode or picture.getchannel("A").getextrema()[0] == 255
    made = io.BytesIO()
    if opaque:
        picture.convert("RGB").save(made, "webp", quality=90, method=4)
    else:
        picture.save(made, "webp", lossless=True, method=4)
    if made.tell() >= len(given):
        return found[0]
    return f"data:image/webp;base64,{base64.b64encode(made.getvalue()).decode()}"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("lipguide_repository", "", "html")
    app.add_transform(Terms)
    app.connect("config-inited", prepare)
    app.connect("doctree-read", leave_out_records)
    app.connect("html-page-context", leave_out_scripts, priority=900)
    app.connect("env-get-updated", by_letter, priority=900)  # where figures have been numbered
    app.connect("doctree-resolved", tidy, priority=900)
    app.connect("build-finished", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

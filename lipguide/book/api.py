"""The page `api`: every public name with its docstring, and the way to it and back.

    ```{api}
    ```

lists all names that `lip.*` offers. In the text of every page, `lip.NAME` in backquotes becomes a link to its entry; an
entry links to the chapter where the name first occurs, and to those whose code runs it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from torch.nn import Module

import lipguide
from lipguide.book.contents import pages_of

__all__ = ["Api", "docstring", "names", "setup"]

PAGE = "book/api"
IMPORTED = re.compile(r"^\s*from lipguide(?:\.robustness)? import (\w+(?:, \w+)*)$", re.MULTILINE)
USED = re.compile(r"\blip\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


def names() -> dict[str, object]:
    """Every public name behind `lip.`, and what it is.

    >>> found = names()
    >>> found["losses.HKR"].__name__, found["orthogonal"].__name__
    ('HKR', 'orthogonal')
    """
    found: dict[str, object] = {}
    for name in lipguide.__all__:
        value = getattr(lipguide, name)
        if not isinstance(value, ModuleType):
            found[name] = value
            continue
        for inner in value.__all__:
            member = getattr(value, inner)
            if not isinstance(member, ModuleType):
                found[f"{name}.{inner}"] = member
                continue
            shown = getattr(member, "__all__", [])
            found |= {f"{name}.{inner}.{deep}": getattr(member, deep) for deep in shown}
    return {name: value for name, value in found.items() if callable(value) and (value.__doc__ or "").strip()}


class Api(SphinxDirective):
    """All names, one section each."""

    def run(self) -> list[nodes.Node]:
        found, used = names(), _uses(self.env)
        rooms: dict[str, nodes.section] = {}
        for name in sorted(found, key=lambda name: (name.count("."), name.lower())):
            room = name.rpartition(".")[0]
            if room not in rooms:
                rooms[room] = self._room(room)
            rooms[room] += self._entry(name, found[name], used.get(name, {}))
        return list(rooms.values())

    def _room(self, room: str) -> nodes.section:
        title = f"lip.{room}" if room else "Layers, bounds, export"
        section = nodes.section(ids=[nodes.make_id(f"api-room-{room or 'root'}")])
        section += nodes.title("", title)
        self.state.document.note_explicit_target(section)
        return section

    def _entry(self, name: str, value: object, used: dict[str, bool]) -> nodes.section:
        label = _label(name)
        section = nodes.section(ids=[label], names=[label], classes=["api-entry"])
        section += nodes.title("", "", nodes.literal("", f"lip.{name}"))
        self.state.document.note_explicit_target(section)
        kind = "class" if inspect.isclass(value) else "function"
        self.env.get_domain("py").note_object(f"lipguide.{name}", kind, label)
        section += _code(_signature(name, value))
        section += list(docstring(inspect.getdoc(value) or ""))
        if used:
            section += self._places(used)
        return section

    def _places(self, used: dict[str, bool]) -> nodes.paragraph:
        """Where the book introduces a name, and which chapters run it."""
        first, *_ = used
        measured = [page for page, runs in used.items() if runs and page != first]
        line = nodes.paragraph(classes=["api-places"])
        for words, pages in (("Introduced in ", [first]), ("; measured in ", measured)):
            if pages:
                line += nodes.Text(words)
            for place, page in enumerate(pages):
                line += nodes.Text(", " if place else "")
                line += _to_page(self.env, page)
        line += nodes.Text(".")
        return line


def docstring(text: str) -> Iterator[nodes.Node]:
    """A docstring of the house as nodes: paragraphs, arguments, formulas, examples.

    >>> [type(node).__name__ for node in docstring("What it is.\\n\\nArgs:\\n    x: a number.\\n\\n>>> 1 + 1\\n2")]
    ['paragraph', 'definition_list', 'literal_block']
    >>> [node.astext() for node in docstring("The loss:\\n\\n.. math:: a +\\n    b")]
    ['The loss:', 'a + b']
    """
    for block in re.split(r"\n\s*\n", text):
        first = block.strip().splitlines()[0] if block.strip() else ""
        if first.startswith(">>>"):
            yield _code(inspect.cleandoc(block), "pycon")
        elif first.startswith(".. math::"):
            yield _formula(" ".join(block.split()).removeprefix(".. math:: "))
        elif first in ("Args:", "Returns:", "Raises:", "Attributes:"):
            yield _definitions(first.rstrip(":"), block)
        elif block.startswith(" "):
            yield _code(inspect.cleandoc(block), "text")
        elif first:
            yield _paragraph(" ".join(block.split()))


def _definitions(title: str, block: str) -> nodes.definition_list:
    """`name: meaning` lines, each with its continuation."""
    found = nodes.definition_list(classes=["arguments"])
    lines = inspect.cleandoc("\n".join(block.strip("\n").splitlines()[1:])).splitlines()
    for entry in re.split(r"\n(?=\S)", "\n".join(lines)):
        name, colon, meaning = " ".join(entry.split()).partition(": ")
        item = nodes.definition_list_item()
        item += nodes.term("", "", nodes.literal("", name if colon else title))
        item += nodes.definition("", _paragraph(meaning or name))
        found += item
    return found


def _paragraph(text: str) -> nodes.paragraph:
    """Words with `code`, *stress* and formulas in them."""
    paragraph = nodes.paragraph()
    for place, part in enumerate(re.split(r"(:math:`[^`]+`|`+[^`]+`+)", text)):
        if place % 2:
            formula = part.startswith(":math:")
            words = part.removeprefix(":math:").strip("`")
            paragraph += nodes.math("", words) if formula else nodes.literal("", words)
            continue
        for inner, words in enumerate(re.split(r"(?<!\w)\*(\w[^*]*\w)\*(?!\w)", part)):
            paragraph += nodes.emphasis("", words) if inner % 2 else nodes.Text(words)
    return paragraph


def _formula(latex: str) -> nodes.math_block:
    return nodes.math_block("", latex, **{"nowrap": False, "no-wrap": False, "number": None, "label": None})


def _code(text: str, language: str = "python") -> nodes.literal_block:
    return nodes.literal_block(text, text, language=language)


def _signature(name: str, value: object) -> str:
    """How it is called; annotations are left to the source, for a reader looks for names and defaults.

    >>> _signature("FullSort", lipguide.FullSort), _signature("GroupSort", lipguide.GroupSort)
    ('lip.FullSort()', 'lip.GroupSort(group_size)')
    """
    if getattr(value, "__init__", None) is Module.__init__:  # it takes anything, to complain of it
        return f"lip.{name}()"
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return f"lip.{name}(...)"
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return f"lip.{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def _label(name: str) -> str:
    """Where the entry of a name is; anchors know no capitals, so a class says that it is one.

    >>> _label("data.Digits"), _label("data.digits")
    ('api-class-data-digits', 'api-data-digits')
    """
    kind = "class-" if name.rpartition(".")[2][0].isupper() else ""
    return nodes.make_id(f"api-{kind}{name}".replace("_", "-"))


def _to_page(env: BuildEnvironment, page: str) -> nodes.Node:
    link = pending_xref("", refdomain="std", reftype="doc", reftarget=f"/{page}", refexplicit=False, refdoc=env.docname)
    link += nodes.inline(page, Path(page).name)
    return link


def _uses(env: BuildEnvironment) -> dict[str, dict[str, bool]]:
    """For each name, the pages that name it in reading order, and whether their code runs it."""
    found: dict[str, dict[str, bool]] = {}
    known = names()
    for page in pages_of(Path(env.srcdir)):
        if page == PAGE or page not in env.found_docs:
            continue
        source = Path(env.doc2path(page))
        env.note_dependency(str(source))
        prose, code = _texts(source)
        run = named_in(code, known)
        for name in run | named_in(prose, known):
            found.setdefault(name, {})[page] = name in run
    return found


def named_in(text: str, known: Collection[str]) -> set[str]:
    """The names of `known` that a text calls `lip.NAME`, or `room.NAME` where it imports the room from lipguide.

    >>> code = "from lipguide import losses\\nloss = losses.HKR(2)\\nother.data.Digits, lip.orthogonal"
    >>> sorted(named_in(code, {"losses.HKR", "losses.KR", "data.Digits", "orthogonal"}))
    ['losses.HKR', 'orthogonal']
    """
    found = {match[1] for match in USED.finditer(text)}
    for match in IMPORTED.finditer(text):
        rooms = "|".join(re.split(r"\W+", match[1]))
        found |= set(re.findall(rf"(?<![\w.])((?:{rooms})\.\w+)", text))
    return found & set(known)


def _texts(path: Path) -> tuple[str, str]:
    """The prose and the code of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        kinds = {
            kind: "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind)
            for kind in ("markdown", "code")
        }
        return kinds["markdown"], kinds["code"]
    code = re.findall(r"^```\{code-cell\}.*?^```", text, flags=re.S | re.M)
    return re.sub(r"^```\{code-cell\}.*?^```", "", text, flags=re.S | re.M), "\n".join(code)


class LinkNames(SphinxTransform):
    """`lip.NAME` in the text becomes a link to its entry, where the book has the page."""

    default_priority = 730

    def apply(self, **kwargs: object) -> None:
        if PAGE not in self.env.found_docs or self.env.docname == PAGE:
            return
        known = names()
        for literal in list(self.document.findall(nodes.literal)):
            found = USED.match(literal.astext())
            if found is None or found[1] not in known or isinstance(literal.parent, nodes.reference | nodes.title):
                continue
            label = _label(found[1])
            link = pending_xref(
                "", refdomain="std", reftype="ref", reftarget=label, refexplicit=True, refdoc=self.env.docname
            )
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("api", Api)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

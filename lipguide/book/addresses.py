"""What follows from the one configured address, `lipguide_repository`: how to install, and where a chapter can be run.

Without an address nothing of it appears but how to install from a copy of the sources.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

__all__ = ["Badges", "Install", "badges", "install", "setup"]


def install(repository: str) -> str:
    """The commands that install the package.

    >>> install("")
    "pip install -e '.[detection]'   # in the folder of the sources"
    >>> print(install("https://github.com/OWNER/NAME"))
    pip install 'lipguide[detection] @ git+https://github.com/OWNER/NAME'
    """
    if not repository:
        return "pip install -e '.[detection]'   # in the folder of the sources"
    return f"pip install 'lipguide[detection] @ git+{repository}'"


def badges(repository: str, chapter: str) -> dict[str, str]:
    """Where a chapter can be run without installing anything, by the name of the place.

    Both open what the repository holds: Colab a notebook of the published pages (branch gh-pages), Binder the source.

    >>> badges("", "why")
    {}
    >>> badges("https://github.com/OWNER/NAME", "why")["Colab"]
    'https://colab.research.google.com/github/OWNER/NAME/blob/gh-pages/_sources/book/why.ipynb'
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", repository)
    if found is None:
        return {}
    name = found[1]
    return {
        "Colab": f"https://colab.research.google.com/github/{name}/blob/gh-pages/_sources/book/{chapter}.ipynb",
        "Binder": f"https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/book/{chapter}.md",
    }


class Install(SphinxDirective):
    """How to install, as a block to copy."""

    def run(self) -> list[nodes.Node]:
        text = install(self.config.lipguide_repository)
        return [nodes.literal_block(text, text, language="bash")]


class Badges(SphinxTransform):
    """Under the title of each page that is a notebook: where it can be run."""

    default_priority = 740

    def apply(self, **kwargs: object) -> None:
        page = self.env.docname
        found = badges(self.config.lipguide_repository, Path(page).name)
        if not found or not self.env.doc2path(page).endswith(".ipynb"):
            return
        line = nodes.paragraph(classes=["badges"])
        for name, address in found.items():
            line += nodes.reference("", f"Open in {name}", refuri=address, internal=False)
            line += nodes.Text(" ")
        chapter = next(self.document.findall(nodes.section))
        chapter.insert(1, line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("install", Install)
    app.add_transform(Badges)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

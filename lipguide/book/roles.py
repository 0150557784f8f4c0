"""Two pieces of Sphinx that put the ledger into the text.

    {ledger}`spectral.largest:.3f`        a number of this chapter's results
    {ledger}`why:radius:.2f`              of another chapter's
    {ledger}`why.full:radius:.2f`         of a profile other than the one being built
    {ledger}`why:provenance.seconds:.0f`  how long the run took

and ```` ```{run-box} ````, which says where and when the chapter last ran and how long each profile takes.
"""

from __future__ import annotations

import os
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from lipguide.book.ledger import PROFILES, lookup, read

__all__ = ["LedgerRole", "RunBox", "describe", "ledger_path", "parts", "setup"]


class LedgerRole(SphinxRole):
    """A number from a ledger file; a key that is not there is a warning, and so fails the build."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            chapter, key, form = parts(self.text)
            path = ledger_path(self.env, chapter)
            self.env.note_dependency(str(path))
            content = read(path)
            # Provenance is there for the asking too: how long a run took, say.
            source = content if key.startswith("provenance.") else content["results"]
            text = format(lookup(source, key), form)
        except (OSError, KeyError, ValueError, TypeError) as error:
            message = self.inliner.reporter.warning(f"ledger role {self.text!r}: {error}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        return [nodes.inline(text, text, classes=["ledger"])], []


def parts(text: str) -> tuple[str | None, str, str]:
    """The chapter (None for the one at hand), the key and the format of a role's text.

    >>> parts("why.full:radius:.2f")
    ('why.full', 'radius', '.2f')
    >>> parts("radius:.2f")
    (None, 'radius', '.2f')
    """
    fields = text.split(":")
    if len(fields) == 2:
        return None, fields[0], fields[1]
    if len(fields) == 3:
        return fields[0], fields[1], fields[2]
    raise ValueError("it should read key:format or chapter:key:format")


class RunBox(SphinxDirective):
    """The box at the head of a chapter, made from its ledger files."""

    def run(self) -> list[nodes.Node]:
        chapter = Path(self.env.docname).name
        box = nodes.container(classes=["run-box"])
        for profile in PROFILES:
            path = ledger_path(self.env, f"{chapter}.{profile}")
            self.env.note_dependency(str(path))
            text = describe(profile, read(path)["provenance"]) if path.exists() else "not yet run."
            line = nodes.paragraph()
            line += nodes.strong(text=profile)
            line += nodes.Text(f"\u2002{text}")
            box += line
        return [box]


def describe(profile: str, run: dict) -> str:
    """One line about a run, from its provenance.

    >>> describe("quick", {"seconds": 75.2, "device": "X (2 cores)", "torch": "2.14.1", "start": "2026-11-21T01:00:00",
    ...                    "commit": "abc", "peak_memory_mib": 512, "data": None, "seed": 0})
    '1 min 15 s on X (2 cores), 512 MiB at most; last verified on 2026-11-21 with torch 2.14.1, commit abc, seed 0.'
    """
    minutes, seconds = divmod(run["seconds"], 60)
    took = f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.0f} s"
    data = f", data {run['data']['name']} ({run['data']['hash'][:12]})" if run["data"] else ""
    return (
        f"{took} on {run['device']}, {run['peak_memory_mib']} MiB at most; last verified on {run['start'][:10]} with "
        f"torch {run['torch']}, commit {run['commit']}, seed {run['seed']}{data}."
    )


def ledger_path(env, name: str | None) -> Path:
    """The ledger file of a chapter ("why") or of one of its profiles ("why.full")."""
    name = name or Path(env.docname).name
    if name.rpartition(".")[2] not in PROFILES:
        name = f"{name}.{os.environ.get('LIPGUIDE_PROFILE', 'quick')}"
    return Path(env.srcdir) / "book" / "results" / f"{name}.json"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("ledger", LedgerRole())
    app.add_directive("run-box", RunBox)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Two pieces of Sphinx that put the ledger into the text.

    {ledger}`spectral.largest:.3f`        a number of this chapter's results
    {ledger}`why:radius:.2f`              of another chapter's
    {ledger}`why.full:radius:.2f`         of a profile other than the one being built
    {ledger}`why:provenance.seconds:.0f`  how long the run took

and ```` ```{run-box} ````, which says where and when the chapter last ran and how long each profile took.
"""

from __future__ import annotations

import os
import re
from datetime import date
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole

from lipguide.book.guidelines import Guidelines
from lipguide.book.ledger import PROFILES, lookup, read
from lipguide.book.marks import Advice, aim, check
from lipguide.book.tables import readable

__all__ = ["LedgerRole", "RunBox", "describe", "duration", "keep_units", "ledger_path", "number", "parts", "setup"]


class LedgerRole(SphinxRole):
    """A number from a ledger file; a key that is not there is a warning, and so fails the build."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            self.env.note_dependency(str(ledger_path(self.env, parts(self.text)[0])))
            text = number(self.env, self.text)
        except (OSError, KeyError, ValueError, TypeError) as error:
            message = self.inliner.reporter.warning(f"ledger role {self.text!r}: {error}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        return [nodes.inline(text, text, classes=["ledger"])], []


def number(env, text: str, docname: str | None = None) -> str:
    """What a ledger role says, on the page at hand or on another one."""
    chapter, key, form = parts(text)
    content = read(ledger_path(env, chapter or (Path(docname).name if docname else None)))
    # Provenance is there for the asking too: how long a run took, say.
    source = content if key.startswith("provenance.") else content["results"]
    return readable(format(lookup(source, key), form))


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


class KeepUnits(SphinxTransform):
    """No line breaks between a number and its unit."""

    default_priority = 700

    def apply(self, **kwargs: object) -> None:
        keep_units(self.document)


def keep_units(document: nodes.document) -> None:
    """Put a no-break space between each number from a ledger and the unit behind it."""
    for number in list(document.findall(nodes.inline)):
        if "ledger" not in number["classes"]:
            continue
        behind = number.next_node(nodes.Text, descend=False, siblings=True)
        if behind is None or behind.parent.index(behind) != number.parent.index(number) + 1:
            continue
        joined = re.sub(r"^\s(?=(%|ms|s|min|MiB|points)(\W|$))", "\u00a0", str(behind))
        behind.parent.replace(behind, nodes.Text(joined))


class RunBox(SphinxDirective):
    """What the chapter's numbers were made by. It is written at the head of a chapter and shown at its foot."""

    def run(self) -> list[nodes.Node]:
        chapter = Path(self.env.docname).name
        runs = []
        for profile in PROFILES:
            path = ledger_path(self.env, f"{chapter}.{profile}")
            self.env.note_dependency(str(path))
            if path.exists():
                runs.append((profile, read(path)["provenance"]))
        if not runs:
            return []
        texts = {profile: "not run on record." for profile in PROFILES} | {p: describe(run) for p, run in runs}
        lines = "".join(f"<p><strong>{profile}</strong>\u2002{escape(text)}</p>" for profile, text in texts.items())
        summary = "; ".join(summarize(profile, run) for profile, run in runs)
        box = nodes.container(classes=["run-box"])
        box += nodes.raw("", f"<details><summary>{escape(summary)}</summary>{lines}</details>", format="html")
        return [box]


class RunBoxToFoot(SphinxTransform):
    """Who reads a chapter wants its subject first; where its numbers come from stands below."""

    default_priority = 710

    def apply(self, **kwargs: object) -> None:
        boxes = [n for n in self.document.findall(nodes.container) if "run-box" in n["classes"]]
        for box in boxes:
            box.parent.remove(box)
            chapter = next(self.document.findall(nodes.section), self.document)
            chapter.append(box)


def summarize(profile: str, run: dict) -> str:
    """The quiet line at the foot of a chapter.

    >>> summarize("quick", {"seconds": 75.2, "start": "2026-11-21T01:00:00"})
    'Numbers of the quick run: 21 Nov 2026, 1 min 15 s'
    """
    day = date.fromisoformat(run["start"][:10])
    return f"Numbers of the {profile} run: {day.day} {day:%b %Y}, {duration(run['seconds'])}"


def describe(run: dict) -> str:
    """One line about a run, from its provenance.

    >>> describe({"seconds": 75.2, "device": "X (2 cores)", "torch": "2.14.1", "start": "2026-11-21T01:00:00",
    ...           "commit": "abc", "peak_memory_mib": 512, "data": None, "seed": 0})
    '1 min 15 s on X (2 cores), 512 MiB at most; last verified on 2026-11-21 with torch 2.14.1, commit abc, seed 0.'
    """
    data = f", data {run['data']['name']} ({run['data']['hash'][:12]})" if run["data"] else ""
    return (
        f"{duration(run['seconds'])} on {run['device']}, {run['peak_memory_mib']} MiB at most; last verified on "
        f"{run['start'][:10]} with torch {run['torch']}, commit {run['commit']}, seed {run['seed']}{data}."
    )


def duration(seconds: float) -> str:
    """Seconds as a clock reads them.

    >>> duration(75.2), duration(8.4)
    ('1 min 15 s', '8 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def ledger_path(env, name: str | None) -> Path:
    """The ledger file of a chapter ("why") or of one of its profiles ("why.full")."""
    name = name or Path(env.docname).name
    if name.rpartition(".")[2] not in PROFILES:
        name = f"{name}.{os.environ.get('LIPGUIDE_PROFILE', 'quick')}"
    return Path(env.srcdir) / "book" / "results" / f"{name}.json"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("ledger", LedgerRole())
    app.add_role("advice", Advice())
    app.add_directive("run-box", RunBox)
    app.add_directive("guidelines", Guidelines)
    app.connect("env-before-read-docs", check)
    app.connect("doctree-resolved", aim)
    app.add_transform(KeepUnits)
    app.add_transform(RunBoxToFoot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Two pieces of Sphinx that put the ledger into the text.

    {ledger}`spectral.largest:.3f`        a number of this chapter's results
    {ledger}`why:radius:.2f`              of another chapter's
    {ledger}`why.full:radius:.2f`         of a profile other than the one being built
    {ledger}`why:provenance.seconds:.0f`  how long the run took

and ```` ```{run-box} ````, which says where and when the chapter last ran and how long each profile takes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole

from lipguide.book.ledger import PROFILES, lookup, read

__all__ = ["LedgerRole", "RunBox", "describe", "keep_units", "ledger_path", "parts", "readable", "setup"]


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
            text = readable(format(lookup(source, key), form))
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


def readable(text: str) -> str:
    """A number as people write it: no computer's exponent, and a minus that is one.

    >>> readable("3e-19"), readable("3.7e+09"), readable("+5e-06"), readable("-0.25"), readable("0e+00")
    ('3·10⁻¹⁹', '3.7·10⁹', '+5·10⁻⁶', '−0.25', '0')
    >>> readable("1e-06"), readable("offset, rate 1e-2")
    ('10⁻⁶', 'offset, rate 1e-2')
    """
    number = re.fullmatch(r"([+-]?)(\d[\d,.]*)(?:e([+-]\d+))?", text)
    if not number:
        return text
    sign, digits, power = number.groups()
    if power is not None and float(digits) == 0:
        return "0"
    sign = sign.replace("-", "−")
    if power is None:
        return sign + digits
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{sign}10{raised}" if float(digits) == 1 else f"{sign}{digits}·10{raised}"


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
    app.add_transform(KeepUnits)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The page `results`: every run on record, and what has not run yet.

```{records}
```
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lipguide.book.ledger import read
from lipguide.book.roles import duration
from lipguide.book.tables import table, written
from lipguide.tasks.weights import WEIGHTS, run_of

__all__ = ["Records", "flat", "setup"]


class Records(SphinxDirective):
    """Runs of this book, runs of hours, weights that ship, and the gaps."""

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.srcdir) / "book" / "results"
        self.env.note_dependency(str(folder))
        records = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
        for path in folder.glob("*.json"):
            self.env.note_dependency(str(path))
        chapters = {name: record for name, record in records.items() if name.endswith(".quick")}
        others = {name: record for name, record in records.items() if name not in chapters}
        return [
            *self._section(
                "The chapters", "The quick run of each chapter, from which its page takes its numbers.", chapters
            ),
            *self._section("Longer runs", "Runs of minutes to hours whose records the chapters read.", others),
            self._weights(),
            self._gaps(chapters, records),
        ]

    def _section(self, title: str, about: str, records: dict[str, dict]) -> Iterator[nodes.Node]:
        section = _titled(title)
        section += nodes.paragraph("", about)
        section += _html(_runs(records))
        for name, record in records.items():
            section += _html(_numbers(name, record["results"]))
        yield section

    def _weights(self) -> nodes.section:
        section = _titled("Weights that ship")
        section += nodes.paragraph("", "Each file carries the run that made it in its header.")
        files = sorted(WEIGHTS.glob("*.safetensors"))
        rows = [{"weights": path.stem, "size": path.stat().st_size / 2**20, **_made_by(path)} for path in files]
        section += _html(table(rows, {"size": "MiB", "pictures": "in training"}, {"size": 2})._repr_html_())
        return section

    def _gaps(self, chapters: dict[str, dict], records: dict[str, dict]) -> nodes.section:
        """Said once, here, and on no other page."""
        section = _titled("Not yet run")
        missing = [name.removesuffix(".quick") for name in chapters if name.replace(".quick", ".full") not in records]
        text = f"The profile full, the real training on a GPU, has no record yet for: {', '.join(missing)}."
        section += nodes.paragraph("", text if missing else "Every profile of every chapter is on record.")
        return section


def flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of a record with its path, as a ledger role asks for it; a long list stays one entry.

    >>> list(flat({"a": {"b": 1}, "c": [1.5, 2.5]}))
    [('a.b', 1), ('c', '1.5, 2.5')]
    """
    if isinstance(content, dict):
        for key, value in content.items():
            yield from flat(value, f"{name}.{key}" if name else key)
    elif isinstance(content, list) and any(isinstance(value, dict | list) for value in content):
        for place, value in enumerate(content):
            yield from flat(value, f"{name}.{place}")
    elif isinstance(content, list):
        yield name, ", ".join(str(value) for value in content)
    else:
        yield name, content


def _runs(records: dict[str, dict]) -> str:
    rows = []
    for name, record in records.items():
        run = record["provenance"]
        data = run["data"]["name"] if run["data"] else "made on the spot"
        row = {"record": name, "day": run["start"][:10], "time": duration(run["seconds"]), "device": run["device"]}
        torch = run["torch"].partition("+")[0]
        rows.append({**row, "torch": torch, "commit": run["commit"], "seed": str(run["seed"]), "data": data})
    return table(rows)._repr_html_()


def _numbers(name: str, results: dict) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{escape(_short(v))}</td></tr>" for key, v in flat(results)
    )
    head = "<thead><tr><th>key</th><th>value</th></tr></thead>"
    body = f'<table class="numbers record">{head}<tbody>{rows}</tbody></table>'
    return f"<details><summary>all numbers of <code>{escape(name)}</code></summary>{body}</details>"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return written(value, 4)
    text = written(value, 0) if not isinstance(value, str) else value
    return text if len(text) <= 200 else f"{text[:200].rsplit(', ', 1)[0]}, …"


def _made_by(path: Path) -> dict[str, Any]:
    """When, where and on what a file of weights was trained, from its header."""
    run = run_of(path)
    data = run.get("data") or {}
    data = {"name": data} if isinstance(data, str) else data
    steps = (run.get("recipe") or {}).get("steps")
    made = {"day": (run.get("start") or "–")[:10], "device": run.get("device"), "commit": run.get("commit")}
    return {**made, "data": data.get("name"), "pictures": data.get("pictures"), "steps": steps}


def _titled(title: str) -> nodes.section:
    section = nodes.section(ids=[nodes.make_id(title)])
    section += nodes.title("", title)
    return section


def _html(text: str) -> nodes.raw:
    return nodes.raw("", f'<div class="wide-table">{text}</div>', format="html")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("records", Records)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Tables of results: units in the head, decimals under each other, and numbers as people write them.

A cell that ends in `table(rows, units=..., digits=...)` shows a table where it would otherwise echo a dict.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Table", "readable", "table"]

Rows = Sequence[Mapping[str, Any]] | Mapping[str, Any]


def table(rows: Rows, units: Mapping[str, str] | None = None, digits: int | Mapping[str, int] = 2) -> Table:
    """A table of results; the last line of a cell shows it.

    Args:
        rows: one mapping a row, from the head of a column to its value; an underscore is shown as a space. A mapping
            of mappings names its rows in a first column, and a mapping of plain values is one row.
        units: the unit of a column, which goes into its head.
        digits: decimals of the numbers, for all columns or by column.

    >>> table([{"layer": "dense", "time": 0.1737, "bound": 1.0}, {"layer": "conv", "time": 12.25}], {"time": "ms"})
    layer  time (ms)  bound
    dense       0.17   1.00
    conv       12.25      –
    >>> table({"ReLU": {"gradient": 0.5}, "MaxMin": {"gradient": 1.0}}, digits=1)
            gradient
    ReLU         0.5
    MaxMin       1.0
    """
    rows = _listed(rows)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    for name in [*(units or {}), *(digits if isinstance(digits, Mapping) else {})]:
        if name not in heads:
            raise ValueError(f"no column {name!r}; the table has {', '.join(heads)}")
    decimals = {head: digits if isinstance(digits, int) else digits.get(head, 2) for head in heads}
    cells = [[written(row.get(head), decimals[head]) for head in heads] for row in rows]
    numbers = [all(_is_number(row.get(head)) for row in rows) for head in heads]
    words = {head: head.replace("_", " ") for head in heads}
    named = [f"{words[head]} ({units[head]})" if head in (units or {}) else words[head] for head in heads]
    return Table(named, cells, numbers)


class Table:
    """What `table` returns: it shows itself as HTML on a page and as text in a terminal."""

    def __init__(self, heads: list[str], cells: list[list[str]], numbers: list[bool]) -> None:
        self.heads, self.cells, self.numbers = heads, cells, numbers

    def __repr__(self) -> str:
        columns = list(zip(self.heads, *self.cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = []
        for row in [self.heads, *self.cells]:
            placed = zip(row, widths, self.numbers, strict=True)
            lines.append(
                "  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in placed)
            )
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head = _row("th", self.heads, self.numbers)
        body = "\n".join(_row("td", row, self.numbers) for row in self.cells)
        return f'<table class="numbers">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def written(value: Any, decimals: int) -> str:
    """One value as a cell shows it.

    >>> written(0.17366899999160523, 2), written(3e-19, 1), written(None, 2), written(True, 2), written(1234567, 0)
    ('0.17', '3.0·10⁻¹⁹', '–', 'yes', '1\u202f234\u202f567')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else readable(str(value))
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    lost = value != 0 and abs(value) < 0.5 * 10**-decimals
    return readable(f"{value:.1e}" if lost or abs(value) >= 1e7 else f"{value:.{decimals}f}")


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


def _listed(rows: Rows) -> list[dict[str, Any]]:
    if not rows:
        raise ValueError("a table needs at least one row")
    if not isinstance(rows, Mapping):
        return [dict(row) for row in rows]
    if all(isinstance(row, Mapping) for row in rows.values()):
        return [{"": name, **row} for name, row in rows.items()]
    return [dict(rows)]


def _is_number(value: Any) -> bool:
    return value is None or (not isinstance(value, bool) and (isinstance(value, int | float) or hasattr(value, "item")))


def _row(tag: str, cells: list[str], numbers: list[bool]) -> str:
    """One row; a head without a name is an ordinary cell, for a screen reader would announce an empty head."""
    parts = []
    for cell, number in zip(cells, numbers, strict=True):
        name = tag if cell else "td"
        look = ' class="number"' if number else ""
        parts.append(f"<{name}{look}>{html.escape(cell)}</{name}>")
    return f"<tr>{''.join(parts)}</tr>"

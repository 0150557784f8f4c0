"""An ε to move: numbers, pictures and boxes that a chapter has computed, one position of a slider each.

Everything is in the output of the cell, so no kernel stands behind the page. `book/_static/slider.js` shows what
belongs to the position that is chosen, by pointer, thumb or arrow keys. Without it one still picture and the table of
all positions are there to be read.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from lipguide.book.figures import COLOURS, LIPSCHITZ
from lipguide.book.tables import Table, table, written

__all__ = ["Slider", "boxed", "held", "slider"]

WIDE = 300  # a drawing's own units
# In the drawing itself, so that a notebook without the book's style sheet shows the same.
LOOK = f"""<style>
.boxed rect {{ fill: none; stroke: {LIPSCHITZ}; stroke-width: 4 }}
.boxed rect.halo {{ stroke: #fff; stroke-width: 7 }}
.boxed text {{ font: bold 13px sans-serif; fill: #fff; stroke: #111; stroke-width: 3px; paint-order: stroke }}
.boxed .lost rect {{ stroke: {COLOURS["vermillion"]}; stroke-width: 2; stroke-dasharray: 5 4 }}
.boxed .lost rect.halo {{ stroke: #fff; stroke-width: 4; stroke-dasharray: none }}
</style>"""
BOX = re.compile(r'<g class="\w+" data-until="([^"]+)"')

Frame = torch.Tensor | str
Picture = str | Sequence[Frame]


def slider(
    epsilons: Sequence[float],
    rows: Sequence[Mapping[str, float]] = (),
    pictures: Mapping[str, Picture] | None = None,
    *,
    start: float,
    colours: Mapping[str, str] | None = None,
    unit: str = "%",
    digits: int = 0,
) -> Slider:
    """A slider over a grid of ε; the last line of a cell shows it.

    Args:
        epsilons: the positions, in rising order.
        rows: for each position, what was measured there: names and numbers. They are drawn as bars, one a name, and
            100 fills a bar.
        pictures: what is to be seen, by its name. A picture is one drawing by `boxed`, whose boxes change with ε by
            themselves, or a list with a frame for each position: an image (3, height, width) in [0, 1] or a drawing.
        start: the position of the still picture; one of `epsilons`.
        colours: of the bars, by their names; the others have the colour of 1-Lipschitz networks.
        unit: of the numbers.
        digits: decimals of the numbers.

    A scene of two objects, certified up to 0.3 and 0.1. A box holds at ε while its radius is *above* ε:

    >>> picture = boxed(torch.rand(3, 74, 74), [[0.1, 0.2, 0.4, 0.8], [0.5, 0.2, 0.9, 0.8]], [0.3, 0.1], ["7", "4"])
    >>> grid = [0.0, 0.1, 0.2, 0.3]
    >>> recall = [{"certified recall": 100.0 * sum(r > eps for r in (0.3, 0.1)) / 2} for eps in grid]
    >>> slider(grid, recall, {"one scene": picture}, start=0.2)
       ε  certified recall (%)
    0.00                   100
    0.10                    50
    0.20                    50
    0.30                     0
    >>> slider(grid, pictures={"one scene": picture}, start=0.2).says[2]
    'ε = 0.20: 1 of 2 boxes certified'
    """
    epsilons, rows, pictures = [float(eps) for eps in epsilons], list(rows), dict(pictures or {})
    if not rows and not pictures:
        raise ValueError("a slider needs rows or pictures to show")
    counts = {name: len(picture) for name, picture in pictures.items() if not isinstance(picture, str)}
    if rows:
        counts["rows"] = len(rows)
    for name, count in counts.items():
        if count != len(epsilons):
            raise ValueError(f"{name}: {count} for {len(epsilons)} positions of the slider; there should be one each")
    if epsilons != sorted(set(epsilons)):
        raise ValueError(f"the positions of the slider should rise, and do not: {epsilons}")
    if start not in epsilons:
        raise ValueError(f"start={start} is none of the positions of the slider: {epsilons}")
    return Slider(epsilons, rows, pictures, epsilons.index(start), dict(colours or {}), unit, digits)


@dataclass(frozen=True, repr=False)
class Slider:
    """What `slider` returns: HTML on a page, a table in a terminal."""

    epsilons: list[float]
    rows: list[Mapping[str, float]]
    pictures: dict[str, Picture]
    start: int
    colours: dict[str, str]
    unit: str
    digits: int

    @property
    def says(self) -> list[str]:
        """What a screen reader hears at each position."""
        numbers = [[f"{n} {self._written(v)}" for n, v in self._row(k).items()] for k in range(len(self.epsilons))]
        return [_sentence(shown, more) for shown, more in zip(self._shows, numbers, strict=True)]

    @property
    def _shows(self) -> list[str]:
        """What stands below the slider at each position: numbers have bars of their own."""
        shown = []
        for eps in self.epsilons:
            counts = [held(drawing, eps) for drawing in self._drawings().values()]
            parts = [f"{kept} of {every} boxes certified" for kept, every in counts]
            shown.append(_sentence(f"ε = {written(eps, self._decimals)}", parts))
        return shown

    @property
    def _decimals(self) -> int:
        return 2 if all(math.isclose(eps, round(eps, 2)) for eps in self.epsilons) else 3

    def _row(self, place: int) -> dict[str, float]:
        return {name: float(value) for name, value in self.rows[place].items()} if self.rows else {}

    def _drawings(self) -> dict[str, str]:
        return {name: picture for name, picture in self.pictures.items() if isinstance(picture, str)}

    def _written(self, value: float) -> str:
        return f"{written(value, self.digits)} {self.unit}".strip()

    def _table(self) -> Table:
        rows: list[dict[str, float | int]] = []
        for place, eps in enumerate(self.epsilons):
            kept = {f"boxes certified, {name}": held(d, eps)[0] for name, d in self._drawings().items()}
            rows.append({"ε": eps} | (self._row(place) or kept))
        measured = list(self._row(0))
        units = {name: self.unit for name in measured if self.unit}
        return table(rows, units, {name: self.digits for name in measured} | {"ε": self._decimals})

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        pictures = "".join(self._shown(name, picture) for name, picture in self.pictures.items())
        bars = "".join(map(self._bar, self._row(0)))
        return "\n".join(
            [
                f'<div class="epsilon-slider" data-epsilons="{json.dumps(self.epsilons)}">',
                f'<div class="epsilon-pictures">{pictures}</div>',
                self._knob(),
                f'<p class="epsilon-says">{html.escape(self._shows[self.start])}</p>',
                bars,
                f"<details><summary>All positions in a table</summary>{self._table()._repr_html_()}</details></div>",
            ]
        )

    def _knob(self) -> str:
        """Hidden until the script is there that moves things."""
        options = f'min="0" max="{len(self.epsilons) - 1}" step="1" value="{self.start}"'
        texts = f'data-says="{_list(self.says)}" data-shows="{_list(self._shows)}"'
        return f'<label class="epsilon-knob" hidden>ε <input type="range" {options} {texts}></label>'

    def _bar(self, name: str) -> str:
        numbers = [self._row(place)[name] for place in range(len(self.rows))]
        widths = [round(min(max(number, 0.0), 100.0), 2) for number in numbers]
        values = [self._written(number) for number in numbers]
        filled = f"width:{widths[self.start]}%;background:{self.colours.get(name, LIPSCHITZ)}"
        return (
            f'<div class="epsilon-bar" data-widths="{_list(widths)}" data-values="{_list(values)}">'
            f'<span class="name">{html.escape(name)}</span><span class="rail"><span style="{filled}"></span></span>'
            f'<span class="value">{html.escape(values[self.start])}</span></div>'
        )

    def _shown(self, name: str, picture: Picture) -> str:
        inner = _at(picture, self.epsilons[self.start]) if isinstance(picture, str) else self._frames(name, picture)
        return f'<div class="epsilon-picture">{inner}<span>{html.escape(name)}</span></div>'

    def _frames(self, name: str, frames: Sequence[Frame]) -> str:
        parts = []
        for place, (frame, said) in enumerate(zip(frames, self.says, strict=True)):
            hidden = "" if place == self.start else " hidden"
            alt = html.escape(f"{name}, {said}")
            inner = frame if isinstance(frame, str) else f'<img src="{_embedded(frame)}" alt="{alt}">'
            parts.append(f'<span data-at="{place}"{hidden}>{inner}</span>')
        return "".join(parts)


def boxed(
    picture: torch.Tensor,
    boxes: Sequence[Sequence[float]],
    radii: Sequence[float] | None,
    names: Sequence[object],
) -> str:
    """A picture with boxes that know up to which ε they hold: a drawing (SVG) for `slider`.

    A box is blue and solid while ε is below its radius, thin and dashed from there on. One with a radius of 0 or less,
    of an object that is not found at all, never holds. Without radii boxes stay as they are.

    Args:
        picture: (3, height, width), values in [0, 1].
        boxes: (objects, 4), left, top, right and bottom in parts of the picture.
        radii: up to which ε each box is certified, or None where nothing is.
        names: what stands at each box, such as its label.

    >>> drawing = boxed(torch.zeros(3, 8, 8), torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.tensor([0.257]), ["7"])
    >>> drawing[-25:]
    '>7: 0.25</text></g></svg>'
    """
    count = len(boxes)
    if len(names) != count or (radii is not None and len(radii) != count):
        given = f"{count} boxes, {'no' if radii is None else len(radii)} radii and {len(names)} names"
        raise ValueError(f"{given}: there should be one of each")
    tall = WIDE * picture.shape[1] / picture.shape[2]
    told = [str(name) if radii is None else f"{name}: {_below(radii[k])}" for k, name in enumerate(names)]
    parts = [f'<image href="{_embedded(picture)}" width="{WIDE}" height="{tall:g}" preserveAspectRatio="none"/>']
    for k, box in enumerate(boxes):
        state = "" if radii is None else f' class="lost" data-until="{float(radii[k])!r}"'
        parts.append(f"<g{state}>{_box(box, tall, told[k])}</g>")
    until = "" if radii is None else " and the ε up to which it is certified"
    alt = html.escape(f"A picture with boxes, each with its label{until}: {', '.join(told) or 'none'}")
    opening = f'<svg class="boxed" viewBox="0 0 {WIDE} {tall:g}" role="img" aria-label="{alt}">'
    return f"{opening}{LOOK}{''.join(parts)}</svg>"


def _box(box: Sequence[float], tall: float, words: str) -> str:
    """A box with a light rim, which parts it from any ground, and what it says."""
    left, top, right, bottom = (float(part) for part in box)
    x, y = WIDE * left, tall * top
    at = f'x="{x:.1f}" y="{y:.1f}" width="{WIDE * (right - left):.1f}" height="{tall * (bottom - top):.1f}"'
    label = f'<text x="{x + 4:.1f}" y="{y + 16:.1f}">{html.escape(words)}</text>'
    return f'<rect class="halo" {at}/><rect {at}/>{label}'


def held(drawing: str, eps: float) -> tuple[int, int]:
    """How many boxes of a drawing hold at ε, and how many it has.

    Args:
        drawing: by `boxed`.
        eps: the length of the attack.

    >>> held(boxed(torch.zeros(3, 8, 8), [[0, 0, 1, 1]] * 2, [0.25, 0.5], ["7", "4"]), 0.25)
    (1, 2)
    """
    radii = [float(until) for until in BOX.findall(drawing)]
    return sum(radius > eps for radius in radii), len(radii)


def _at(drawing: str, eps: float) -> str:
    """A drawing as it looks at one ε."""

    def marked(found: re.Match) -> str:
        state = "kept" if float(found[1]) > eps else "lost"
        return f'<g class="{state}" data-until="{found[1]}"'

    return BOX.sub(marked, drawing)


def _sentence(start: str, parts: Sequence[str]) -> str:
    joint = ", " if ": " in start else ": "
    return joint.join([start, ", ".join(parts)]) if parts else start


def _below(radius: float) -> str:
    """A radius in two decimals, rounded down, for more is not certified."""
    return written(math.floor(100 * max(float(radius), 0.0)) / 100, 2)


def _list(values: Sequence[object]) -> str:
    """Values for the script, inside an attribute."""
    return html.escape(json.dumps(values, ensure_ascii=False))


def _embedded(picture: torch.Tensor) -> str:
    """A picture as an address that holds it; the browser enlarges small ones square by square."""
    pixels = (picture.detach().cpu().double().clamp(0, 1) * 255).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

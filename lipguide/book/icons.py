"""The few icons that the pages use, as one small style sheet instead of the theme's 1.9 MB of scripts and fonts.

The theme draws icons by class, as `<i class="fa-solid fa-list">`. The letters behind those classes are cut out of its
fonts and embedded, so that they appear on a page opened from the disk too, where a browser loads no font files.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

__all__ = ["icon_sheet"]

# The classes that ask for a font, its file, its name and its weight.
FONTS = {
    ".fa-solid,.fas": ("fa-solid-900.ttf", "Font Awesome 6 Free", 900),
    ".fa-regular,.far": ("fa-regular-400.ttf", "Font Awesome 6 Free", 400),
    ".fa-brands,.fab": ("fa-brands-400.ttf", "Font Awesome 6 Brands", 400),
}
# The theme's own sheets draw by this variable; their letters stand in them as "\\f0eb".
SOLID = ':root{--fa-font-solid:normal 900 1em/1 "Font Awesome 6 Free"}'


def icon_sheet(pages: list[str], sheets: list[str], fontawesome: Path) -> str:
    """The style sheet for the icons of some pages.

    Args:
        pages: their HTML, which names icons by class.
        sheets: the style sheets of the theme, which name them by letter.
        fontawesome: the theme's folder of that name, with css/all.min.css and webfonts.
    """
    used = set(re.findall(r"\bfa-[a-z0-9-]+", " ".join(pages)))
    letters = _letters((fontawesome / "css" / "all.min.css").read_text(encoding="utf-8"), used)
    drawn_by_theme = " ".join(sheets)
    needed = set(letters.values()) | {int(letter, 16) for letter in re.findall(r"\\(f[0-9a-f]{3})\b", drawn_by_theme)}
    needed |= {ord(letter) for letter in re.findall("[\uf000-\uf8ff]", drawn_by_theme)}
    faces = [_face(fontawesome / "webfonts" / file, name, weight, needed) for file, name, weight in FONTS.values()]
    looks = [f'{classes}{{font-family:"{name}";font-weight:{weight}}}' for classes, (_, name, weight) in FONTS.items()]
    common = "-webkit-font-smoothing:antialiased;display:inline-block;font-style:normal;line-height:1"
    shared = f"{','.join(FONTS)}{{{common}}}"
    drawn = [f'.{name}::before{{content:"\\{letter:x}"}}' for name, letter in sorted(letters.items())]
    return "\n".join([SOLID, *faces, *looks, shared, ".fa-fw{width:1.25em;text-align:center}", *drawn, ""])


def _letters(sheet: str, used: set[str]) -> dict[str, int]:
    """The code point of each icon that is used, from the theme's own style sheet."""
    found = {}
    for selectors, letter in re.findall(r'([^{}]+):before\{content:"\\([0-9a-f]+)"\}', sheet):
        for name in re.findall(r"\.(fa-[a-z0-9-]+)", selectors):
            if name in used:
                found[name] = int(letter, 16)
    return found


def _face(path: Path, name: str, weight: int, needed: set[int]) -> str:
    """A font with no more letters than are needed, as part of the sheet."""
    font = TTFont(path)
    there = set(font.getBestCmap()) & needed
    if not there:
        return ""
    cut = subset.Subsetter()
    cut.populate(unicodes=sorted(there))
    cut.subset(font)
    font.flavor = "woff"
    file = io.BytesIO()
    font.save(file)
    data = base64.b64encode(file.getvalue()).decode()
    source = f'url(data:font/woff;base64,{data}) format("woff")'
    return f'@font-face{{font-family:"{name}";font-weight:{weight};src:{source}}}'

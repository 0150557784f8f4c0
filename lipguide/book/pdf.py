"""The whole book as one PDF: all pages in one document, printed by headless Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lipguide.book.contents import pages_of

__all__ = ["main", "one_document"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(root: Path) -> int:
    """Print `_build/html` to `_build/lipguide.pdf`; return the exit status."""
    html = root / "_build" / "html"
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.stderr.write(f"no browser that prints: install one of {', '.join(BROWSERS)}\n")
        return 1
    if not html.exists():
        sys.stderr.write(f"{html} is not there: run `make book` first\n")
        return 1
    whole = html / "book" / "lipguide-whole.html"  # beside the pages, so that their pictures are found
    whole.write_text(one_document(html, [Path(page).name for page in pages_of(root)]), encoding="utf-8")
    target = root / "_build" / "lipguide.pdf"
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            subprocess.run(_command(browser, profile, target, whole), check=True, capture_output=True)
    finally:
        whole.unlink()
    sys.stdout.write(f"{target}\n")
    return 0


def _command(browser: str, profile: str, target: Path, page: Path) -> list[str]:
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    quiet = "--no-pdf-header-footer --virtual-time-budget=120000 --run-all-compositor-stages-before-draw"
    return [
        browser,
        *options.split(),
        *quiet.split(),
        f"--user-data-dir={profile}",
        f"--print-to-pdf={target}",
        page.as_uri(),
    ]


def one_document(html: Path, names: list[str]) -> str:
    """All pages in one: the head of the first, the articles of all, and links that stay inside.

    Args:
        html: the built book.
        names: its pages in order.
    """
    texts = {name: (html / "book" / f"{name}.html").read_text(encoding="utf-8") for name in names}
    head = re.search(r"<head>.*?</head>", texts[names[0]], re.S)[0]
    articles = [_inside(name, _article(text), names) for name, text in texts.items()]
    style = "<style>article { break-before: page; } .headerlink { display: none; } body { display: block; }</style>"
    body = "\n".join(articles)
    opening = '<!DOCTYPE html>\n<html lang="en" data-theme="light" data-content_root="../">'
    return f"{opening}{head}{style}<body>{body}</body></html>\n"


def _article(page: str) -> str:
    return re.search(r'<article class="bd-article">.*?</article>', page, re.S)[0]


def _inside(name: str, article: str, names: list[str]) -> str:
    """An article whose anchors carry its name, for two pages may use the same ones."""
    article = re.sub(r'\bid="([^"]+)"', rf'id="{name}--\1"', article)
    article = re.sub(r'href="#([^"]*)"', rf'href="#{name}--\1"', article)
    for other in names:
        article = article.replace(f'href="{other}.html#', f'href="#{other}--')
        article = article.replace(f'href="{other}.html"', f'href="#{other}"')
    return article.replace("<article", f'<article id="{name}"', 1)


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))

"""Every page of the built book in headless Chromium; no driver is needed, for the pages report to a server of ours."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent
WATCH = b"""<head><script>
window.complaintsOfThisPage = [];
window.addEventListener("error", (event) => complaintsOfThisPage.push(event.message || "failed: " + (event.target.src
  || event.target.href)), true);
const spoken = console.error;
console.error = (...words) => { complaintsOfThisPage.push(words.join(" ")); spoken(...words); };
</script>"""


def chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Handler(SimpleHTTPRequestHandler):
    """The book, the inspector, and the place where its reports go."""

    def __init__(self, *args, pages: queue.SimpleQueue, axe: Path | None, reports: queue.Queue, **keywords) -> None:
        self.pages, self.axe, self.reports = pages, axe, reports
        super().__init__(*args, **keywords)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/inspector.html":
            self._send(b"<!doctype html><title>-</title><body><script src='inspect.js'></script>", "text/html")
        elif path == "/inspect.js":
            self._send((HERE / "inspect_pages.js").read_bytes(), "text/javascript")
        elif path == "/axe.min.js" and self.axe:
            self._send(self.axe.read_bytes(), "text/javascript")
        elif path == "/next.json":
            self._send(json.dumps(self._next()).encode(), "application/json")
        elif path.endswith(".html"):
            page = Path(self.translate_path(path)).read_bytes()
            self._send(page.replace(b"<head>", WATCH, 1), "text/html")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.reports.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._send(b"", "text/plain")

    def _next(self) -> str | None:
        """The next page to be looked at, by whichever browser asks first."""
        try:
            return self.pages.get_nowait()
        except queue.Empty:
            return None

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def inspect(html: Path, axe: Path | None, browsers: int = 2, patience: float = 300.0) -> list[dict]:
    """One report a page.

    Args:
        html: the built book.
        axe: axe.min.js, or None to look without it.
        browsers: that share the pages out among them.
        patience: seconds that one page may take.
    """
    reports: queue.Queue = queue.Queue()
    pages: queue.SimpleQueue = queue.SimpleQueue()
    for path in sorted(html.rglob("*.html"), key=lambda path: -path.stat().st_size):  # long ones first
        if path.parent.name == "book":
            pages.put(f"/{path.relative_to(html)}")
    handler = partial(Handler, directory=str(html), pages=pages, axe=axe, reports=reports)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/inspector.html{'?axe' if axe else ''}"
    try:
        with ExitStack() as running:
            for _ in range(browsers):
                running.enter_context(_browser(address))
            found, done = [], 0
            while done < browsers:
                report = reports.get(timeout=patience)
                if report == "done":
                    done += 1
                    continue
                found.append(json.loads(report))
                if "error" in found[-1]:
                    raise RuntimeError(f"the inspector stopped: {found[-1]['error']}")
            return found
    finally:
        server.shutdown()


@contextmanager
def _browser(address: str) -> Iterator[None]:
    """A browser without a window that has opened a page, with a profile of its own."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium(), *options.split(), "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={profile}", "--window-size=1300,1000", "--remote-debugging-port=0", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            browser.terminate()
            browser.wait(20)

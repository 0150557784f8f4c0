"""The build: what runs again and what does not, failures that are named, and HTML replaced whole or not at all."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest

from lipguide import deadline
from lipguide.__main__ import main
from lipguide.book import build as build_module
from lipguide.book import execution
from lipguide.book.build import Book, BuildError, build
from lipguide.book.ledger import Ledger, read
from lipguide.files import write_json
from tests.forked import Forked

CHAPTER = """---
jupytext: {{text_representation: {{extension: .md, format_name: myst}}}}
kernelspec: {{display_name: Python 3, language: python, name: python3}}
---

# {title}

```{{run-box}}
```

```{{code-cell}} ipython3
:tags: [parameters]
profile = "quick"
device = "cpu"
seed = 0
```

```{{code-cell}} ipython3
{opening}
{code}
ledger["answer"] = 42
ledger.save()
```

The answer is {{ledger}}`answer:d`.
"""
OPENED = """from lipguide.book.ledger import Ledger

ledger = Ledger("{name}", profile, device, seed)
"""
# A ledger for chapters that need no torch: a kernel is up in a third of the time. (The text "results" would name all
# records, so it is a keyword here.)
LIGHT = """from lipguide.files import write_json

class Light(dict):
    def save(self):
        write_json("results/{name}.quick.json", dict(provenance={provenance}, results=self))

ledger = Light()
"""
PROVENANCE = {
    "profile": "quick", "commit": "unknown", "lock": "none", "device": "toy", "threads": 1, "torch": "2", "python": "3",
    "seed": 0, "start": "2026-01-01T00:00:00+00:00", "data": None, "seconds": 0.1, "peak_memory_mib": 1,
}  # fmt: skip
CONFIG = """title: test
only_build_toc_files: true
execute: {execute_notebooks: cache}
sphinx: {extra_extensions: [lipguide.book.roles], config: {numfig: true}}
"""


@pytest.fixture
def root(tmp_path):
    return made(tmp_path)


def made(folder: Path) -> Path:
    """A book of two chapters."""
    (folder / "_config.yml").write_text(CONFIG)
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters: [{file: book/one}, {file: book/two}]\n"
    )
    (folder / "book").mkdir()
    (folder / "book" / "index.md").write_text("# Test\n")
    write(folder, "one")
    write(folder, "two")
    return folder


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    root = made(tmp_path_factory.mktemp("built"))
    assert build(Book(root), "quick", "cpu") == 0
    return root


@pytest.fixture
def built(built_once, tmp_path):
    """The same book in another place, where its chapters need not run again."""
    root = shutil.copytree(built_once, tmp_path / "built")
    shutil.rmtree(root / "_build" / "html")
    return root


def write(root: Path, name: str, code: str = "", title: str = "Title", opening: str = LIGHT) -> None:
    opening = opening.format(name=name, provenance=PROVENANCE)
    (root / "book" / f"{name}.md").write_text(CHAPTER.format(name=name, opening=opening, code=code, title=title))


@pytest.fixture(scope="module")
def loaded():
    """A process that has imported what renders, which is more than half of the time that it takes."""
    forked = Forked("jupyter_book.cli.main", "myst_nb.sphinx_ext", "sphinx_book_theme", on_warning="ignore")
    yield forked
    forked.close()


@pytest.fixture
def by_a_child(loaded, monkeypatch):
    """For stories that render often: Jupyter Book runs in a child of that process."""

    def rendering(arguments, folder, log, profile):
        with monkeypatch.context() as now:
            now.setenv("LIPGUIDE_PROFILE", profile)
            done = loaded.run(build_module.JUPYTER_BOOK, folder, *arguments)
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(build_module, "_jupyter_book", rendering)


@pytest.fixture
def rendered(monkeypatch):
    """For tests of what is executed: how often the book would have been rendered, which takes seconds."""
    calls = []
    monkeypatch.setattr(build_module, "_render", lambda *arguments: calls.append(arguments) or 0)
    return calls


@pytest.fixture
def without_kernels(monkeypatch):
    """For tests of what is rendered: chapters are executed in no time."""
    monkeypatch.setattr(build_module, "run", fake_run)


def states(capsys) -> dict[str, str]:
    """What the build has said since it was last asked: how each chapter ended, and the rendering."""
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words[1] for words in said if words[0] in ("one", "two", "html")}


def test_build_rebuild_change_fail_and_recover(root, capsys, by_a_child):
    """One story in order, since each build takes seconds."""
    write(root, "one", opening=OPENED)
    assert build(Book(root), "quick", "cpu") == 0
    first = (root / "_build/html/book/one.html").read_text()
    assert "The answer is" in first and ">42<" in first and "last verified on" in first
    assert "<strong>full</strong>\u2002not run on record." in first
    assert not list((root / "_build").rglob(".one*")), "temporary files are left"
    capsys.readouterr()

    assert build(Book(root), "quick", "cpu") == 0
    assert capsys.readouterr().out.count("unchanged") == 3

    write(root, "one", title="Reworded", opening=OPENED)
    assert build(Book(root), "quick", "cpu") == 0
    assert states(capsys) == {"one": "unchanged", "two": "unchanged", "html": "rendered"}
    good = (root / "_build/html/book/one.html").read_text()
    assert "Reworded" in good and "seven and thirty" not in good and ">42<" in good

    write(root, "one", code="print('seven and thirty')", title="Changed")
    assert build(Book(root), "quick", "cpu") == 0
    assert states(capsys) == {"one": "executed", "two": "unchanged", "html": "rendered"}
    good = (root / "_build/html/book/one.html").read_text()
    assert "Changed" in good and "seven and thirty" in good

    write(root, "one", code="raise ArithmeticError('seven')")
    write(root, "two", code="print('another')")
    assert build(Book(root), "quick", "cpu") == 1
    out = capsys.readouterr().out
    assert (
        "ArithmeticError" in out and "seven" in out and "code cell 2" in out and "_build/failed/one.quick.ipynb" in out
    )
    assert (root / "_build/failed/one.quick.ipynb").exists()
    assert "two              executed" in out, "the other chapters still run"
    assert (root / "_build/html/book/one.html").read_text() == good, "the last good HTML stays"

    write(root, "one", title="Mended")
    write(root, "two", title="So is this", code="print('another')")
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert "Mended" in (root / "_build/html/book/one.html").read_text()
    two = (root / "_build/html/book/two.html").read_text()
    assert "So is this" in two and "another" in two, "a chapter that was not asked for shows its text of today, too"


def test_a_warning_is_in_the_log_and_not_on_the_page_and_our_own_fail_under_ci(root, capsys, monkeypatch):
    """The first chapter imports a library that warns, the second warns itself."""
    (root / "book" / "library.py").write_text("import warnings\nwarnings.warn('IProgress not found')\n")
    write(root, "one", code="import library, sys; print('careful', file=sys.stderr)")
    write(root, "two", code="import warnings; warnings.warn('we are not sure')")
    monkeypatch.setenv("CI", "true")
    assert build(Book(root), "quick", "cpu") == 1
    out = capsys.readouterr().out
    one, two = sorted(out.splitlines()[:2])
    assert "executed" in one and "stderr: _build/logs/one.quick.log" in one and "FAILED" in two
    assert "two: a warning of our own: " in out and "UserWarning: we are not sure" in out

    monkeypatch.delenv("CI")
    assert build(Book(root), "quick", "cpu") == 0
    log, page = (root / "_build/logs/one.quick.log").read_text(), (root / "_build/html/book/one.html").read_text()
    assert "library.py:2: UserWarning: IProgress not found" in log and "careful" in log and "code cell 2" in log
    assert ">42<" in page and "IProgress not found" not in page and ">careful" not in page
    assert "we are not sure" in (root / "_build/logs/two.quick.log").read_text()

    write(root, "one")
    monkeypatch.setattr(build_module, "_render", lambda *arguments: 0)
    capsys.readouterr()
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert "stderr" not in capsys.readouterr().out
    assert "IProgress" not in (root / "_build/logs/one.quick.log").read_text()


def test_a_warning_that_is_laid_to_the_package_is_our_own_and_one_to_its_environment_is_not():
    package = Path(execution.__file__).parents[1]
    ours = [
        f"{package}/robustness/metrics.py:78: UserWarning: no estimate",
        "/tmp/ipykernel_7/12.py:3: FutureWarning: x",
    ]
    others = [f"{package.parent}/.venv/lib/tqdm/auto.py:21: TqdmWarning: x", f"{package}/losses/base.py:3: in forward"]
    assert all(execution.OURS.search(f"before\n{line}\nafter") for line in ours)
    assert not any(execution.OURS.search(line) for line in others)


# --- a time limit


def test_a_chapter_that_outlives_its_time_is_ended_and_named(root, capsys, monkeypatch, rendered):
    write(root, "one", code="import time; time.sleep(600)")
    monkeypatch.setattr(build_module, "_waits", lambda *arguments: "")  # also where this machine is slow
    monkeypatch.chdir(root)
    began = time.monotonic()
    assert status("build", "--device", "cpu", "--only", "one", "--minutes", "0.05") == 75
    assert time.monotonic() - began < 300
    err = capsys.readouterr().err
    assert "1 of 1 chapters left: one (it ran when the time was up, and starts over)" in err and err.count("\n") == 1
    assert not (root / "book/results/one.quick.json").exists()
    write(root, "one")
    assert status("build", "--device", "cpu", "--only", "one", "--minutes", "60") == 0
    assert read(root / "book/results/one.quick.json")["results"]["answer"] == 42


def test_a_training_inside_a_chapter_hears_of_the_limit(root, monkeypatch, capsys, rendered):
    """The chapter asks for the time as if it were up; that there is a limit, it knows from the build."""
    code = "from lipguide import deadline; deadline.left = lambda: -1\ndeadline.check('stopped before step 3 of 9')"
    write(root, "one", code)
    monkeypatch.chdir(root)
    assert status("build", "--device", "cpu", "--only", "one", "--minutes", "60") == 75
    assert not rendered
    assert "one (stopped before step 3 of 9); the same command goes on from there" in capsys.readouterr().err
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0, "without a limit the time is never up"


def fake_run(source: Path, path: Path, parameters: dict, log: Path, threads: int | None = None) -> execution.Ended:
    """A chapter that needs no kernel."""
    chapter = source.stem
    execution.write_notebook(jupytext.read(source), path)
    notebook = nbformat.read(path, as_version=4)
    injected = nbformat.v4.new_code_cell("profile = 'quick'", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(1, injected)
    execution.write_notebook(notebook, path)
    ledger = Ledger(chapter, "quick", "cpu", 0, folder=source.parent / "results")
    ledger["answer"] = 42
    ledger.save(10_000)
    return execution.Ended()


def test_chapters_that_take_longer_than_what_is_left_wait_for_the_next_slice(
    root, monkeypatch, capsys, rendered, without_kernels
):
    assert build(Book(root), "quick", "cpu") == 0
    for chapter in ("one", "two"):
        write(root, chapter, code="changed = True")
    with (
        deadline.limit(5),
        pytest.raises(deadline.OutOfTime, match=r"1 of 2 .*two \(takes 10000 s, and 2\d\d s are left"),
    ):
        build(Book(root), "quick", "cpu")
    assert states(capsys) == {"one": "executed", "two": "left"}
    with deadline.limit(5):  # now it is the first, and has all the time that there is
        assert build(Book(root), "quick", "cpu") == 0
    write(root, "one", code="changed = 'again'")
    monkeypatch.setenv(deadline.VARIABLE, f"{time.time() - 1} 3")
    with pytest.raises(deadline.OutOfTime, match=r"one \(not begun\)"):
        build(Book(root), "quick", "cpu")


def test_seconds_on_another_device_say_nothing(root, rendered, without_kernels):
    assert build(Book(root), "quick", "cpu") == 0
    for chapter in ("one", "two"):
        write(root, chapter, code="changed = True")
    ledger = root / "book/results/two.quick.json"
    content = read(ledger)
    content["provenance"]["device"] = "NVIDIA H100"
    write_json(ledger, content)
    with deadline.limit(5):
        assert build(Book(root), "quick", "cpu") == 0


def test_a_chapter_runs_again_when_a_record_that_it_reads_changes(built, capsys, rendered):
    root = built
    code = "from lipguide.book.ledger import read\nledger['was'] = read('results/run.cpu.json')['results']['was']"
    write(root, "one", code=code)
    record = root / "book" / "results" / "run.cpu.json"
    record.write_text('{"provenance": {}, "results": {"was": 1}}')
    assert build(Book(root), "quick", "cpu") == 0
    capsys.readouterr()
    record.write_text('{"provenance": {}, "results": {"was": 2}}')
    assert build(Book(root), "quick", "cpu") == 0
    assert states(capsys) == {"one": "executed", "two": "unchanged"}
    assert read(root / "book" / "results" / "one.quick.json")["results"]["was"] == 2
    assert len(rendered) == 2


def saves(root: Path, answer: int, then: str = "") -> None:
    """Chapter `one` with another answer, and what it does when that is saved."""
    write(root, "one", then)
    page = root / "book" / "one.md"
    cells = page.read_text().replace('ledger["answer"] = 42', f'ledger["answer"] = {answer}')
    if then:
        cells = cells.replace(f"{then}\n", "").replace("ledger.save()", f"ledger.save()\n{then}")
    page.write_text(cells)


def test_the_ledger_on_a_page_is_the_one_that_its_notebook_saved(built, capsys, by_a_child):
    """One story in order, since each build takes seconds."""
    root, ledger, page = built, built / "book/results/one.quick.json", built / "_build/html/book/one.html"
    assert build(Book(root), "quick", "cpu") == 0
    assert states(capsys) == {"one": "unchanged", "two": "unchanged", "html": "rendered"}

    # A run that saves and then fails leaves nothing behind.
    first = ledger.read_bytes()
    saves(root, 43, then="raise ArithmeticError('late')")
    assert build(Book(root), "quick", "cpu", only=["one"]) == 1
    assert ledger.read_bytes() == first
    write(root, "one")
    capsys.readouterr()
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert "unchanged" in capsys.readouterr().out and ">42<" in page.read_text()

    # Edited by hand, or from another run: another page cannot print it, and the chapter runs again.
    ledger.write_text(ledger.read_text().replace("42", "99"))
    assert build(Book(root), "quick", "cpu", only=["two"]) == 0
    assert "rendered without outputs" in capsys.readouterr().out
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert "executed" in capsys.readouterr().out
    assert read(ledger)["results"]["answer"] == 42 and ">42<" in page.read_text() and ">99<" not in page.read_text()

    # Missing: the same.
    ledger.unlink()
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert read(ledger)["results"]["answer"] == 42

    # A chapter that saves none any more does not get by with an old one.
    source = root / "book" / "one.md"
    source.write_text(source.read_text().replace("ledger.save()", ""))
    assert build(Book(root), "quick", "cpu", only=["one"]) == 1
    assert "saved no one.quick.json" in capsys.readouterr().out and ledger.exists()


def test_a_first_run_that_fails_leaves_no_ledger(root):
    saves(root, 43, then="raise ArithmeticError('late')")
    assert build(Book(root), "quick", "cpu", only=["one"]) == 1
    assert not (root / "book/results/one.quick.json").exists()


def test_chapters_that_are_not_asked_for_are_shown_as_they_are(root, capsys, without_kernels, by_a_child):
    """A fresh clone holds ledgers and no notebooks; a page whose code has changed since its run says so."""
    assert build(Book(root), "quick", "cpu") == 0
    write(root, "two", code="changed = True")
    capsys.readouterr()
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert "before something that they depend on changed: two" in capsys.readouterr().out
    (root / "_build/notebooks/two.quick.ipynb").unlink()
    speaks_of_its_figure(root / "book" / "two.md")
    assert build(Book(root), "quick", "cpu", only=["one"]) == 0
    assert "rendered without outputs, for they have not run with profile quick: two" in capsys.readouterr().out
    two = (root / "_build/html/book/two.html").read_text()
    assert ">42<" in two and "A finding." in two
    assert any("has not run yet" in path.read_text() for path in (root / "_build/html/_images").glob("*.svg"))
    assert re.search(r'href="#fig-two"><span class="std std-numref">Fig. \d</span>', two)


def speaks_of_its_figure(path: Path) -> None:
    figure = "mystnb: {image: {alt: a}, figure: {name: fig-two, caption: A finding.}}"
    cell = f"```{{code-cell}}\n---\n{figure}\n---\nplot()\n```"
    path.write_text(f"{path.read_text()}\n{cell}\n\nSee {{numref}}`fig-two`.\n")


def test_a_wrong_ledger_key_fails_the_rendering(root, capsys, without_kernels):
    write(root, "one")
    page = root / "book" / "one.md"
    page.write_text(page.read_text().replace("`answer:d`", "`question:d`"))
    assert build(Book(root), "quick", "cpu") == 1
    assert "question" in capsys.readouterr().out
    assert not (root / "_build/html").exists()


def test_interrupted_then_resumed(root, rendered):
    """Killed while a chapter runs: the one that is done is kept, the state is sound, and the next call finishes."""
    write(root, "two", code="import time; time.sleep(600)")
    command = [sys.executable, "-m", "lipguide", "build", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.time() + 120
    ready = [root / "_build/failed/two.quick.ipynb", root / "_build/notebooks/one.quick.ipynb"]
    while not all(path.exists() for path in ready) and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    with pytest.raises(BuildError, match="another build is at work"):
        build(Book(root), "quick", "cpu")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in err
    assert (root / "_build/notebooks/one.quick.ipynb").exists()
    write(root, "two")
    assert build(Book(root), "quick", "cpu") == 0
    assert (root / "_build/notebooks/two.quick.ipynb").exists() and len(rendered) == 1


MEETS = """import pathlib, time
pathlib.Path("{own}.here").touch()
began = time.monotonic()
while not pathlib.Path("{other}.here").exists():
    assert time.monotonic() - began < 60, "it waits alone"
    time.sleep(0.05)
"""
COUNTS = """
named = "gc" in globals()
import gc, os

ledger |= {"threads": os.environ.get("OMP_NUM_THREADS"), "gc": [named, gc.get_threshold()[0]]}
"""


def test_two_chapters_run_side_by_side_and_share_the_cores(root, monkeypatch, rendered):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(build_module, "cores", lambda: 6)
    write(root, "one", MEETS.format(own="one", other="two") + COUNTS)
    write(root, "two", MEETS.format(own="two", other="one") + COUNTS)
    assert build(Book(root), "quick", "cpu") == 0
    for chapter in ("one", "two"):
        its = read(root / f"book/results/{chapter}.quick.json")["results"]
        assert its["threads"] == "3"
        assert its["gc"] == [False, 50_000], "a kernel looks for garbage less often, and no name tells of it"


def test_whoever_says_how_many_threads_is_heard_and_a_gpu_runs_one_chapter_at_a_time(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert build_module._threads("cpu") is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert build_module._threads("cuda") is None and build_module.AT_ONCE["cuda"] == 1
    monkeypatch.setattr(build_module, "cores", lambda: 1)
    assert build_module._threads("cpu") == 1


def test_the_longest_chapters_begin_first(root, rendered, monkeypatch):
    monkeypatch.setattr(build_module, "run", fake_run)
    assert build(Book(root), "quick", "cpu") == 0
    ledger = root / "book/results/two.quick.json"
    content = read(ledger)
    content["provenance"]["seconds"] = 20_000
    write_json(ledger, content)
    assert build_module._longest_first(Book(root), "quick", ["one", "two"]) == ["two", "one"]
    ledger.unlink()
    assert build_module._longest_first(Book(root), "quick", ["one", "two"]) == ["one", "two"]


def test_both_chapters_end_when_the_build_is_interrupted_and_what_they_saved_is_put_back(built, rendered, monkeypatch):
    root = built
    assert build(Book(root), "quick", "cpu") == 0
    ledgers = [root / f"book/results/{name}.quick.json" for name in ("one", "two")]
    before = [ledger.read_bytes() for ledger in ledgers]
    for name in ("one", "two"):
        write(root, name, "open('saved', 'a').write('.'); ledger.save(); import time; time.sleep(600)")
    saved = root / "book" / "saved"

    def interrupted(futures):
        while not saved.exists() or len(saved.read_text()) < 2 or [x.read_bytes() for x in ledgers] == before:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "as_completed", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build(Book(root), "quick", "cpu")
    assert time.monotonic() - began < 120
    assert [ledger.read_bytes() for ledger in ledgers] == before and not execution._AT_WORK


def test_a_page_that_asks_another_host_is_refused(root, capsys, without_kernels, by_a_child):
    page = root / "book" / "index.md"
    page.write_text('# Test\n\n<img src="https://example.org/x.png" alt="x">\n')
    assert build(Book(root), "quick", "cpu") == 1
    assert "https://example.org/x.png" in capsys.readouterr().out and not (root / "_build/html").exists()


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--profile", "huge"], ["huge", "quick, full"]),
        (["--device", "tpu"], ["tpu", "auto", "cpu", "cuda"]),
        (["--only", "three"], ["three", "one, two"]),
    ],
)
def test_unknown_names_are_one_line_and_exit_2(root, monkeypatch, capsys, arguments, names):
    monkeypatch.chdir(root)
    assert status("build", *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(name in err for name in names)
    assert not (root / "_build").exists(), "nothing runs before the arguments are known to be good"


def status(*arguments: str) -> int:
    """What the shell sees: `main` returns it, and argparse exits with it."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("device, named", [("cuda", "no CUDA device"), ("tpu", "valid: auto, cpu, cuda")])
def test_a_device_that_is_not_there_is_named(root, monkeypatch, device, named):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BuildError, match=named):
        build(Book(root), "quick", device)
    assert not (root / "_build").exists()


def test_a_folder_without_a_book_is_named(tmp_path):
    with pytest.raises(BuildError, match="_config.yml"):
        Book(tmp_path)


def test_a_page_that_is_missing_is_named(root):
    (root / "book" / "two.md").unlink()
    with pytest.raises(BuildError, match="book/two"):
        Book(root)

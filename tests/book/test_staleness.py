"""A chapter runs again when something that it depends on changes, and not otherwise."""

import os
import shutil

import pytest

from lipguide.book import staleness
from lipguide.book.staleness import PACKAGE, chapter_key, modules_behind, records_read

EVERYTHING = set(PACKAGE.rglob("*.py"))


def names(code):
    return {p.relative_to(PACKAGE).as_posix() for p in modules_behind(code)}


@pytest.mark.parametrize(
    "code, inside, outside",
    [
        ("import lipguide as lip\nlip.GroupSort2()", "layers/activations.py", "layers/affine.py"),
        ("import lipguide as lip\nlip.spectral", "layers/norms.py", "layers/activations.py"),
        ("import lipguide\nlipguide.spectral", "layers/norms.py", "layers/activations.py"),
        ("from lipguide.layers.norms import conv_norm", "layers/norms.py", "layers/affine.py"),
        ("from lipguide.layers.norms import *", "layers/norms.py", "layers/affine.py"),
        ("from lipguide.layers import norms", "layers/norms.py", "layers/affine.py"),
        ("from lipguide import spectral", "layers/affine.py", "layers/activations.py"),
        ("import lipguide.layers.norms", "layers/norms.py", "layers/affine.py"),
        ("import lipguide.layers.norms as n\nf(n)", "layers/norms.py", "layers/affine.py"),
        ("import lipguide as lip\nlip.losses.HKR", "losses/base.py", "layers/affine.py"),
        ("import lipguide as lip\nvars(lip.losses)", "losses/base.py", "layers/affine.py"),
        ("from lipguide.bounds import lipschitz_bound", "bounds/network.py", "training.py"),
        ("import lipguide as lip\nlip.data.Difficulty", "data/shn/difficulty.py", "data/svhn/download.py"),
        ("from importlib import import_module\nimport_module('lipguide.files')", "files.py", "training.py"),
        ("text = 'import sys\\nfrom lipguide.files import replacing'", "files.py", "training.py"),
        ("from lipguide.book.ledger import Ledger", "book/ledger.py", "layers/norms.py"),
        ("model.eval()", None, "layers/affine.py"),
        ("import torch", None, "layers/affine.py"),
        ("import lipguide as lip", None, "layers/affine.py"),
    ],
)
def test_only_the_modules_behind_the_code_count(code, inside, outside):
    found = names(code)
    assert inside in found if inside else not found
    assert outside not in found


@pytest.mark.parametrize(
    "code",
    [
        "lip.surprise",
        "l = lip\nl.spectral",
        "getattr(lip, name)",
        "vars(lip)[name]",
        "for room in [lip]: room.spectral",
        "from lipguide import *",
        "import lipguide.layers\nf(lipguide)",
        "import importlib\nimportlib.import_module(f'lipguide.{name}')",
        "import importlib\nimportlib.import_module(name)  # loads what its caller has named",
        "from importlib import import_module\nimport_module(name)",
        "__import__('lipguide').spectral",
        "exec(program)",
        "import runpy\nrunpy.run_module('lipguide')",
        "subprocess.run([sys.executable, '-m', 'lipguide', 'study'])",
        "program = '''import lipguide as lip\nlip.spectral'''",
        "from lipguide.nowhere import x",
    ],
)
def test_what_cannot_be_traced_counts_for_everything(code):
    assert modules_behind(f"import lipguide as lip\n{code}") == EVERYTHING


def test_every_name_of_the_root_counts_for_the_module_that_holds_it():
    import lipguide as lip

    for name, home in (lip._HOMES | lip._ROOMS).items():
        origin = getattr(getattr(lip, name), "__module__", home)
        file = PACKAGE.joinpath(*origin.split(".")[1:])
        found = modules_behind(f"import lipguide as lip\nlip.{name}")
        assert {file.with_suffix(".py"), file / "__init__.py"} & found, name
        assert found < EVERYTHING, name


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `lipguide` in a folder of the test."""
    root = tmp_path / "lipguide"
    monkeypatch.setattr(staleness, "PACKAGE", root)
    files = {
        "__init__.py": "def __getattr__(name): ...",
        "a.py": "VALUE = 1",
        "b.py": "from lipguide.hands_on import VALUE",
        "c.py": "from .hands_on import b",
        "table.py": "from importlib import import_module\nT = {'x': 'lipguide.a'}\ndef f(x):\n"
        "    return import_module(T[x])",
        "promise.py": "from importlib import import_module\nimport_module(x)  # loads what its caller has named",
        "loader.py": "from importlib import import_module\ndef f(x): return import_module(x)",
        "hands_on/__init__.py": "'''Words.'''\nfrom lipguide import b\nfrom lipguide.a import VALUE\n"
        "__all__ = ['VALUE']",
        "hands_on/own.py": "",
        "works/__init__.py": "from lipguide import a\nprint(a.VALUE)",
        "works/own.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "code, behind",
    [
        ("from lipguide.b import VALUE", {"a.py", "b.py"}),  # a package that only hands on does not count itself
        ("from lipguide.c import b", {"a.py", "b.py", "c.py"}),  # relative imports count
        ("from lipguide.hands_on import own", {"hands_on/own.py"}),
        ("from lipguide.works import own", {"works/own.py", "works/__init__.py", "a.py"}),  # importing it runs a.py
        ("from lipguide import hands_on\nhands_on.VALUE", {"a.py"}),
        ("from lipguide.table import f", {"a.py", "table.py"}),
        ("from lipguide.promise import f", {"promise.py"}),
    ],
)
def test_packages_are_seen_through(package, code, behind):
    assert {p.relative_to(package).as_posix() for p in modules_behind(code)} == behind


def test_a_module_that_loads_what_it_is_told_counts_for_everything(package):
    assert modules_behind("from lipguide.loader import f") == set(package.rglob("*.py"))


def test_each_ingredient_changes_the_key():
    base = ("import lipguide as lip\nlip.spectral", "text", {"profile": "quick", "seed": 0}, "lock")
    variants = [
        ("import torch", *base[1:]),
        (base[0], "other text", *base[2:]),
        (*base[:2], {"profile": "full", "seed": 0}, "lock"),
        (*base[:3], "other lock"),
    ]
    keys = {chapter_key(*v) for v in [base, *variants]}
    assert len(keys) == 5 and chapter_key(*base) == chapter_key(*base)


def test_weights_put_in_the_place_of_others_change_the_key_though_size_and_time_are_theirs(package):
    weights, others = package / "a.safetensors", package / "other"
    weights.write_bytes(b"old")
    chapter = ("from lipguide.a import VALUE", "text", {}, "lock")
    before = chapter_key(*chapter)
    others.write_bytes(b"new")
    shutil.copystat(weights, others)
    os.replace(others, weights)
    with_others = chapter_key(*chapter)
    weights.unlink()
    weights.symlink_to("nowhere.safetensors")
    assert len({before, with_others, chapter_key(*chapter)}) == 3


IMPORT = "from lipguide.book.ledger import read\n"


@pytest.mark.parametrize(
    "code, counts",
    [
        (f"{IMPORT}read('results/study.cpu.json')", ["study.cpu.json"]),
        (f"{IMPORT}read(f'results/{{name}}.cpu.json')", ["study.cpu.json"]),
        (f"{IMPORT}read(path='results/study.cpu.json')['results']", ["study.cpu.json"]),
        ("import json\njson.load(open('results/study.cpu.json'))", ["study.cpu.json"]),
        ("from lipguide.book import ledger\nledger.read('results/study.cpu.json')", ["study.cpu.json"]),
        (f"{IMPORT}read(path)", "all"),
        (f"{IMPORT}read('results/' + name)", "all"),
        (f"{IMPORT}read(**where)", "all"),
        (f"{IMPORT}records = map(read, paths)", "all"),
        (f"{IMPORT}r = read\nr(path)", "all"),
        ("from lipguide.book.ledger import read as r\nr(path)", "all"),
        ("from lipguide.book import ledger\nledger.read(path)", "all"),
        ("from pathlib import Path\nfiles = Path('results').iterdir()", "all"),
        ("read = model(x)\nprint(read)", []),  # a name of the chapter's own
        ("open(name).read()", []),
        ("file.read(100)", []),
        ("ledger['results of today'] = 1", []),
        # The word alone is no folder where it is only shown, compared or looked up, …
        ("print('results')", []),
        ("curve = axes(title='results')\nlines(curve, label='results')", []),
        ("whole = 'results' in record and record.get('results') and record['results']", []),
        ("'results'\nprint(f'{len(found)} results')", []),
        (f"{IMPORT}print(read('results/study.cpu.json')['results'])", ["study.cpu.json"]),
        # … and wherever else it stands it may be one.
        ("folder = 'results'\nopen(f'{folder}/{name}.json')", "all"),
        ("files = here / 'results' / name", "all"),
        ("files = os.listdir('results/')", "all"),
        ("files = found(folder='results')", "all"),
        ("for folder in {'results': 1}:\n    scan(folder)", "all"),
        ("print(open(os.path.join('results', name)).read())", "all"),
    ],
)
def test_the_records_that_a_chapter_reads_are_found(tmp_path, code, counts):
    (tmp_path / "results").mkdir()
    for name in ("own.quick.json", "study.cpu.json", "why.quick.json"):
        (tmp_path / "results" / name).write_text("{}")
    found = [path.name for path in records_read(code, tmp_path, tmp_path / "results" / "own.quick.json")]
    assert found == (["study.cpu.json", "why.quick.json"] if counts == "all" else counts)


def test_a_record_that_changes_makes_the_chapters_that_read_it_stale(tmp_path):
    (tmp_path / "results").mkdir()
    record = tmp_path / "results" / "study.cpu.json"

    def key(code):
        return chapter_key(code, "text", {}, "lock", records_read(code, tmp_path))

    codes = [f"{IMPORT}read('results/study.cpu.json')", f"{IMPORT}read('results/why.full.json')"]
    missing = [key(code) for code in codes]
    record.write_text("{}")
    first = [key(code) for code in codes]
    record.write_text("[]")
    second = [key(code) for code in codes]
    assert len({missing[0], first[0], second[0]}) == 3 and missing[1] == first[1] == second[1]

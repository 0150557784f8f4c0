"""What the documents at the root say is so: their code runs, and what they name is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md")
BLOCKS = [
    pytest.param(block, id=f"{name} {place}")
    for name in DOCUMENTS
    for place, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs_alone(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:lipguide|tests|book)/[\w/.-]*)`", text)
    for path in paths:
        if not re.search(r"[A-Z]{3}", path):  # NAME, CHAPTER.PROFILE
            assert (ROOT / path).exists(), path


def test_the_tree_names_every_room_and_every_module():
    tree = re.search(r"```\n(lipguide/.*?)```", (ROOT / "DESIGN.md").read_text(encoding="utf-8"), re.S).group(1)
    words = set(re.findall(r"[\w.]+", tree))
    for path in (ROOT / "lipguide").iterdir():
        if path.name not in ("__pycache__",):
            assert path.name in words, path.name
    for room in ("layers", "bounds", "book"):
        for module in (ROOT / "lipguide" / room).glob("[a-z]*.py"):
            assert module.stem in words, module


def test_every_command_that_is_named_is_one():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    for command in set(re.findall(r"python -m lipguide (\w+)", text)):
        done = subprocess.run([sys.executable, "-m", "lipguide", command, "--help"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, command


ROOMS = {"layers": "", "bounds": "", "losses": "", "data": "data", "tasks": "detection", "book": "book"}
NAMES = {"PIL": "pillow"}
BROUGHT = {
    "cycler",
    "docutils",
    "fontTools",
    "matplotlib_inline",
    "nbformat",
    "pybtex",
    "sphinx",
    "yaml",
}  # by matplotlib and jupyter-book


def test_each_part_declares_what_its_modules_import():
    """What a room imports is in the dependencies of its part, or of the parts that this one builds on."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"] | {"": project["dependencies"]}
    for room, part in ROOMS.items():
        known = declared(extras, part) | declared(extras, "")
        for path in (ROOT / "lipguide" / room).rglob("*.py"):
            for module in imports(path) - BROUGHT:
                assert NAMES.get(module, module) in known, f"{path} imports {module}"


def declared(extras: dict[str, list[str]], part: str) -> set[str]:
    """The names that a part of the package asks for, with those of the parts that it builds on."""
    names: set[str] = set()
    for line in extras[part]:
        name, *others = re.split(r"[\[\],<>=]+", line)
        if name == "lipguide":
            names |= set().union(*(declared(extras, other) for other in others if other))
        else:
            names.add(name)
    return names


def imports(path: Path) -> set[str]:
    """The third-party modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - {"lipguide", *sys.stdlib_module_names}

"""What a chapter's outcome depends on, as one hash: source, parameters, lock, code it imports, records it reads."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

__all__ = ["chapter_key", "modules_behind", "records_read"]

PACKAGE = Path(__file__).resolve().parents[1]
NAME = PACKAGE.name


def chapter_key(code: str, source: str, parameters: dict[str, object], lock: str, records: Iterable[Path] = ()) -> str:
    """A hash that changes when the chapter must run again, and only then.

    Args:
        code: the chapter's code cells, one after the other.
        source: the whole chapter, prose included (it is part of the executed notebook).
        parameters: what papermill injects.
        lock: the hash of the locked environment.
        records: files beside the chapter that it reads, as `records_read` finds them.

    >>> key = chapter_key("import math", "# A\\n", {"profile": "quick"}, "abc")
    >>> key == chapter_key("import math", "# A\\n", {"profile": "full"}, "abc")
    False
    """
    digest = hashlib.sha256(json.dumps([source, parameters, lock], sort_keys=True).encode())
    modules = modules_behind(code)
    files = sorted(modules) + (_data_files() if modules else [])
    for path in files:
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(records):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def records_read(code: str, folder: Path) -> list[Path]:
    """The files `results/...` in a chapter's folder that its code reads by `read(...)`: what other runs left on record.

    What stands in braces in a name may be anything: all files that fit count.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "results").mkdir()
    >>> for name in ("bench.full", "study.cpu", "why.quick"):
    ...     _ = (folder / f"results/{name}.json").write_text("")
    >>> code = "read('results/bench.full.json')\\nread(f'results/{name}.cpu.json')"
    >>> [path.name for path in records_read(code, folder)]
    ['bench.full.json', 'study.cpu.json']
    """
    patterns = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "read":
            for name in node.args[:1]:
                parts = name.values if isinstance(name, ast.JoinedStr) else [name]
                patterns.add("".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts))
    return sorted({path for name in patterns if name.startswith("results/") for path in folder.glob(name)})


def modules_behind(code: str) -> set[Path]:
    """The package's modules that some code uses, with all that they import in turn.

    `import lipguide as lip` alone counts for nothing: each `lip.name` counts for the module that defines the name.

    >>> sorted(p.name for p in modules_behind("import lipguide as lip\\nlip.spectral"))
    ['affine.py', 'constraints.py', 'norms.py', 'orthogonal.py']
    """
    return _closure(_used(ast.parse(code)))


def _data_files() -> list[Path]:
    """Data that ships with the package, weights above all: small, and read by name at run time."""
    return sorted(p for p in PACKAGE.rglob("*") if p.suffix in {".json", ".safetensors"})


def _used(tree: ast.AST) -> set[Path]:
    """The modules that a piece of code names itself."""
    found, aliases = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name == NAME:
                    aliases.add(name.asname or NAME)
                elif name.name.startswith(f"{NAME}."):
                    found |= _files(name.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME and not node.level:
            for name in node.names:
                found |= _resolve(node.module, name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found |= _resolve(NAME, node.attr)
    return found


def _resolve(module: str, name: str) -> set[Path]:
    """The files behind `from module import name`."""
    as_module = _files(f"{module}.{name}")
    if as_module:
        return as_module
    if module == NAME:
        # The root only re-exports: count the module that a name comes from, or everything if it cannot be told.
        return _exports().get(name) or set(PACKAGE.rglob("*.py"))
    return _files(module)


def _files(dotted: str) -> set[Path]:
    path = PACKAGE.joinpath(*dotted.split(".")[1:])
    if path == PACKAGE:
        return set()
    if path.with_suffix(".py").exists():
        return {path.with_suffix(".py")}
    return set(path.rglob("*.py")) if path.is_dir() else set()


def _exports() -> dict[str, set[Path]]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    names: dict[str, set[Path]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                origin = _files(f"{node.module}.{name.name}") or _files(node.module)
                names[name.asname or name.name] = origin
        elif isinstance(node, ast.Assign):
            names |= {t.id: set() for t in node.targets if isinstance(t, ast.Name)}
            if isinstance(node.value, ast.Dict):  # what is imported on first use, by its name
                rooms = ast.literal_eval(node.value)
                names |= {name: _files(module) for name, module in rooms.items()}
    return {name: files or {PACKAGE / "__init__.py"} for name, files in names.items()}


def _closure(start: set[Path]) -> set[Path]:
    done: set[Path] = set()
    waiting = set(start)
    while waiting:
        path = waiting.pop()
        done.add(path)
        waiting |= _imports(path, path.stat().st_mtime_ns) - done
    return done


@cache
def _imports(path: Path, changed: int) -> frozenset[Path]:
    """What a module imports; `changed`, its time stamp, keeps the memory honest."""
    return frozenset(_used(ast.parse(path.read_text(encoding="utf-8"))))

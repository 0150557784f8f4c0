"""What a chapter's outcome depends on, as one hash: source, parameters, lock, code it imports, records it reads.

The code behind a chapter is found by reading it, not by running it. So one rule stands above all others: what cannot be
traced counts for everything, never for nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

__all__ = ["chapter_key", "file_hash", "modules_behind", "records_read"]

PACKAGE = Path(__file__).resolve().parents[1]
NAME = PACKAGE.name
LEDGER = f"{NAME}.book.ledger"
IMPORTERS = {"__import__", "import_module"}
RUNNERS = {"eval", "exec", "reload", "run_module", "run_path"}
SHOWS = {"print", "text", "annotate", "set_title", "suptitle", "set_xlabel", "set_ylabel", "set_label"}
LOOKS_UP = {"get", "pop", "setdefault"}
CAPTIONS = {"title", "label", "xlabel", "ylabel"}
# A line of the package with this comment loads nothing but modules that count already.
PROMISE = "# loads what its caller has named"


def chapter_key(code: str, source: str, parameters: dict[str, object], lock: str, records: Iterable[Path] = ()) -> str:
    """A hash that changes when the chapter must run again, and only then.

    Args:
        code: the chapter's code cells, one after the other.
        source: what of the chapter's source bears on a run: its cells with their tags. Prose does not; it is set around
            the outputs when the book is rendered.
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
        digest.update(f"{path.relative_to(PACKAGE)} {_hash_of_ours(path)} ".encode())
    for path in sorted(records):
        digest.update(f"{path.name} {file_hash(path)} ".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, or nothing where there is none.

    >>> file_hash(Path("nowhere"))
    ''
    """
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _hash_of_ours(path: Path) -> str:
    """`file_hash` of a file of the package, which every chapter asks for: read once, until its entry changes."""
    try:
        entry = path.stat()
    except FileNotFoundError:
        return ""
    return _hash_at(path, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns)


@cache
def _hash_at(path: Path, *entry: int) -> str:
    return file_hash(path)


def _data_files() -> list[Path]:
    """Data that ships with the package, weights above all: small, and read by name at run time."""
    return sorted(p for p in PACKAGE.rglob("*") if p.suffix in {".json", ".safetensors"})


# -- records ----------------------------------------------------------------------------------------------------------


def records_read(code: str, folder: Path, own: Path | None = None) -> list[Path]:
    """The files `results/...` in a chapter's folder that its code reads: what other runs left on record.

    Every string that begins with `results/` names a record. What stands in braces in a name may be anything: all files
    that fit count. If `read(...)` takes a name that is made elsewhere, all records count.

    Args:
        code: the chapter's code.
        folder: that the chapter lies in.
        own: the record that the chapter itself writes; it never counts.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "results").mkdir()
    >>> for name in ("bench.full", "study.cpu", "why.quick"):
    ...     _ = (folder / f"results/{name}.json").write_text("")
    >>> code = "read('results/bench.full.json')\\nread(f'results/{name}.cpu.json')"
    >>> [path.name for path in records_read(code, folder)]
    ['bench.full.json', 'study.cpu.json']
    >>> [path.name for path in records_read("read(path)", folder)]
    ['bench.full.json', 'study.cpu.json', 'why.quick.json']
    """
    tree = ast.parse(code)
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = {_pattern(node) for node in ast.walk(tree) if node not in parts}
    patterns = {text for text in texts if text and text.startswith("results/")}
    if _names_the_folder(tree) or _reads_what_is_named_elsewhere(tree):
        patterns.add("results/*")
    found = {path for pattern in patterns for path in folder.glob(pattern.rstrip("/"))}
    return sorted(path for path in found if path.is_file() and path != own)


def _names_the_folder(tree: ast.AST) -> bool:
    """Whether the name of the folder stands anywhere in code but where it can only be shown, compared or looked up."""
    words = {part for node in ast.walk(tree) for part in _mere_words(node)}
    return any(_pattern(node) in ("results", "results/") for node in ast.walk(tree) if node not in words)


def _mere_words(node: ast.AST) -> Sequence[ast.AST]:
    """The parts of a node that no file is opened by, even where they are strings."""
    if isinstance(node, ast.JoinedStr):
        return node.values  # the whole of it is looked at
    if isinstance(node, ast.Expr):
        return [node.value]
    if isinstance(node, ast.Subscript):  # as in record["results"]
        return [node.slice]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call) and _called(node) in SHOWS | LOOKS_UP:
        return node.args
    if isinstance(node, ast.keyword) and node.arg in CAPTIONS:
        return [node.value]
    return []


def _pattern(node: ast.AST) -> str | None:
    """A string of the code as a pattern for files, with a star for what is not known before it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if "\n" not in node.value else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None


def _reads_what_is_named_elsewhere(tree: ast.AST) -> bool:
    """Whether the ledger's `read` takes a name that does not stand in the call, or is handed on under another name."""
    readers = {name for name, module, wanted in _imported(tree, "") if wanted == "read" and module == LEDGER}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _called(node) in readers | {"read"}]
    called = {call.func for call in calls}
    handed_on = any(isinstance(n, ast.Name) and n.id in readers and n not in called for n in ast.walk(tree))
    return handed_on or any(not _names_its_file(call) for call in calls)


def _names_its_file(call: ast.Call) -> bool:
    """Whether a call of `read` says which file; `file.read()` and `file.read(100)` of an open file ask for none."""
    names = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg in ("path", None))]
    if isinstance(call.func, ast.Attribute):
        names = [n for n in names if not (isinstance(n, ast.Constant) and isinstance(n.value, int))]
    return all((_pattern(name) or "").startswith("results/") for name in names)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", "") or getattr(call.func, "attr", "")


# -- modules ----------------------------------------------------------------------------------------------------------


def modules_behind(code: str) -> set[Path]:
    """The package's modules that some code uses, with all that they import in turn.

    `import lipguide as lip` alone counts for nothing: each `lip.name` counts for the module that defines it. Where
    that cannot be told (`getattr(lip, name)`, `from lipguide import *`, …), every module counts.

    >>> sorted(p.name for p in modules_behind("import lipguide as lip\\nlip.MaxMin"))  # doctest: +ELLIPSIS
    ['activations.py', ...]
    >>> modules_behind("import lipguide as lip\\ngetattr(lip, name)") == modules_behind("from lipguide import *")
    True
    """
    tree = ast.parse(code)
    if any(_is_text(node, NAME) for node in ast.walk(tree)):  # as in `python -m lipguide`
        return _everything()
    return _closure(_used(tree, ""))


def _everything() -> set[Path]:
    return set(PACKAGE.rglob("*.py"))


def _closure(start: set[Path]) -> set[Path]:
    done: set[Path] = set()
    waiting = set(start)
    while waiting:
        path = waiting.pop()
        done.add(path)
        waiting |= _behind(path, path.stat().st_mtime_ns) - done
    return done


@cache
def _behind(path: Path, changed: int) -> frozenset[Path]:
    """What a module imports, and the packages around it that do work of their own when it is imported.

    `changed`, the time stamp of the file, keeps the memory honest.
    """
    dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    home = dotted.removesuffix(".__init__") if path.name == "__init__.py" else dotted.rpartition(".")[0]
    around = {folder / "__init__.py" for folder in path.parents if PACKAGE in folder.parents}
    working = {init for init in around if init.exists() and not _only_hands_on(init)}
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    promised = {number for number, line in lines if PROMISE in line}
    return frozenset(_used(_tree(path), home, promised) | working)


def _only_hands_on(init: Path) -> bool:
    """Whether a package does nothing itself but import names and list them."""
    for statement in _tree(init).body:
        listed = isinstance(statement, ast.Assign) and all(_is_name(t, "__all__") for t in statement.targets)
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not (listed or text or isinstance(statement, ast.Import | ast.ImportFrom)):
            return False
    return True


def _used(tree: ast.AST, home: str, promised: Container[int] = ()) -> set[Path]:
    """The modules that a piece of code names itself.

    Args:
        tree: the code.
        home: the package that the code belongs to, which its relative imports start from.
        promised: lines that load nothing more.
    """
    found: set[Path] = set()
    packages: dict[str, str] = {}  # what a package is called in this code
    for name, module, wanted in _imported(tree, home):
        target = _target(module, wanted)
        if isinstance(target, str) and _is_package(target):
            packages[name] = target
        else:
            found |= _files(target)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in packages:
            found |= _files_of_chain(packages[node.id], _attributes(node, parents))
        elif isinstance(node, ast.Call) and node.lineno not in promised:
            found |= _loaded_by(node, tree)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set() if isinstance(parents[node], ast.Expr) else _imported_in_text(node.value)
    return found


def _imported(tree: ast.AST, home: str) -> Iterator[tuple[str, str, str | None]]:
    """Every import from the package: the name that it binds, the module, and what is taken from it (None: itself)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if _is_ours(name.name):
                    yield name.asname or NAME, name.name if name.asname else NAME, None
                    yield "", name.name, None  # it is loaded, whatever it is called
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, home)
            if _is_ours(module):
                for name in node.names:
                    yield name.asname or name.name, module, name.name


def _absolute(node: ast.ImportFrom, home: str) -> str:
    if not node.level:
        return node.module or ""
    start = home.split(".")[: len(home.split(".")) - node.level + 1]
    return ".".join([*start, *([node.module] if node.module else [])])


def _target(module: str, name: str | None) -> str | set[Path]:
    """What `from module import name` finds: the dotted name of a module, or the files that define the name."""
    if name is None:
        return module
    if name == "*":
        return _whole(module)
    if not _is_package(module):
        return _whole(module)
    bound = _bindings(module)
    if name in bound:
        origin, original = bound[name]
        return {_init(module)} if origin == module else _target(origin, original)
    return f"{module}.{name}" if _exists(f"{module}.{name}") else _whole(module)


def _bindings(package: str) -> dict[str, tuple[str, str | None]]:
    """What a package's `__init__` binds each name to: a module and a name in it; itself for what it defines.

    Names that are imported on first use are those under `if TYPE_CHECKING`.
    """
    tree = _tree(_init(package))
    names: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = (package, node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = (package, node.id)
    for name, module, wanted in _imported(tree, package):
        if name and wanted != "*":
            beside = wanted is not None and module == package and _exists(f"{package}.{wanted}")
            names[name] = (f"{package}.{wanted}", None) if beside else (module, wanted)
    return names


def _files_of_chain(package: str, attributes: Sequence[str]) -> set[Path]:
    """The files behind `package.a.b.c`. The package by itself may be asked for anything: all of it counts."""
    target: str | set[Path] = package
    for name in attributes:
        if not isinstance(target, str) or not _is_package(target):
            break
        target = _target(target, name)
    return _files(target)


def _attributes(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> list[str]:
    """The names that follow a name in the code, dot by dot."""
    names = []
    while isinstance(parents[node], ast.Attribute):
        node = parents[node]
        names.append(node.attr)
    return names


def _loaded_by(call: ast.Call, tree: ast.AST) -> set[Path]:
    """The modules that a call loads, if it is one that runs code or imports modules by their names."""
    name = _called(call)
    if name in ("eval", "exec") and isinstance(call.func, ast.Attribute):  # `model.eval()` is something else
        return set()
    if name in RUNNERS:
        return _everything()
    return _named_in(tree) if name in IMPORTERS else set()


def _named_in(tree: ast.AST) -> set[Path]:
    """The modules that code may import by name: those that it names in strings, if all such strings are modules."""
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    modules = {text for text in texts if text.startswith(f"{NAME}.") and "\n" not in text}
    if not modules or not all(map(_exists, modules)):
        return _everything()
    return set().union(*map(_whole, modules))


def _imported_in_text(text: str) -> set[Path]:
    """The modules that a program inside a string imports; another process may be about to run it."""
    found: set[Path] = set()
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] in ("import", "from") and _is_ours(words[1]):
            try:
                found |= _used(ast.parse(line.strip()), "")
            except SyntaxError:
                found |= _everything()
            if words[0] == "import":  # what it does with the package stands in other lines
                found |= _whole(words[1])
    return found


def _is_ours(dotted: str) -> bool:
    return dotted.split(".")[0] == NAME


def _is_name(node: ast.AST, name: str | ast.AST) -> bool:
    wanted = name.id if isinstance(name, ast.Name) else name
    return isinstance(node, ast.Name) and node.id == wanted


def _is_text(node: ast.AST, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def _path(dotted: str) -> Path:
    return PACKAGE.joinpath(*dotted.split(".")[1:])


def _init(package: str) -> Path:
    return _path(package) / "__init__.py"


def _is_package(dotted: str) -> bool:
    return _init(dotted).exists()


def _exists(dotted: str) -> bool:
    return _is_package(dotted) or _path(dotted).with_suffix(".py").exists()


def _files(target: str | set[Path]) -> set[Path]:
    return _whole(target) if isinstance(target, str) else target


def _whole(dotted: str) -> set[Path]:
    """The file of a module, or all files of a package; everything for a module that is not there."""
    if _is_package(dotted):
        return set(_path(dotted).rglob("*.py"))
    file = _path(dotted).with_suffix(".py")
    return {file} if file.exists() else _everything()


def _tree(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


@cache
def _parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))

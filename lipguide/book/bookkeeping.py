"""What a page does not show of its code: lines that only put on record what other lines have computed.

A cell writes its numbers into the chapter's ledger. Where such a statement measures something, or where another one
reads it, it stays on the page. Where it merely names or sums up what is there already, it teaches nothing, and a reader
who copies the cell would have to take it out. The notebooks that a reader downloads keep every line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["leave_out_records", "without_records"]

LEDGER = "ledger"
NAMES = {"dict", "enumerate", "len", "list", "map", "str", "tuple", "zip", "items", "keys", "values", "item", "tolist"}
SUMS_UP = {"max", "min", "sum", "amax", "amin", "mean", "median", "abs", "round", "float", "double", "cpu", "detach"}


def without_records(cells: list[str]) -> list[str]:
    """The code of a chapter's cells without the statements that only fill its ledger; a cell never becomes empty.

    >>> without_records(["a = measure()\\nledger['a'] = a", "b = 2\\nledger['b'] = b", "print(ledger['b'])"])
    ['a = measure()', "b = 2\\nledger['b'] = b", "print(ledger['b'])"]
    """
    trees = [_parsed(cell) for cell in cells]
    read = {key for tree in trees for key in _read(tree)}
    return cells if None in read else [_shown(cell, tree, read) for cell, tree in zip(cells, trees, strict=True)]


def leave_out_records(app: Sphinx, doctree: nodes.document) -> None:
    """Take them out of the cells of a page."""
    inputs = [node for node in doctree.findall(nodes.container) if "cell_input" in node["classes"]]
    blocks = [block for node in inputs for block in node.findall(nodes.literal_block)]
    for block, code in zip(blocks, without_records([block.astext() for block in blocks]), strict=True):
        if code != block.astext():
            block.rawsource = code
            block.children = []
            block += nodes.Text(code)


def _parsed(cell: str) -> ast.Module:
    try:
        return ast.parse(cell)
    except SyntaxError:  # a cell with a line for the shell
        return ast.Module([], [])


def _shown(cell: str, tree: ast.Module, read: set[str | None]) -> str:
    lines: list[str | None] = list(cell.splitlines())
    for statement in tree.body:
        if _only_records(statement, read):
            last = statement.end_lineno or statement.lineno
            lines[statement.lineno - 1 : last] = [None] * (last - statement.lineno + 1)
    left = "\n".join(line for line in lines if line is not None).strip("\n")
    return left if any(line.strip() and not line.startswith("#") for line in left.splitlines()) else cell


def _only_records(statement: ast.stmt, read: set[str | None]) -> bool:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func) == f"{LEDGER}.used"
    if not isinstance(statement, ast.Assign):
        return False
    targets = [part for target in statement.targets for part in _parts(target)]
    if not all(_of_ledger(target) and _key(target) not in (None, *read) for target in targets):
        return False
    return not any(_computes(node) for node in ast.walk(statement.value))


def _computes(node: ast.AST) -> bool:
    """Whether it does more than to name what is there, to put it in another order, or to sum it up."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name not in NAMES | SUMS_UP
    return isinstance(node, ast.Compare)


def _read(tree: ast.Module) -> Iterator[str | None]:
    """The first names of all keys that are read; None where a key is not known before it runs."""
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    written = {part for node in assignments for target in node.targets for part in _parts(target)}
    for node in ast.walk(tree):
        if _of_ledger(node) and node not in written:
            yield _key(node)


def _parts(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple) else [target]


def _of_ledger(node: ast.AST) -> bool:
    """`ledger[key]` or `ledger.results[key]`."""
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) in (LEDGER, f"{LEDGER}.results")


def _key(node: ast.expr) -> str | None:
    """The first name of a key: "rows" of "rows.gain" and of f"rows.{name}"."""
    assert isinstance(node, ast.Subscript)
    text = node.slice.values[0] if isinstance(node.slice, ast.JoinedStr) else node.slice
    if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
        return None
    name, dot, _ = text.value.partition(".")
    return name if dot or text is node.slice else None

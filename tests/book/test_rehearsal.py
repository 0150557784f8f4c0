"""The rehearsal of the profile `full` reaches every size that a chapter chooses, and makes it small."""

import ast
from pathlib import Path

import jupytext
import pytest
import torch

from lipguide.tasks.harness import TASKS
from tests.book import rehearsal
from tests.book.rehearsal import SIZES, Smaller, shipped, smaller, toy

CHAPTERS = sorted(path for path in Path("book").resolve().glob("*.md") if "{code-cell}" in path.read_text("utf-8"))


def trees(chapter: Path) -> list[ast.Module]:
    return [ast.parse(cell.source) for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]


def run(code: str, **names: object) -> dict[str, object]:
    space = {"profile": "full", Smaller.FUNCTION: smaller, **names}
    exec(compile(Smaller().visit(ast.parse(code)), "cell", "exec"), space)
    return space


def test_sizes_become_the_smaller_ones():
    code = """
a, b = {"quick": (150, 9), "full": (None, 3)}[profile]
c = 300 if profile == "quick" else 3000
effort = {"quick": {"steps": 20}, "full": {"steps": 50}}
d = dict(**effort[profile])
e = x[:2] if profile == "quick" else x[:16]
if profile == "full":
    f = "trained"
"""
    space = run(code, x=torch.arange(20))
    assert [space[name] for name in "abcd"] == [None, 3, 300, {"steps": 20}]
    assert space["e"].tolist() == [0, 1] and space["f"] == "trained"


@pytest.mark.parametrize("quick, full", [((1, 2), (1, 2, 3)), ({"steps": 1}, {"restarts": 2})])
def test_profiles_that_do_not_choose_alike_are_an_error(quick, full):
    with pytest.raises((ValueError, KeyError)):
        smaller(quick, full)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_size_of_a_chapter_escapes(chapter):
    """What is left of the name `profile` names the ledger or decides on a statement."""
    for tree in trees(chapter):
        for node in ast.walk(Smaller().visit(tree)):
            allowed = [node.test] if isinstance(node, ast.If) else []
            if isinstance(node, ast.Assign):  # known = profile == "full" and …
                allowed += [n for n in ast.walk(node.value) if isinstance(n, ast.Compare | ast.BoolOp)]
                allowed += node.targets
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Ledger":
                allowed += node.args
            for part in allowed:
                for name in ast.walk(part):
                    name.seen = True
        left = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "profile" and not hasattr(n, "seen")]
        assert not left, f"line {left[0].lineno}"


def test_each_recipe_of_the_profile_has_a_toy_that_the_weights_that_ship_fit():
    seen = []
    for task in TASKS.values():
        for name, recipe in task.more.items():
            twin = shipped(name, task.recipes)
            assert (twin is not None) == ("-full" in name)
            if twin is not None:
                small = toy(recipe, task.recipes[twin])
                seen.append(name)
                assert small.steps == 2 and small.network == task.recipes[twin].network
                sizes = [(getattr(one, size, None)) for one in (small, task.recipes[twin]) for size in SIZES]
                assert sizes[: len(SIZES)] == sizes[len(SIZES) :]
    assert len(seen) > 30 and "detection-reader-full" in seen


def test_a_rehearsal_touches_nothing_outside_of_its_copy(tmp_path, monkeypatch):
    """Its pictures are drawn by other figures than those of the book: they must not be taken for the book's own."""
    called = []
    monkeypatch.setattr(rehearsal, "COPY", tmp_path / "copy")
    monkeypatch.setattr(rehearsal.os, "execve", lambda program, command, environment: called.append(environment))
    monkeypatch.chdir(tmp_path)
    rehearsal.main(["why"])
    assert (tmp_path / "copy" / "lipguide" / "__init__.py").exists()
    for variable in ("PYTHONPATH", "IPYTHONDIR", "LIPGUIDE_CACHE"):
        assert Path(called[0][variable]).is_relative_to(tmp_path / "copy"), variable

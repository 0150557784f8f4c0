"""The profile `full` rehearsed on a CPU: every chapter's own code, with sizes that take minutes.

    python -m tests.book.rehearsal [CHAPTER ...] [--minutes N] [--device cuda]

copies the checkout to _build/rehearsal and runs `python -m lipguide build --profile full` there, so what a GPU will run
is seen to run, and neither ledgers nor weights of the checkout are touched. The same command goes on where it was
stopped. Its numbers mean nothing. "cuda" is a GPU that is not there (`tests.pretended`): it costs twice the time, and
stops at tensors that a real one would not take together.

What is smaller: numbers of a chapter are those of `quick` where these are smaller (`Smaller`); the synthetic data are a
hundred scenes; a recipe that ends in "-full" trains a few steps a network of the size that ships, and then hands over
the weights that ship, for what is made of digits that nobody has learnt would be empty.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "_build" / "rehearsal"
STARTUP = "from tests.book.rehearsal import begin\n\nbegin(get_ipython())\n"
DEVICE = "LIPGUIDE_REHEARSED"  # says to the kernels on which device
SCENES = {"train": 160, "test": 80}  # of the synthetic data, where a chapter asks for all
DATA = ("house-numbers", "svhn", "cifar10")
LIFE = ExitStack()  # of a kernel
SIZES = ("size", "width", "widths")  # fields of recipes that say how large a network is


def main(arguments: list[str] | None = None) -> None:
    """Become the build, in the copy."""
    parser = argparse.ArgumentParser(prog="python -m tests.book.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="these alone")
    parser.add_argument("--minutes", help="stop before they are over, as `python -m lipguide build` does")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: one that is not there")
    options = parser.parse_args(arguments)
    copy_checkout(ROOT, COPY)
    startup = COPY / "_build" / "ipython" / "profile_default" / "startup" / "rehearsal.py"
    startup.parent.mkdir(parents=True, exist_ok=True)
    startup.write_text(STARTUP, encoding="utf-8")
    module = ["lipguide"] if options.device == "cpu" else ["tests.pretended", "lipguide"]
    command = [sys.executable, "-m", *module, "build", "--profile", "full", "--device", options.device]
    command += ["--only", *options.chapters] if options.chapters else []
    command += ["--minutes", options.minutes] if options.minutes else []
    environment = os.environ | {"PYTHONPATH": str(COPY), "IPYTHONDIR": str(startup.parents[2]), DEVICE: options.device}
    # A cache of its own: with other numbers of scenes SVHN's figures are others, and so are the pictures drawn by them.
    environment["LIPGUIDE_CACHE"] = str(COPY / "_build" / "cache")
    os.chdir(COPY)
    os.execve(sys.executable, command, environment)


def copy_checkout(root: Path, target: Path) -> None:
    """What git would take of a checkout, into a folder that may hold an earlier copy and what has been built in it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def begin(shell: Any) -> None:
    """What the kernel of each chapter does first: make all that follows small.

    The package is imported before the first cell only: papermill waits a minute for a kernel, and torch is large.
    """
    shell.user_ns[Smaller.FUNCTION] = smaller
    shell.ast_transformers.append(Smaller())

    def before_the_first_cell(_: Any) -> None:
        shell.events.unregister("pre_run_cell", before_the_first_cell)
        if os.environ[DEVICE] == "cuda":
            begin_to_pretend()
        shrink_data()
        shrink_trainings()

    shell.events.register("pre_run_cell", before_the_first_cell)


def begin_to_pretend() -> None:
    """A GPU, until this kernel ends."""
    from tests.pretended import pretended

    LIFE.enter_context(pretended())


class Smaller(ast.NodeTransformer):
    """Sizes that a cell chooses by its profile become the smaller ones of both: `{"quick": …, "full": …}[profile]` and
    `… if profile == "quick" else …`. Statements (`if profile == "full":`) stay as they are."""

    FUNCTION = "_smaller_of_quick_and_full"

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        if not (isinstance(node.slice, ast.Name) and node.slice.id == "profile"):
            return node
        both = [ast.Subscript(node.value, ast.Constant(name), ast.Load()) for name in ("quick", "full")]
        return self._call(node, both)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        if ast.unparse(node.test) != "profile == 'quick'":
            return node
        return self._call(node, [node.body, node.orelse])

    def _call(self, node: ast.expr, both: list[ast.expr]) -> ast.expr:
        call = ast.Call(ast.Name(self.FUNCTION, ast.Load()), both, [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


def smaller(quick: Any, full: Any) -> Any:
    """The value of `full`, with each number in it at most that of `quick`. None, for "all", stays.

    >>> smaller((150, {"steps": 20}, 64), (None, {"steps": 50}, 8))
    (None, {'steps': 20}, 8)
    """
    if isinstance(full, dict):
        return {key: smaller(quick[key], value) for key, value in full.items()}
    if isinstance(full, tuple):
        return tuple(smaller(*pair) for pair in zip(quick, full, strict=True))
    if isinstance(full, int):
        return min(quick, full)
    return full[: len(quick)] if hasattr(full, "shape") else full


def shrink_data() -> None:
    """Whoever asks for all synthetic scenes gets a few."""
    from lipguide.data.facts import svhn_facts

    for split, scenes in SCENES.items():
        svhn_facts()[split]["images"] = scenes


def shrink_trainings() -> None:
    """Few steps for the recipes of the profile, and few attacks for its plan."""
    from lipguide.tasks import harness
    from lipguide.tasks.detection.study import PLANS

    for task in harness.TASKS.values():
        for name, recipe in task.more.items():
            twin = shipped(name, task.recipes)
            if twin is not None:
                task.more[name] = toy(recipe, task.recipes[twin])
    PLANS["full"] = replace(PLANS["full"], attacked_scenes=8, attack_steps=2)
    train_by = harness.train_by

    def train_and_hand_over(task: Any, recipe: Any, device: Any, *rest: Any) -> tuple[Any, dict[str, Any]]:
        model, run = train_by(task, recipe, device, *rest)
        name = next(name for name, known in task.more.items() if known is recipe)
        model.load_state_dict(harness.trained(shipped(name, task.recipes), device)[0].state_dict())
        return model, run

    harness.train_by = train_and_hand_over


def shipped(name: str, recipes: Sequence[str]) -> str | None:
    """The weights that ship whose larger twin `name` is, or None if it is nothing of the profile `full`.

    >>> shipped("classification-vgg-svhn-full", ["classification-vgg"])
    'classification-vgg'
    """
    endings = ["-full", *(f"-{data}-full" for data in DATA), *(f"-full-{data}" for data in DATA)]
    found = [name.removesuffix(ending) for ending in endings if name.endswith(ending)]
    return next((twin for twin in found if twin in recipes), None)


def toy(recipe: Any, shipped: Any) -> Any:
    """A recipe of the profile with few steps on few scenes, and a network of the size of the one that ships."""
    sizes = {field.name: getattr(shipped, field.name) for field in fields(recipe) if field.name in SIZES}
    return replace(recipe, steps=2, batch_size=8, items=48, test_items=32, **sizes)


if __name__ == "__main__":
    main()

"""A process that makes synthetic house numbers for another one: `python worker.py TASK`.

TASK is JSON: what to `make`, from what, and `parts`, this process's own share. After every part it prints by how much
the bar advances.

It is run as a file. Were it run as a module, Python would execute the packages around it first, and these import torch:
seconds and hundreds of megabytes for each process, and drawing needs nothing of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType


def scenes(task: dict) -> None:
    """Draw blocks of scenes; a part is the number of a block and how many it has."""
    from lipguide.data.shn.cache import block_path, keep, make_block
    from lipguide.data.shn.difficulty import Difficulty
    from lipguide.data.shn.glyphs import take_glyphs
    from lipguide.data.shn.pages import Pages

    take_glyphs(Path(task["glyphs"]))
    which = (task["split"], task["seed"], Difficulty(**task["difficulty"]), task["version"])
    for block, count in task["parts"]:
        pages = Pages.of(list(make_block(*which, block, count)))
        keep(pages, block_path(Path(task["folder"]), block, count))
        report(count)


def glyphs(task: dict) -> None:
    """Draw the glyphs of typefaces; a part is the number of a face."""
    from lipguide.data.shn.glyphs import keep_glyphs

    for face in task["parts"]:
        keep_glyphs(Path(task["folder"]), face)
        report(0)


def cuttings(task: dict) -> None:
    """Cut squares out of blocks of scenes; for a part see `lipguide.data.shn.cuttings`."""
    from lipguide.data.crops import Cutting
    from lipguide.data.shn.cuttings import Part, fill_from_block

    for part in task["parts"]:
        fill_from_block(Path(task["file"]), Path(task["folder"]), Cutting(**task["cutting"]), Part(*part))
        report(Part(*part).count)


def report(done: int) -> None:
    """Tell the process that waits."""
    sys.stdout.write(f"{done}\n")
    sys.stdout.flush()


def enter_packages() -> None:
    """Let the modules of this folder be imported by their full names without the `__init__` of any package above."""
    shn, data, lipguide, root = Path(__file__).resolve().parents[:4]
    for name, folder in (("lipguide", lipguide), ("lipguide.data", data), ("lipguide.data.shn", shn)):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    sys.path[0] = str(root)  # instead of this file's own folder, whose modules have everyday names


if __name__ == "__main__":
    enter_packages()
    task = json.loads(sys.argv[1])
    {"scenes": scenes, "glyphs": glyphs, "cuttings": cuttings}[task["make"]](task)

"""A process that makes blocks of synthetic house numbers for another one: `python worker.py TASK`.

TASK is JSON: folder, split, seed, difficulty, and blocks as pairs of number and count. After every block it prints
the number of scenes made.

It is run as a file. Were it run as a module, Python would execute the packages around it first, and these import torch:
seconds and hundreds of megabytes for each process, and drawing needs nothing of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType


def main(task: dict) -> None:
    """Make the blocks of a task."""
    from lipguide.data.shn.cache import block_path, keep, make_block
    from lipguide.data.shn.difficulty import Difficulty
    from lipguide.data.shn.pages import Pages

    difficulty = Difficulty(**task["difficulty"])
    for block, count in task["blocks"]:
        pages = Pages.of(list(make_block(task["split"], task["seed"], difficulty, block, count)))
        keep(pages, block_path(Path(task["folder"]), block, count))
        sys.stdout.write(f"{count}\n")
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
    main(json.loads(sys.argv[1]))

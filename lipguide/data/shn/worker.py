"""A process that makes blocks of synthetic house numbers for another one: `python -m lipguide.data.shn.worker TASK`.

TASK is JSON: folder, split, seed, difficulty, and blocks as pairs of number and count. After every block it prints
the number of scenes made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lipguide.data.shn.cache import Pages, _block_path, _make_block
from lipguide.data.shn.difficulty import Difficulty


def main(task: dict) -> None:
    """Make the blocks of a task."""
    difficulty = Difficulty(**task["difficulty"])
    for block, count in task["blocks"]:
        pages = Pages.of(list(_make_block(task["split"], task["seed"], difficulty, block, count)))
        pages.save(_block_path(Path(task["folder"]), block, count))
        sys.stdout.write(f"{count}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

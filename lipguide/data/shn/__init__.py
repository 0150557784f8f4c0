"""Synthetic House Numbers (SHN): SVHN's twin, made on the spot, with a mask for every digit.

Where the digits stand follows SVHN's published geometry (`layout`), what they look like is drawn by `rendering`. The
scene of (seed, split, index) depends on nothing else: not on the order, the number of scenes or of processes.
"""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lipguide.arguments import whole
from lipguide.data.crops import Cutting
from lipguide.data.facts import svhn_facts
from lipguide.data.items import Annotation, Scene, make_scene
from lipguide.data.shn.cache import BLOCK, content_hash, load_pages
from lipguide.data.shn.cuttings import kept_cuttings, make_rows
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.looks import DEFAULT, LOOKS, look_of
from lipguide.data.shn.pages import decode
from lipguide.data.shn.rendering import SPLITS, Encoded
from lipguide.data.svhn.digit_struct import write_digit_struct

__all__ = ["TWINS", "SyntheticHouseNumbers", "name_of"]

# The versions by the names that recipes have for them.
TWINS = {"house-numbers": DEFAULT} | {f"house-numbers-{version}": version for version in LOOKS}


def name_of(version: int) -> str:
    """What runs call a version.

    >>> name_of(2)
    'Synthetic House Numbers 2'
    """
    return f"Synthetic House Numbers {version}"


class SyntheticHouseNumbers(Dataset[Scene]):
    """Street pictures of house numbers, with boxes, labels and masks; the same items as `SVHN`.

    In memory a scene is a JPEG and a packed mask, about 4 kB.

    Args:
        split: "train" or "test", which differ as SVHN's do.
        size: the first so many scenes; all 33,402 or 13,068 when None.
        seed: another seed is another data set.
        difficulty: see `Difficulty`.
        cache: keep the scenes, and what is cut out of them, under `cache_folder()` for the next time.
        workers: processes that make what is missing; None for one a core for large sets.
        version: 1, drawn without a real picture at hand; 2, whose looks are more like SVHN's; or 3, with the looks of
            both in turn, more threes with a flat top and more digits askew.

    >>> data = SyntheticHouseNumbers("train", size=2, seed=0, cache=False)
    >>> scene = data[0]
    >>> len(data), len(scene.boxes) == len(scene.labels), scene.mask.shape == scene.image.shape[1:]
    (2, True, True)
    """

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        seed: int = 0,
        difficulty: Difficulty | None = None,
        cache: bool = True,
        workers: int | None = None,
        version: int = DEFAULT,
    ) -> None:
        look_of(whole("version", version))  # an error before anything is drawn
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        size = svhn_facts()[split]["images"] if size is None else whole("size", size, least=0)
        if workers is None:
            workers = (os.cpu_count() or 1) if size >= 8 * BLOCK else 1
        workers = whole("workers", workers)
        self.split, self.seed = split, whole("seed", seed, least=0)
        self.difficulty = Difficulty() if difficulty is None else difficulty
        self._cache, self._workers = cache, workers
        self.version, self.name = version, name_of(version)
        self._pages = load_pages(split, size, self.seed, self.difficulty, cache, workers, version)

    def __len__(self) -> int:
        return len(self._pages)

    def _encoded(self, index: int) -> Encoded:
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(f"scene {index} of a data set of {len(self)}")
        return self._pages[index]

    def __getitem__(self, index: int) -> Scene:
        encoded = self._encoded(index)
        pixels, mask = decode(encoded)
        return make_scene(pixels, encoded.boxes, encoded.labels, mask)

    def cuttings(self, cutting: Cutting) -> dict[str, np.ndarray]:
        """What `scenes` and `digits` cut out of all scenes, as arrays of `Cutting.kinds`: of a file that is mapped into
        memory where the data set keeps its scenes."""
        if not self._cache:
            return make_rows(self._pages, range(len(self)), cutting)
        key = content_hash(self.split, self.seed, self.difficulty, self.version)
        return kept_cuttings(self._pages, key, cutting, self._workers)

    def annotation(self, index: int) -> Annotation:
        """What is known of a scene without decoding its picture."""
        e = self._encoded(index)
        return Annotation(f"{index + 1}.png", e.width, e.height, e.boxes.astype(float), e.labels.astype(np.int64))

    def annotations(self) -> list[Annotation]:
        """All annotations in order, for `geometry`."""
        return [self.annotation(index) for index in range(len(self))]

    def save(self, root: str | Path) -> Path:
        """Write the scenes in SVHN's layout: root/split/1.png …, digitStruct.mat, and 1.mask.png … beside them.

        Everything is written to a temporary folder that is renamed at the end, so a half-written set never has the
        right name; a folder that is there already is not touched but reported.
        """
        folder = Path(root) / self.split
        if folder.exists():
            raise FileExistsError(f"{folder} exists already: remove it, or name another root")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{self.split}.", suffix=".part", dir=folder.parent))
        try:
            for index in range(len(self)):
                pixels, mask = decode(self._encoded(index))
                Image.fromarray(pixels).save(temporary / f"{index + 1}.png")
                Image.fromarray(mask).save(temporary / f"{index + 1}.mask.png")
            write_digit_struct(temporary / "digitStruct.mat", self.annotations())
            temporary.chmod(0o755)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder

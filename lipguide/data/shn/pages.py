"""Many scenes in a few arrays, as memory and files hold them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lipguide.data.npz import DamagedFile, load_arrays, save_arrays
from lipguide.data.shn.rendering import Encoded

__all__ = ["FIELDS", "Pages", "decode"]

# bytes: pictures and masks in turn; ends: where each of them ends; sizes: width, height; digits: where each scene's
# digits end; boxes, labels: of all digits.
FIELDS = ("bytes", "ends", "sizes", "digits", "boxes", "labels")


class Pages:
    """Scenes one after the other.

    >>> from lipguide.data.shn.difficulty import Difficulty
    >>> from lipguide.data.shn.rendering import render
    >>> pages = Pages.of([render("train", 0, k, Difficulty()) for k in range(2)])
    >>> len(pages), pages[1].picture == render("train", 0, 1, Difficulty()).picture
    (2, True)
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    @classmethod
    def of(cls, scenes: list[Encoded]) -> Pages:
        """Lay scenes one after the other."""
        parts = [part for scene in scenes for part in (scene.picture, scene.mask)]
        boxes = [np.zeros((0, 4)), *(scene.boxes for scene in scenes)]
        labels = [np.zeros(0), *(scene.labels for scene in scenes)]
        return cls(
            {
                "bytes": np.frombuffer(b"".join(parts), dtype=np.uint8),
                "ends": np.cumsum([0, *map(len, parts)]),
                "sizes": np.array([(s.width, s.height) for s in scenes], dtype=np.int32).reshape(-1, 2),
                "digits": np.cumsum([0, *(len(scene.labels) for scene in scenes)]),
                "boxes": np.concatenate(boxes).astype(np.int32),
                "labels": np.concatenate(labels).astype(np.uint8),
            }
        )

    @classmethod
    def joined(cls, parts: list[Pages]) -> Pages:
        """The scenes of several pages in order."""
        if not parts:
            return cls.of([])
        if len(parts) == 1:
            return parts[0]
        arrays = {}
        for name in ("bytes", "sizes", "boxes", "labels"):
            arrays[name] = np.concatenate([part.arrays[name] for part in parts])
        for name in ("ends", "digits"):
            steps = [np.diff(part.arrays[name]) for part in parts]
            arrays[name] = np.cumsum(np.concatenate([[0], *steps]))
        return cls(arrays)

    def __len__(self) -> int:
        return len(self.arrays["sizes"])

    def __getitem__(self, index: int) -> Encoded:
        start, middle, stop = (int(end) for end in self.arrays["ends"][2 * index : 2 * index + 3])
        first, last = (int(end) for end in self.arrays["digits"][index : index + 2])
        width, height = (int(side) for side in self.arrays["sizes"][index])
        return Encoded(
            picture=self.arrays["bytes"][start:middle].tobytes(),
            mask=self.arrays["bytes"][middle:stop].tobytes(),
            width=width,
            height=height,
            boxes=self.arrays["boxes"][first:last],
            labels=self.arrays["labels"][first:last],
        )

    def first(self, count: int) -> Pages:
        """The first `count` scenes."""
        if count == len(self):
            return self
        digits = int(self.arrays["digits"][count])
        kept = {
            "bytes": int(self.arrays["ends"][2 * count]),
            "ends": 2 * count + 1,
            "sizes": count,
            "digits": count + 1,
            "boxes": digits,
            "labels": digits,
        }
        return Pages({name: self.arrays[name][:length] for name, length in kept.items()})

    def save(self, path: Path) -> None:
        """Write the file at once: whole, or not at all."""
        save_arrays(path, self.arrays)

    @classmethod
    def load(cls, path: Path) -> Pages:
        """Read a file of `save`; one that is not whole raises `DamagedFile`."""
        pages = cls(load_arrays(path, FIELDS))
        if not pages._fit():
            raise DamagedFile(f"{path} is damaged: its arrays do not fit each other")
        return pages

    def _fit(self) -> bool:
        """Whether the arrays are of one set of scenes."""
        ends, digits = self.arrays["ends"], self.arrays["digits"]
        return (
            ends.shape == (2 * len(self) + 1,)
            and digits.shape == (len(self) + 1,)
            and len(self.arrays["bytes"]) == ends[-1]
            and len(self.arrays["boxes"]) == len(self.arrays["labels"]) == digits[-1]
        )


def decode(scene: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Picture (H, W, 3) and mask (H, W) of a scene."""
    pixels = np.asarray(Image.open(io.BytesIO(scene.picture)).convert("RGB"))
    mask = np.frombuffer(zlib.decompress(scene.mask), dtype=np.uint8)
    return pixels, mask.reshape(scene.height, scene.width)

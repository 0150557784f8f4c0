"""Street View House Numbers as published: full numbers, "format 1", from a folder."""

from __future__ import annotations

import operator
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lipguide.data.items import Annotation, Scene, make_scene
from lipguide.data.svhn.digit_struct import load_digit_struct

__all__ = ["SVHN", "PictureError"]

SPLITS = ("train", "test", "extra")
DENSEST = 8 * 1032  # pixels a byte: deflate packs 1032 bytes into one, each of eight pixels of one bit


class PictureError(ValueError):
    """A picture or a mask is damaged or foreign; the message names the file and the entry."""


@contextmanager
def _opened(path: Path, entry: int) -> Iterator[Image.Image]:
    """An open picture file of a size that it can hold; whatever goes wrong with it names the file and the entry."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            size = path.stat().st_size
            if width * height > DENSEST * size:
                raise ValueError(f"it claims {width} x {height} pixels, more than its {size} bytes can hold")
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} (entry {entry}) cannot be read, it may be truncated: {error}") from error


def _pixels(path: Path, mode: str, entry: int) -> np.ndarray:
    """Pixels of a picture file, read to its end."""
    with _opened(path, entry) as image:
        return np.asarray(image if image.mode == mode else image.convert(mode))


class SVHN(Dataset[Scene]):
    """The pictures of root/split with their digits, as `Scene`; root holds `train`, `test` or `extra` as unpacked
    from the official archives or written by `SyntheticHouseNumbers.save`, which adds masks.

    That the annotations are whole and every picture is there is checked at once; a picture is read when asked for.
    Boxes may stick out of their picture, as published: `annotation` has them so, scenes have them cut off.

    >>> import tempfile
    >>> from lipguide.data.shn import SyntheticHouseNumbers
    >>> with tempfile.TemporaryDirectory() as root:
    ...     _ = SyntheticHouseNumbers("test", size=1, cache=False).save(root)
    ...     scene = SVHN(root, "test")[0]
    >>> scene.image.shape[1:] == scene.mask.shape
    True
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.folder = Path(root) / split
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is missing: get SVHN with `python -m lipguide data svhn --root {root}`"
            )
        self.split = split
        self._digits = load_digit_struct(self.folder / "digitStruct.mat")
        self._files = {entry.name for entry in os.scandir(self.folder)}
        for number, name in enumerate(self._digits.names, start=1):
            if name not in self._files:
                raise FileNotFoundError(f"{self.folder / name} is missing (entry {number} of digitStruct.mat)")

    def __len__(self) -> int:
        return len(self._digits.names)

    def _own(self, index: int) -> tuple[str, np.ndarray, np.ndarray]:
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(f"scene {index} of a data set of {len(self)}")
        own = slice(int(self._digits.digits[index]), int(self._digits.digits[index + 1]))
        return self._digits.names[index], self._digits.boxes[own], self._digits.labels[own]

    def __getitem__(self, index: int) -> Scene:
        name, boxes, labels = self._own(index)
        pixels = _pixels(self.folder / name, "RGB", index + 1)
        return make_scene(pixels, boxes, labels, self._mask(name, index, pixels.shape[:2], len(labels)))

    def _mask(self, name: str, index: int, shape: tuple[int, int], digits: int) -> np.ndarray | None:
        beside = name.replace(".png", ".mask.png")
        if beside not in self._files:
            return None
        mask = _pixels(self.folder / beside, "L", index + 1)
        if mask.shape != shape or mask.max(initial=0) > digits:
            raise PictureError(f"{self.folder / beside} (entry {index + 1}) is not a mask of {name}")
        return mask

    def annotation(self, index: int) -> Annotation:
        """What digitStruct.mat says of a picture, and the picture's size from its header."""
        name, boxes, labels = self._own(index)
        with _opened(self.folder / name, index + 1) as image:
            width, height = image.size
        return Annotation(name, width, height, boxes, labels)

    @cached_property
    def _annotations(self) -> list[Annotation]:
        return [self.annotation(index) for index in range(len(self))]

    def annotations(self) -> list[Annotation]:
        """All annotations in order, for `geometry`."""
        return self._annotations

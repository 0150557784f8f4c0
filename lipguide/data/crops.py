"""Squares cut out of scenes, as bytes: with NumPy and Pillow alone, for processes that draw need no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["BACKGROUND", "Cutting", "cut", "inside", "number_window", "square_around", "stacked", "visible"]

BACKGROUND = 10  # class of the pixels of no digit in the class maps of `scenes`; the digits are 0 to 9
ENLARGE = 0.3  # of the square around the number, both sides together
Row = dict[str, np.ndarray]


def cut(pixels: np.ndarray, window: tuple[float, float, float, float], side: int, smooth: bool = True) -> np.ndarray:
    """The window (left, top, right, bottom) of (H, W) or (H, W, 3) uint8 pixels, scaled to side x side.

    Bicubic with anti-aliasing, or the nearest pixel if not `smooth` (for masks). Where the window sticks out, the
    picture's edge is repeated.

    >>> cut(np.full((4, 6), 7, dtype=np.uint8), (-2.0, -1.0, 4.0, 5.0), 3).tolist()
    [[7, 7, 7], [7, 7, 7], [7, 7, 7]]
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = window
    above, before = max(0, math.ceil(-top)), max(0, math.ceil(-left))
    below, after = max(0, math.ceil(bottom - height)), max(0, math.ceil(right - width))
    if above or before or below or after:
        edges = [(above, below), (before, after)] + [(0, 0)] * (pixels.ndim - 2)
        pixels = np.pad(pixels, edges, mode="edge")
    box = (left + before, top + above, right + before, bottom + above)
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), method, box=box))


def inside(boxes: np.ndarray, width: np.ndarray | int, height: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Corners in [0, 1] as float32 (n, 4) of boxes left, top, width, height in pixels, and which of them have room.

    What sticks out of the picture is cut off; a box that lies outside it altogether has no room.

    >>> corners, seen = inside(np.array([[-4, 5, 14, 10], [50, 5, 4, 10]]), 40, 20)
    >>> corners[0].tolist(), seen.tolist()
    ([0.0, 0.25, 0.25, 0.75], [True, False])
    """
    left, top, wide, tall = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T
    corners = np.stack([left / width, top / height, (left + wide) / width, (top + tall) / height], axis=1)
    corners = np.clip(corners, 0.0, 1.0)
    seen = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    return corners.astype(np.float32), seen


def visible(
    boxes: np.ndarray, labels: np.ndarray, mask: np.ndarray | None, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Corners as `inside` has them, labels and mask of the digits that have room in the picture; the others are left
    out, as no box in [0, 1] could say where they are.

    >>> visible(np.array([[50, 5, 4, 10], [4, 5, 14, 10]]), np.array([7, 2]), np.array([[0, 1, 2]]), 40, 20)[1:]
    (array([2]), array([[0, 0, 1]], dtype=uint8))
    """
    corners, seen = inside(boxes, width, height)
    if mask is not None and not seen.all():
        order = np.concatenate([[0], np.cumsum(seen) * seen]).astype(np.uint8)
        mask = order[mask]
    return corners[seen], np.asarray(labels)[seen], mask


def number_window(
    width: int, height: int, corners: np.ndarray, rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """The Tinier SSD recipe's window (left, top, side) around a number in a picture.

    The smallest square that holds all boxes slides at random along its free direction, then grows by 30 %, by half
    of that, a quarter and so on until it fits the picture. None where no square around the number fits: the recipe
    drops such scenes (3 or 4 digits across a low picture). Unlike the recipe, the slide is drawn among the positions
    that fit, so no scene is lost by chance, and nothing is dropped because a box starts at a negative coordinate.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        corners: (n, 4) xyxy in pixels.
        rng: where the slide comes from.

    >>> number_window(100, 60, np.array([[40, 20, 50, 40], [50, 20, 60, 40]]), np.random.default_rng(0))
    (37, 17, 26)
    """
    near = np.floor(corners[:, :2].min(axis=0))
    far = np.ceil(corners[:, 2:].max(axis=0))
    first, last, side = (found.astype(int).tolist() for found in square_around(near, far, np.array([width, height])))
    if last[0] < first[0] or last[1] < first[1]:
        return None
    left, top = (int(rng.integers(a, b + 1)) for a, b in zip(first, last, strict=True))
    more = round(side * ENLARGE / 2)
    while more > 1 and (min(left, top) < more or left + side + more > width or top + side + more > height):
        more //= 2
    more = more if more > 1 else 0
    return left - more, top - more, side + 2 * more


def square_around(near: np.ndarray, far: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest square around all boxes of a scene: its first and its last place in the picture, and its side.

    Where the last place comes before the first, none fits.

    Args:
        near: x and y of the corners around all boxes that are nearest to the origin, (2,) or (2, scenes).
        far: those of the opposite ones.
        sides: width and height of the picture.

    >>> [found.tolist() for found in square_around(np.array([40, 20]), np.array([60, 40]), np.array([100, 30]))]
    [[40, 20], [40, 10], 20]
    """
    side = (far - near).max(axis=0)
    return np.maximum(far - side, 0), np.minimum(near, sides - side), side


@dataclass(frozen=True)
class Cutting:
    """What is cut out of a scene.

    Args:
        view: "number" and "frame" as in `lipguide.data.scenes`, or "digits" as in `lipguide.data.digits`.
        side: of the squares, in pixels.
        seed: of the windows' random place.

    >>> pixels, corners = np.zeros((20, 40, 3), dtype=np.uint8), np.zeros((1, 4), dtype=np.float32)
    >>> row = Cutting("frame", 8).rows(pixels, corners, np.ones(1), None, 0)
    >>> row["images"].shape, row["digits"].tolist()
    ((1, 3, 8, 8), [1])
    """

    view: str
    side: int
    seed: int = 0

    def rows(
        self, pixels: np.ndarray, corners: np.ndarray, labels: np.ndarray, mask: np.ndarray | None, index: int
    ) -> Row:
        """The squares of one scene, as `stacked` joins them.

        Args:
            pixels: (H, W, 3) bytes.
            corners: (n, 4) float32, xyxy in [0, 1].
            labels: (n,) 0 to 9.
            mask: (H, W), k + 1 on the pixels of digit k; or None.
            index: of the scene; with `seed`, where its window slides to.
        """
        height, width = pixels.shape[:2]
        corners = corners.astype(np.float64) * [width, height, width, height]
        if self.view == "digits":
            return self._digits(pixels, corners, labels)
        window = self._window(width, height, corners, index)
        if window is None:
            return {}
        left, top, right, bottom = window
        shown = (corners - [left, top, left, top]) / [right - left, bottom - top, right - left, bottom - top]
        row = {
            "images": cut(pixels, window, self.side).transpose(2, 0, 1)[None],
            "boxes": np.clip(shown, 0.0, 1.0).astype(np.float32),
            "labels": np.asarray(labels, dtype=np.uint8),
            "digits": np.array([len(labels)], dtype=np.int32),
        }
        if mask is not None:
            classes = np.array([BACKGROUND, *labels], dtype=np.uint8)[mask]
            row["masks"] = cut(classes, window, self.side, smooth=False)[None]
        return row

    def _digits(self, pixels: np.ndarray, corners: np.ndarray, labels: np.ndarray) -> Row:
        """A square around every box, as high or as wide as the box is, whichever is more: nothing is distorted."""
        crops = []
        for x0, y0, x1, y1 in corners:
            side = max(x1 - x0, y1 - y0)
            left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
            crops.append(cut(pixels, (left, top, left + side, top + side), self.side).transpose(2, 0, 1))
        if not crops:
            return {}
        return {"images": np.stack(crops), "labels": np.asarray(labels, dtype=np.uint8)}

    def _window(self, width: int, height: int, corners: np.ndarray, index: int) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom in pixels of what the view shows of a scene; None if it drops it."""
        if self.view == "frame":
            return 0, 0, width, height
        if not len(corners):
            return None
        found = number_window(width, height, corners, np.random.default_rng((self.seed, index)))
        return None if found is None else (found[0], found[1], found[0] + found[2], found[1] + found[2])

    def kinds(self, rows: int, digits: int, masks: bool = True) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each array, of so many squares with so many digits in all."""
        images = {"images": ("uint8", (rows, 3, self.side, self.side)), "labels": ("uint8", (digits,))}
        if self.view == "digits":
            return images
        more = {"masks": ("uint8", (rows, self.side, self.side))} if masks else {}
        return images | more | {"boxes": ("float32", (digits, 4)), "digits": ("int32", (rows,))}


def stacked(cutting: Cutting, rows: Iterable[Row]) -> Row:
    """The squares of many scenes, one after the other: the arrays of `Cutting.kinds`.

    >>> stacked(Cutting("digits", 32), [])["images"].shape
    (0, 3, 32, 32)
    """
    kept = [row for row in rows if row]
    with_mask = sum("masks" in row for row in kept)
    if with_mask and with_mask != len(kept):
        raise ValueError(f"{with_mask} of {len(kept)} scenes have a mask: all need one, or none")
    kinds = cutting.kinds(0, 0, masks=with_mask > 0)
    if not kept:
        return {name: np.zeros(shape, dtype) for name, (dtype, shape) in kinds.items()}
    return {name: np.concatenate([row[name] for row in kept]) for name in kinds}

"""Many scenes at one look: the first thing to do with any data set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from lipguide.arguments import whole
from lipguide.data.items import Scene
from lipguide.data.windows import to_pixels

__all__ = ["contact_sheet"]

COLOURS = ((230, 60, 60), (60, 140, 255), (60, 200, 90), (250, 180, 30), (200, 80, 220), (40, 200, 210))


def _cell(scene: Scene, width: int, height: int, boxes: bool, masks: bool) -> Image.Image:
    pixels = to_pixels(scene.pixels)
    if masks and scene.mask is not None:
        tint = np.array([(0, 0, 0), *COLOURS], dtype=np.float32)[np.minimum(scene.mask.numpy(), len(COLOURS))]
        pixels = np.where(scene.mask.numpy()[..., None] > 0, 0.35 * pixels + 0.65 * tint, pixels).astype(np.uint8)
    picture = Image.fromarray(pixels)
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    if boxes:
        pen = ImageDraw.Draw(picture)
        for k, (box, label) in enumerate(zip(scene.boxes.numpy(), scene.labels.tolist(), strict=True)):
            x0, y0, x1, y1 = box * np.tile(size, 2)
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=COLOURS[k % len(COLOURS)])
            pen.text((x0 + 1, max(y0 - 10, 0)), str(label), fill=COLOURS[k % len(COLOURS)])
    return picture


def contact_sheet(
    dataset: Dataset[Scene],
    indices: Sequence[int] | None = None,
    columns: int = 10,
    cell: tuple[int, int] = (150, 70),
    boxes: bool = True,
    masks: bool = False,
) -> Image.Image:
    """Scenes side by side, each scaled into a cell.

    Args:
        indices: of the scenes; None for the first hundred.
        columns: cells in a row.
        cell: its width and height in pixels.
        boxes: draw each digit's box and label.
        masks: tint each digit's pixels.

    >>> from lipguide.data.shn import SyntheticHouseNumbers
    >>> contact_sheet(SyntheticHouseNumbers("train", size=3, cache=False), columns=2).size
    (304, 144)
    """
    indices = range(min(100, len(dataset))) if indices is None else indices
    columns = whole("columns", columns)
    cell = whole("the cell's width", cell[0]), whole("the cell's height", cell[1])
    width, height = cell[0] + 2, cell[1] + 2
    rows = math.ceil(len(indices) / columns)
    sheet = Image.new("RGB", (columns * width, max(rows, 1) * height), (255, 255, 255))
    for place, index in enumerate(indices):
        picture = _cell(dataset[index], *cell, boxes, masks)
        left = (place % columns) * width + (width - picture.width) // 2
        top = (place // columns) * height + (height - picture.height) // 2
        sheet.paste(picture, (left, top))
    return sheet

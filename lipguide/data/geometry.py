"""The geometry of any data set of scenes in the figures that are published of SVHN: how alike are the two?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from lipguide.data.facts import PERCENTILES, svhn_facts

__all__ = ["geometry", "geometry_table"]


def _percentiles(values: Iterable[float]) -> list[float]:
    array = np.asarray(list(values), dtype=float)
    return [round(float(v), 4) for v in np.percentile(array, PERCENTILES)] if len(array) else []


def geometry(annotations: Iterable[Any]) -> dict[str, Any]:
    """The figures of `svhn_facts()[split]` for annotations, which both data sets have as `dataset.annotations()`.

    Args:
        annotations: objects with width, height, boxes (n, 4) as left, top, width, height in pixels, and labels (n,)
            from 0 to 9.

    >>> from types import SimpleNamespace
    >>> one = SimpleNamespace(width=60, height=30, boxes=[[10, 5, 10, 20], [20, 5, 10, 20]], labels=[1, 0])
    >>> figures = geometry([one])
    >>> figures["digits"], figures["label_counts"]["10"], figures["image_aspect_w_over_h"][3]
    (2, 1, 2.0)
    """
    rows: dict[str, list[float]] = {name: [] for name in _ROWS}
    per_image: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    aspects: dict[str, list[float]] = {str(k): [] for k in range(1, 11)}
    for note in annotations:
        boxes = np.asarray(note.boxes, dtype=float).reshape(-1, 4)
        per_image[str(len(boxes))] += 1
        rows["image_width"].append(note.width)
        rows["image_height"].append(note.height)
        rows["image_aspect_w_over_h"].append(note.width / note.height)
        if not len(boxes):
            continue
        left, top, width, height = boxes.T
        rows["digit_height_px"].extend(height)
        rows["digit_height_over_image"].extend(height / note.height)
        rows["digit_aspect_w_over_h"].extend(width / height)
        for label, aspect in zip(note.labels, width / height, strict=True):
            name = str(int(label) or 10)
            labels[name] += 1
            aspects[name].append(aspect)
        rows["gap_between_neighbours_over_height"].extend((left[1:] - (left + width)[:-1]) / height[:-1])
        rows["vertical_shift_between_neighbours_over_height"].extend(np.diff(top) / height[:-1])
        rows["height_ratio_of_neighbours"].extend(height[1:] / height[:-1])
        right, bottom = (left + width).max(), (top + height).max()
        rows["number_width_over_image"].append((right - left.min()) / note.width)
        rows["number_centre_y_over_image"].append((top.min() + bottom) / 2 / note.height)
        rows["number_centre_x_over_image"].append((left.min() + right) / 2 / note.width)
    return {
        "images": sum(per_image.values()),
        "digits": sum(labels.values()),
        "percentiles": ",".join(map(str, PERCENTILES)),
        "digits_per_image": dict(sorted(per_image.items())),
        "label_counts": {str(k): labels[str(k)] for k in range(1, 11)},
        "median_aspect_by_label": {k: round(float(np.median(v)), 4) for k, v in aspects.items() if v},
        **{name: _percentiles(values) for name, values in rows.items()},
    }


_ROWS = (
    "image_width",
    "image_height",
    "image_aspect_w_over_h",
    "digit_height_px",
    "digit_height_over_image",
    "digit_aspect_w_over_h",
    "gap_between_neighbours_over_height",
    "vertical_shift_between_neighbours_over_height",
    "height_ratio_of_neighbours",
    "number_width_over_image",
    "number_centre_y_over_image",
    "number_centre_x_over_image",
)


def geometry_table(figures: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """One row a percentile figure: name, published percentiles, ours, and the largest difference in units of the
    published spread between the 5th and the 95th percentile.

    >>> rows = geometry_table(svhn_facts()["test"], "test")
    >>> max(row["difference"] for row in rows)
    0.0
    """
    published = svhn_facts()[split]
    rows = []
    for name in _ROWS:
        real, ours = np.array(published[name]), np.array(figures[name])
        spread = max(real[5] - real[1], 0.05)
        difference = float(np.max(np.abs(real - ours)[1:6]) / spread) if len(ours) else float("nan")
        rows.append({"figure": name, "svhn": real.tolist(), "ours": ours.tolist(), "difference": difference})
    return rows

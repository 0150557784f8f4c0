"""Where the digits of a scene stand: sizes, aspect ratios, gaps, slants and margins drawn from SVHN's own figures.

The published percentiles fix every marginal distribution; correlated normal variables (a Gaussian copula) join them.
The correlations are those that the percentiles of products imply, such as digit height = image height x ratio: a large
picture and a wide number both have more margin around them, and a large picture is a little less wide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache

import numpy as np

from lipguide.data.facts import PERCENTILES, svhn_facts

__all__ = ["Layout", "sample_layout"]

NORMAL = (-2.326348, -1.644854, -0.67449, 0.0, 0.67449, 1.644854, 2.326348)  # of PERCENTILES
SIZE_RATIO = {"train": -0.53, "test": -0.73}  # correlation of image height with digit height over image height
WIDTH_RATIO = {"train": -0.6, "test": -0.36}  # correlation of number width with digit height over image height
LOG_WIDTH = {"train": (0.1, 0.44), "test": (0.06, 0.42)}  # mean and deviation of log(number width / digit height)
LIMITS = {"image_height": (12.0, 420.0), "image_aspect_w_over_h": (1.0, 5.0)}


@dataclass(frozen=True, eq=False)
class Layout:
    """A scene's frame.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        boxes: (n, 4) integers left, top, width, height in pixels.
        labels: (n,) 0 to 9.
        slope: rise of the number line a pixel, positive downwards.

    >>> from numpy.random import default_rng
    >>> layout = sample_layout("train", default_rng(0))
    >>> len(layout.boxes) == len(layout.labels)
    True
    """

    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    slope: float


def _quantile(name: str, split: str, z: float, log: bool = False) -> float:
    """The value of a published figure at the normal score z: linear between the percentiles, and beyond them."""
    values = _values(name, split, log)
    k = min(max(bisect_left(NORMAL, z), 1), len(NORMAL) - 1)
    slope = (values[k] - values[k - 1]) / (NORMAL[k] - NORMAL[k - 1])
    value = values[k - 1] + slope * (z - NORMAL[k - 1])
    low, high = LIMITS.get(name, (-math.inf, math.inf))
    return min(max(math.exp(value) if log else value, low), high)


@cache
def _values(name: str, split: str, log: bool) -> tuple[float, ...]:
    values = svhn_facts()[split][name]
    if len(values) != len(PERCENTILES):
        raise ValueError(f"svhn_facts.json: {name} of {split} has {len(values)} percentiles, not {len(PERCENTILES)}")
    return tuple(math.log(v) for v in values) if log else tuple(values)


@cache
def _counts(split: str) -> np.ndarray:
    counts = svhn_facts()[split]["digits_per_image"]
    shares = np.array([counts.get(str(k), 0) for k in range(1, 7)], dtype=float)
    return np.cumsum(shares / shares.sum())


@cache
def _label_shares(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative shares of the labels of a first digit (never 0, small ones more often, as house numbers count from
    one) and of a later digit, such that together they give the published label counts."""
    facts = svhn_facts()[split]
    counts = np.array([facts["label_counts"][str(d or 10)] for d in range(10)], dtype=float)
    overall = counts / counts.sum()
    benford = np.array([0.0, *(math.log10(1 + 1 / d) for d in range(1, 10))])
    known = overall * (np.arange(10) > 0)
    first = 0.5 * benford + 0.5 * known / known.sum()
    digits = facts["digits"] / facts["images"]
    later = np.maximum((digits * overall - first) / (digits - 1), 0.0)
    return np.cumsum(first), np.cumsum(later / later.sum())


def _pick(cumulative: np.ndarray, u: float) -> int:
    return min(int(np.searchsorted(cumulative, u, side="right")), len(cumulative) - 1)


def _mix(rng: np.random.Generator, shared: float, weight: float) -> float:
    """A normal score of which the share `weight` of the variance is common to the whole number."""
    return math.sqrt(weight) * shared + math.sqrt(1 - weight) * float(rng.standard_normal())


def _box_widths(labels: np.ndarray, split: str, rng: np.random.Generator) -> list[float]:
    """Widths of the boxes in units of their height."""
    medians = svhn_facts()[split]["median_aspect_by_label"]
    common = float(rng.standard_normal())
    widths = []
    for label in labels:
        z = _mix(rng, common, 0.6)
        spread = 0.245 if z < 0 else 0.185  # the published figures are skewed: narrow boxes vary more
        widths.append(medians[str(int(label) or 10)] * math.exp(spread * z))
    return widths


def sample_layout(split: str, rng: np.random.Generator) -> Layout:
    """Draw one scene's frame; train and test have their own figures.

    >>> from numpy.random import default_rng
    >>> layout = sample_layout("test", default_rng(3))
    >>> bool((layout.boxes[:, 2:] > 0).all())
    True
    """
    z_size, z_ratio, z_aspect, z_x, z_y, z_gap, z_shift = (float(z) for z in rng.standard_normal(7))
    count = 1 + _pick(_counts(split), float(rng.random()))
    first, later = _label_shares(split)
    labels = np.array([_pick(later if k else first, float(rng.random())) for k in range(count)], dtype=np.int64)

    widths = _box_widths(labels, split, rng)
    gaps = [_quantile("gap_between_neighbours_over_height", split, _mix(rng, z_gap, 0.5)) for _ in labels[1:]]
    shifts = [
        _quantile("vertical_shift_between_neighbours_over_height", split, _mix(rng, z_shift, 0.8)) for _ in labels[1:]
    ]
    left = [0.0]
    for width, gap in zip(widths, gaps, strict=False):
        left.append(left[-1] + max(width + gap, 0.45 * width))
    mean, deviation = LOG_WIDTH[split]
    z_width = (math.log(left[-1] + widths[-1]) - mean) / deviation
    z_width = min(max(z_width, -2.5), 2.5)

    image_height = _quantile("image_height", split, z_size, log=True)
    on_size, on_width = SIZE_RATIO[split], WIDTH_RATIO[split]
    own = math.sqrt(1 - on_size**2 - on_width**2)
    ratio = _quantile("digit_height_over_image", split, on_size * z_size + on_width * z_width + own * z_ratio)
    height = max(image_height * min(max(ratio, 0.1), 0.96), 11.0)
    aspect = _quantile("image_aspect_w_over_h", split, -0.2 * z_size + 0.2 * z_width + 0.96 * z_aspect, log=True)

    left, widths, shifts = (height * np.array(values) for values in (left, widths, shifts))
    top = np.concatenate([[0.0], np.cumsum(shifts)])
    number_width = float(left[-1] + widths[-1])
    number_height = float(np.ptp(top)) + height

    image_height = max(image_height, number_height / 0.97, height / 0.97)
    image_width = max(image_height * aspect, number_width / 0.92)
    centre_x = _quantile("number_centre_x_over_image", split, z_x) * image_width
    centre_y = _quantile("number_centre_y_over_image", split, z_y) * image_height
    centre_x = min(max(centre_x, number_width / 2), image_width - number_width / 2)
    centre_y = min(max(centre_y, number_height / 2), image_height - number_height / 2)

    x = np.round(left + centre_x - number_width / 2)
    y = np.round(top - top.min() + centre_y - number_height / 2)
    boxes = np.stack([x, y, np.round(widths), np.full(count, round(height))], axis=1).astype(np.int64)
    run = left[-1] - left[0]
    slope = float((top[-1] - top[0]) / run) if count > 1 else 0.08 * z_shift
    return Layout(round(image_width), round(image_height), boxes, labels, slope)

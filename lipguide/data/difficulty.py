"""How hard the pictures are: four knobs, and nothing else to turn."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["Difficulty"]


@dataclass(frozen=True)
class Difficulty:
    """Knobs of Synthetic House Numbers; 1 is the default, 0 turns a nuisance off, 2 doubles it.

    blur: width of defocus, motion and resampling blur.
    contrast: how much contrast is lost, by haze and by ink that is nearly as bright as its wall (0 loses none).
    noise: deviation of the sensor's noise, and how coarse the JPEG quantisation is.
    occlusion: how often, and how far, leaves, bars, dirt, shadows and glare cover the number.

    >>> Difficulty(blur=0.5).noise
    1.0
    """

    blur: float = 1.0
    contrast: float = 1.0
    noise: float = 1.0
    occlusion: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and 0.0 <= value <= 4.0):
                raise ValueError(f"Difficulty.{field.name} must be between 0 and 4, not {value}")

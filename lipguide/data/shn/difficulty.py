"""How hard the pictures are: four knobs, and nothing else to turn."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

__all__ = ["Difficulty"]


@dataclass(frozen=True)
class Difficulty:
    """Knobs of Synthetic House Numbers; 0 turns a nuisance off, 1 is as much as was first drawn, 2 twice that.

    The defaults are calibrated for SHN 1: a detector trained on it scores about as on SVHN, clean and attacked (chapter
    `house-numbers`). The later versions are drawn with the same ones.

    Args:
        blur: width of defocus, motion and resampling blur.
        contrast: how much contrast is lost, by haze and by ink that is nearly as bright as its wall (0 loses none).
        noise: deviation of the sensor's noise, and how coarse the JPEG quantisation is.
        occlusion: how often, and how far, leaves, bars, dirt, shadows and glare cover the number.

    >>> Difficulty(blur=0.5).noise
    2.0
    """

    blur: float = 0.8
    contrast: float = 0.4
    noise: float = 2.0
    occlusion: float = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, Real) and 0.0 <= value <= 4.0):  # NaN is not either
                raise ValueError(f"Difficulty.{field.name} must be a number between 0 and 4, not {value!r}")

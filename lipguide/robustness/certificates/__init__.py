"""Certificates: how far a picture may move before its label can change, from one forward pass.

`radii` has the formula and its proof, `local` a larger radius where the last block allows one, `dual` proves more balls
of such networks, one distance at a time, `pairs` looks through the sorted pairs below the block as well, `pixels` has
what the formula says of all pixels at once, `conditions` looks after what the proof takes for granted, and `hunt`
attacks what it says. Every certificate is about exact arithmetic: see `radius`.
"""

from lipguide.robustness.certificates.conditions import checked_logits
from lipguide.robustness.certificates.dual import holds_within
from lipguide.robustness.certificates.hunt import Hunt, hunt
from lipguide.robustness.certificates.local import local_radius
from lipguide.robustness.certificates.pixels import (
    ClassAttacks,
    certified_miou,
    certified_pixel_accuracy,
    certified_pooled_miou,
    class_attacks,
)
from lipguide.robustness.certificates.radii import certified_accuracy, radius

__all__ = [
    "ClassAttacks",
    "Hunt",
    "certified_accuracy",
    "certified_miou",
    "certified_pixel_accuracy",
    "certified_pooled_miou",
    "checked_logits",
    "class_attacks",
    "holds_within",
    "hunt",
    "local_radius",
    "radius",
]

"""Detection of house numbers: single-shot detectors, ordinary and 1-Lipschitz, their losses, scores and attacks."""

from lipguide.tasks.detection import (
    attacks,
    boxes,
    certificates,
    configurations,
    decision,
    fcos,
    losses,
    pyramid,
    reader,
    scores,
    tinier_ssd,
)

__all__ = [
    "attacks",
    "boxes",
    "certificates",
    "configurations",
    "decision",
    "fcos",
    "losses",
    "pyramid",
    "reader",
    "scores",
    "tinier_ssd",
]

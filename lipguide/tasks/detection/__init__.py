"""Detection of house numbers: single-shot detectors, ordinary and 1-Lipschitz, their losses, scores and attacks."""

from lipguide.tasks.detection import attacks, boxes, configurations, fcos, losses, tinier_ssd
from lipguide.tasks.detection import scores as evaluate

__all__ = ["attacks", "boxes", "configurations", "evaluate", "fcos", "losses", "tinier_ssd"]

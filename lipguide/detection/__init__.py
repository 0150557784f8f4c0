"""Detection of house numbers: single-shot detectors, ordinary and 1-Lipschitz, their losses, scores and attacks."""

from lipguide.detection import attacks, boxes, configurations, evaluate, fcos, losses, tinier_ssd

__all__ = ["attacks", "boxes", "configurations", "evaluate", "fcos", "losses", "tinier_ssd"]

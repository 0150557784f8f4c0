"""A report: what is certified of some scenes, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence

from lipguide.tasks.detection.boxes import Targets
from lipguide.tasks.detection.certificates.answers import Answers
from lipguide.tasks.detection.certificates.summary import (
    Certificate,
    certified_ap,
    certified_precision,
    certified_recall,
    certify,
)

__all__ = ["curve", "row"]


def curve(given: Answers, targets: Targets, grid: Sequence[float], least: float = 0.0) -> list[dict[str, float]]:
    """One row for each eps of a grid, as `row` has it.

    Args:
        given: as `answers` gives them.
        targets: the objects of the same scenes.
        grid: of eps, L2 norms.
        least: the detector's threshold.

    >>> import torch
    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> box = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    >>> one = torch.ones(1)
    >>> given = Answers(torch.tensor([[[0.9]]]), box[None], torch.ones(1, 1).bool(), 1.0, 0.1 * one, one)
    >>> rows = curve(given, pad_targets([box], [torch.tensor([0])]), [0.5, 1.0])
    >>> [(row["eps"], row["found"], row["ap"]) for row in rows]
    [(0.5, 100.0, 100.0), (1.0, 0.0, 0.0)]
    """
    scenes = len(targets.labels)
    return [row(certify(given, targets, eps, least), scenes) for eps in grid]


def row(certificate: Certificate, scenes: int) -> dict[str, float]:
    """What a certificate says of `scenes` scenes.

    In per cent: read, objects that some right window surely speaks for, before suppression; found, after it; precision
    and ap, which no attack undercuts; ap_of_all, the same with all possible detections in the denominator. possible and
    alarms: bounds of all detections a scene, and of the false ones.
    """
    least = certificate.least
    read = float((certificate.before > least).double().mean()) if len(certificate.before) else 0.0
    return {
        "eps": certificate.eps,
        "read": 100 * read,
        "found": certified_recall(certificate),
        "precision": certified_precision(certificate),
        "ap": certified_ap(certificate),
        "ap_of_all": certified_ap(certificate, of_all=True),
        "possible": int((certificate.births > least).sum()) / max(scenes, 1),
        "alarms": int((certificate.alarms > least).sum()) / max(scenes, 1),
    }

"""Certificates of a detector: which objects are found, and how many false alarms there are, whatever the attack."""

from lipguide.tasks.detection.certificates.answers import Answers, answers
from lipguide.tasks.detection.certificates.summary import (
    Certificate,
    certified_ap,
    certified_precision,
    certified_recall,
    certify,
    object_radii,
)

__all__ = [
    "Answers",
    "Certificate",
    "answers",
    "certified_ap",
    "certified_precision",
    "certified_recall",
    "certify",
    "object_radii",
]

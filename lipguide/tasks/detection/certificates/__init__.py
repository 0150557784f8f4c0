"""Certificates of a detector: which objects are found, and how many false alarms there are, whatever the attack."""

from lipguide.tasks.detection.certificates.answers import Answers, answers
from lipguide.tasks.detection.certificates.curve import curve
from lipguide.tasks.detection.certificates.hunt import hunt
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
    "curve",
    "hunt",
    "object_radii",
]

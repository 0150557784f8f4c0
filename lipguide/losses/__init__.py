"""The losses that turn the dial between accuracy and robustness.

All are called like torch's own, `loss(logits, target)`, with `reduction` "mean", "sum" or "none". Categorical losses
take `(N, C)` logits with `(N,)` class indices, or pixel-wise `(N, C, H, W)` with `(N, H, W)`, and skip `ignore_index`.
`lipguide.losses.base` says what they share: checks, empty batches, batches split over processes.

Notation: f(x) are the logits, y the right class, m the margin, tau a temperature, C the number of classes.
"""

from lipguide.losses.binary import HKR, KR, HingeMargin, TauBCEWithLogits
from lipguide.losses.local import local_logits, local_slopes
from lipguide.losses.multiclass import (
    EMMA,
    CategoricalHinge,
    CosineSimilarity,
    LogitAnnealing,
    MulticlassHinge,
    MulticlassHKR,
    MulticlassKR,
    MulticlassLseHKR,
    MulticlassSoftHKR,
    MultiMargin,
    OffsetCrossEntropy,
    TauCrossEntropy,
    TauFocal,
)

__all__ = [
    "EMMA",
    "HKR",
    "KR",
    "CategoricalHinge",
    "CosineSimilarity",
    "HingeMargin",
    "LogitAnnealing",
    "MultiMargin",
    "MulticlassHKR",
    "MulticlassHinge",
    "MulticlassKR",
    "MulticlassLseHKR",
    "MulticlassSoftHKR",
    "OffsetCrossEntropy",
    "TauBCEWithLogits",
    "TauCrossEntropy",
    "TauFocal",
    "local_logits",
    "local_slopes",
]

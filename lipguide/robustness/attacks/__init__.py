"""Attacks in plain PyTorch: projected gradient ascent in the L2 and the L-infinity ball, and everyday corruptions.

Each takes `(model, x, y, strength)` with pixels in [0, 1] and returns pictures of the same shape, still in [0, 1]: of
all points that it visits, the clean picture included, the one that hurts each sample most, so an early success is never
lost. The model is attacked as it stands (call `eval()` first) and its parameters' gradients are left alone. A model
that answers NaN is an error, for every comparison with NaN is lost. Randomness comes from `generator`, by default one
with seed 0: the same call gives the same pictures.

An attack finds an upper bound of the robust accuracy, a certificate a lower one. A weak attack looks just like a robust
model, so an objective with vanishing gradients is announced by a warning.
"""

from lipguide.robustness.attacks.corruptions import blur, brightness, contrast, noise
from lipguide.robustness.attacks.curve import least_norm_l2, robust_accuracy_curve
from lipguide.robustness.attacks.objectives import margin, rescaled_cross_entropy
from lipguide.robustness.attacks.pgd import BlindAttack, pgd_l2, pgd_linf

__all__ = [
    "BlindAttack",
    "blur",
    "brightness",
    "contrast",
    "least_norm_l2",
    "margin",
    "noise",
    "pgd_l2",
    "pgd_linf",
    "rescaled_cross_entropy",
    "robust_accuracy_curve",
]

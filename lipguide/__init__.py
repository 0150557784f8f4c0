"""lipguide: 1-Lipschitz neural networks, an executable book and the small PyTorch package behind it."""

from lipguide.affine import aol, clip, constrain_, frobenius, l2_normalized, orthogonal, spectral, unit_rows

__version__ = "0.1.0"

__all__ = [
    "aol",
    "clip",
    "constrain_",
    "frobenius",
    "l2_normalized",
    "orthogonal",
    "spectral",
    "unit_rows",
]

"""lipguide: 1-Lipschitz neural networks, an executable book and the small PyTorch package behind it.

Layers and bounds are there at once. The other rooms (`lip.losses`, `lip.attacks`, `lip.data`, …) are imported when they
are first asked for: a layer needs torch and nothing else.
"""

from importlib import import_module
from types import ModuleType

from lipguide.bounds import Unbounded, lipschitz_bound, lipschitz_lower_bound, most_stretched_pair, stretch
from lipguide.export import export
from lipguide.layers.activations import FullSort, GroupSort, GroupSort2, Householder, MaxMin, MaxMinDouble
from lipguide.layers.affine import aol, clip, constrain_, frobenius, l2_normalized, orthogonal, spectral, unit_rows
from lipguide.layers.blocks import BatchCentering, Concat, PadChannels, Patches, Residual
from lipguide.layers.pooling import (
    GlobalAvgPool2d,
    GlobalL2NormPool2d,
    InvertibleDownSampling,
    InvertibleUpSampling,
    ScaledAvgPool2d,
    ScaledL2NormPool2d,
)
from lipguide.layers.sll import SLL, SLLLinear

__version__ = "0.1.0"

# Imported on first use, by the name under which the root offers them.
_ROOMS = {
    "attacks": "lipguide.robustness.attacks",
    "certificates": "lipguide.robustness.certificates",
    "classification": "lipguide.tasks.classification",
    "data": "lipguide.data",
    "detection": "lipguide.tasks.detection",
    "losses": "lipguide.losses",
    "metrics": "lipguide.robustness.metrics",
    "segmentation": "lipguide.tasks.segmentation",
    "smoothing": "lipguide.robustness.smoothing",
    "training": "lipguide.training",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(_ROOMS[name])


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "BatchCentering",
    "Concat",
    "FullSort",
    "GlobalAvgPool2d",
    "GlobalL2NormPool2d",
    "GroupSort",
    "GroupSort2",
    "Householder",
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "MaxMin",
    "MaxMinDouble",
    "PadChannels",
    "Patches",
    "Residual",
    "SLL",
    "SLLLinear",
    "ScaledAvgPool2d",
    "ScaledL2NormPool2d",
    "Unbounded",
    "aol",
    "attacks",
    "certificates",
    "classification",
    "clip",
    "constrain_",
    "data",
    "detection",
    "export",
    "frobenius",
    "l2_normalized",
    "lipschitz_bound",
    "lipschitz_lower_bound",
    "losses",
    "metrics",
    "most_stretched_pair",
    "orthogonal",
    "segmentation",
    "smoothing",
    "spectral",
    "stretch",
    "training",
    "unit_rows",
]

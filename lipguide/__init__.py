"""lipguide: 1-Lipschitz neural networks, an executable book and the small PyTorch package behind it."""

from lipguide import (
    attacks,
    certificates,
    classification,
    data,
    detection,
    losses,
    metrics,
    pretrained,
    segmentation,
    smoothing,
    training,
)
from lipguide.activations import FullSort, GroupSort, GroupSort2, Householder, MaxMin, MaxMinDouble
from lipguide.affine import aol, clip, constrain_, frobenius, l2_normalized, orthogonal, spectral, unit_rows
from lipguide.blocks import (
    SLL,
    BatchCentering,
    Concat,
    PadChannels,
    Patches,
    Residual,
    SLLLinear,
    most_stretched_pair,
    stretch,
)
from lipguide.network import Unbounded, lipschitz_bound, lipschitz_lower_bound
from lipguide.plain import export
from lipguide.pooling import (
    GlobalAvgPool2d,
    GlobalL2NormPool2d,
    InvertibleDownSampling,
    InvertibleUpSampling,
    ScaledAvgPool2d,
    ScaledL2NormPool2d,
)

__version__ = "0.1.0"

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
    "pretrained",
    "segmentation",
    "smoothing",
    "spectral",
    "stretch",
    "training",
    "unit_rows",
]

"""lipguide: 1-Lipschitz neural networks, an executable book and the small PyTorch package behind it.

    import lipguide as lip

Every name is imported when it is first asked for. So a layer needs torch and nothing else, and what draws house numbers
in processes of its own needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` does at run time, for editors and type checkers
    from lipguide import data, losses, training
    from lipguide.bounds import Unbounded, lipschitz_bound, lipschitz_lower_bound, most_stretched_pair, stretch
    from lipguide.layers.activations import FullSort, GroupSort, GroupSort2, Householder, MaxMin, MaxMinDouble
    from lipguide.layers.affine import (
        aol,
        clip,
        constrain_,
        frobenius,
        l2_normalized,
        near_identity,
        orthogonal,
        spectral,
        unit_rows,
    )
    from lipguide.layers.blocks import BatchCentering, Concat, PadChannels, Patches, Residual
    from lipguide.layers.export import export
    from lipguide.layers.pooling import (
        GlobalAvgPool2d,
        GlobalL2NormPool2d,
        InvertibleDownSampling,
        InvertibleUpSampling,
        ScaledAvgPool2d,
        ScaledL2NormPool2d,
    )
    from lipguide.layers.sll import SLL, SLLLinear
    from lipguide.robustness import attacks, certificates, metrics, smoothing
    from lipguide.tasks import classification, detection, segmentation

__version__ = "0.1.0"

# The names that are offered here, by the module that holds them.
_OFFERED = {
    "lipguide.bounds": "Unbounded lipschitz_bound lipschitz_lower_bound most_stretched_pair stretch",
    "lipguide.layers.activations": "FullSort GroupSort GroupSort2 Householder MaxMin MaxMinDouble",
    "lipguide.layers.affine": "aol clip constrain_ frobenius l2_normalized near_identity orthogonal spectral unit_rows",
    "lipguide.layers.blocks": "BatchCentering Concat PadChannels Patches Residual",
    "lipguide.layers.export": "export",
    "lipguide.layers.pooling": "GlobalAvgPool2d GlobalL2NormPool2d InvertibleDownSampling InvertibleUpSampling "
    "ScaledAvgPool2d ScaledL2NormPool2d",
    "lipguide.layers.sll": "SLL SLLLinear",
}
_HOMES = {name: home for home, names in _OFFERED.items() for name in names.split()}
# Whole modules that are offered here, by their names.
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

__all__ = sorted([*_HOMES, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        found = import_module(_ROOMS[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found  # the next time it is there
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

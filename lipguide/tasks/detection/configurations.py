"""The four configurations of the case study: what each fills Tinier SSD's macro-architecture with.

=============== =============================== ============================== ================
configuration   entry, and heads                inside                         Lipschitz bound
=============== =============================== ============================== ================
naive           convolution and batch norm      convolution, batch norm, ReLU  large
spectral-norm   1-Lipschitz convolution         the same, and GroupSort2       1 a head and map
standard conv   free convolution                SLL                            entry times head
L2-normalised   convolution of filters w / |w|  SLL                            entry times head
=============== =============================== ============================== ================

The case study does not say whether the L2 norm is that of each filter or that of the whole weight. The whole weight's
(`lip.l2_normalized`) shrinks each filter by the root of their number, and of what the heads say too little is left to
tell ten digits apart: 1,300 steps did not bring the loss below that of "background" everywhere. The study's detector
does find digits, so here it is each filter's.
"""

from __future__ import annotations

from torch import nn

from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import spectral, unit_rows
from lipguide.layers.sll import SLL
from lipguide.tasks.detection.tinier_ssd import STAGES, Parts, TinierSSD

__all__ = ["l2_normalised", "naive", "spectral_norm", "standard_conv"]


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _overlapping_pool(window: int) -> nn.Module:
    return nn.MaxPool2d(window, stride=2)


def _separate_pool(_: int) -> nn.Module:
    """Windows that overlap count a pixel up to four times, and stretch by up to 2. Those of 2x2 give the same maps."""
    return nn.MaxPool2d(2)


def _batch_normed(inputs: int, outputs: int) -> nn.Sequential:
    """Before batch norm a bias does nothing, but the public model has one."""
    return nn.Sequential(_convolution(inputs, outputs), nn.BatchNorm2d(outputs))


def _batch_normed_relu(inputs: int, outputs: int) -> nn.Sequential:
    return _batch_normed(inputs, outputs).append(nn.ReLU())


def _spectral(inputs: int, outputs: int) -> nn.Module:
    return spectral(_convolution(inputs, outputs))


def _spectral_sorted(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_spectral(inputs, outputs), GroupSort2())


def _normalised(inputs: int, outputs: int) -> nn.Module:
    return unit_rows(_convolution(inputs, outputs))


def _sll(inputs: int, outputs: int) -> nn.Module:
    if inputs != outputs:
        raise ValueError(f"SLL keeps the number of channels, but {inputs} were to become {outputs}")
    return SLL(inputs, inputs, 3)


def _of_width(width: int) -> tuple[tuple[int | str, ...], ...]:
    """The stages of the public model with one width throughout, since SLL cannot change it."""
    return tuple(tuple(item if isinstance(item, str) else width for item in stage) for stage in STAGES)


def naive() -> TinierSSD:
    """The public model, 337,968 parameters.

    >>> sum(p.numel() for p in naive().parameters())
    337968
    """
    return TinierSSD(Parts(_batch_normed_relu, _batch_normed_relu, _batch_normed, _batch_normed, _overlapping_pool))


def spectral_norm() -> TinierSSD:
    """Every layer 1-Lipschitz, heads included."""
    return TinierSSD(Parts(_spectral_sorted, _spectral_sorted, _spectral, _spectral, _separate_pool))


def standard_conv(width: int = 256) -> TinierSSD:
    """1-Lipschitz between a free entry and free heads; at width 256 it has the case study's seven million parameters.

    >>> sum(p.numel() for p in standard_conv(16).parameters())
    60944
    """
    return TinierSSD(Parts(_convolution, _sll, _convolution, _convolution, _separate_pool), _of_width(width))


def l2_normalised(width: int = 256) -> TinierSSD:
    """As `standard_conv`, with each filter of entry and heads divided by its L2 norm."""
    return TinierSSD(Parts(_normalised, _sll, _normalised, _normalised, _separate_pool), _of_width(width))

"""Random networks from bricks and plain layers, for the tests of bounds and of export."""

import torch
from hypothesis import strategies as st
from torch import nn

from lipguide.layers.activations import FullSort, GroupSort, GroupSort2, Householder, MaxMin, MaxMinDouble
from lipguide.layers.affine import aol, frobenius, orthogonal, spectral
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

# Each bounds any layer that it takes by 1; they run through every test of a constraint.
SOUND = [spectral, orthogonal, frobenius, aol]
CONSTRAINTS = {"plain": lambda layer: layer} | {fn.__name__: fn for fn in SOUND}


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight.data = value * torch.eye(4)
    return layer


class Forward(nn.Module):
    """Wraps a function so that it is a forward to be traced."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn, self.layer, self.act = fn, linear(1), nn.SiLU(inplace=True)
        self.gain = nn.Parameter(torch.tensor([1.0, -7.0, 2.0, 3.0]))

    def forward(self, x):
        return self.fn(self, x)


def restless(model: nn.Module) -> nn.Module:
    """Gives every bias, angle and running statistic a value of its own, so that none can be forgotten unnoticed."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name or "theta" in name or "log_q" in name or "running_mean" in name:
                tensor.normal_()
            elif "running_var" in name:
                tensor.uniform_(0.2, 3)
    return model.eval()


def block(kind: str, channels: int, constrain) -> nn.Module:
    blocks = {
        "sort": lambda: GroupSort(2) if channels % 4 else GroupSort(4),
        "maxmin": MaxMin,
        "householder": lambda: Householder(channels),
        "residual": lambda: Residual(
            nn.Sequential(constrain(nn.Conv2d(channels, channels, 3, padding=1)), GroupSort2())
        ),
        "sll": lambda: SLL(channels, 5, 3),
        "circular sll": lambda: SLL(channels, 5, 3, padding_mode="circular"),
        "centering": lambda: BatchCentering(channels),
        "batchnorm": lambda: nn.BatchNorm2d(channels),
        "relu": nn.ReLU,
        "concat": lambda: Concat(nn.Identity(), MaxMinDouble()),
        "l2pool": lambda: ScaledL2NormPool2d(2),
        "avgpool": lambda: ScaledAvgPool2d(2),
        "maxpool": lambda: nn.MaxPool2d(3, 2, 1),
        "torchavg": lambda: nn.AvgPool2d(2),
        "down": lambda: InvertibleDownSampling(2),
        "up": lambda: InvertibleUpSampling(2),
        "patches": lambda: Patches(nn.Sequential(constrain(nn.Conv2d(channels, channels, 1)), FullSort()), 2),
    }
    return blocks[kind]()


@st.composite
def networks(draw, side: int = 8, depth: int = 5):
    """A network in eval mode and the shape of one input."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    constrain = CONSTRAINTS[draw(st.sampled_from(sorted(CONSTRAINTS)))]
    layers, shape = [PadChannels(4)], (2, side, side)
    channels = 4
    for _ in range(draw(st.integers(1, depth))):
        kinds = ["conv", "sort", "maxmin", "householder", "residual", "sll", "circular sll", "centering", "batchnorm"]
        kinds += ["relu", "concat"]
        if side >= 4 and side % 2 == 0:
            kinds += ["l2pool", "avgpool", "maxpool", "down", "torchavg", "patches"]
        if channels % 4 == 0 and side <= 4:
            kinds.append("transposed")
        if channels % 8 == 0 and side <= 4:  # a quarter of the channels is left, and activations take them in pairs
            kinds.append("up")
        kind = draw(st.sampled_from(kinds)) if channels <= 16 else "conv"
        if kind == "conv":
            wide, mode = draw(st.sampled_from([4, 6, 8])), draw(st.sampled_from(["zeros", "circular"]))
            layers.append(constrain(nn.Conv2d(channels, wide, 3, padding=1, padding_mode=mode)))
            channels = wide
        elif kind == "transposed":
            layers.append(constrain(nn.ConvTranspose2d(channels, 4, 2, stride=2)))
            channels, side = 4, side * 2
        else:
            layers.append(block(kind, channels, constrain))
            channels = {"down": channels * 4, "up": channels // 4, "concat": channels * 3}.get(kind, channels)
            halved = kind in ("l2pool", "avgpool", "maxpool", "torchavg", "down")
            side = side // 2 if halved else side * 2 if kind == "up" else side
    ending = draw(st.sampled_from([None, GlobalL2NormPool2d, GlobalAvgPool2d]))
    if ending:
        layers.append(ending())
        side = 1
    features = channels * side**2
    layers += [nn.Flatten(), SLLLinear(features, 3), constrain(nn.Linear(features, 5))]
    return restless(nn.Sequential(*layers)), shape

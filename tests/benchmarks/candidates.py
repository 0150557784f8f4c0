"""The same convolution, plain and under each constraint, of lipguide and of its peers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from deel.torchlip import SpectralConv2d
from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
from torch import nn

from lipguide.layers.activations import GroupSort2
from lipguide.layers.affine import aol, clip, frobenius, l2_normalized, orthogonal, spectral, unit_rows
from lipguide.layers.export import export, without_parametrizations
from lipguide.layers.pooling import ScaledL2NormPool2d
from lipguide.layers.sll import SLL
from lipguide.recorded import WARM_UP, Recorded, can_record

OURS = {
    "spectral": spectral,
    "orthogonal": orthogonal,
    "aol": aol,
    "frobenius": frobenius,
    "clip": partial(clip, limit=0.1),
    "unit_rows": unit_rows,
    "l2_normalized": l2_normalized,
}
PEERS = {"torchlip Spectral": SpectralConv2d, "orthogonium AOC": AdaptiveOrthoConv2d}


def layers(channels: int, device: str) -> dict[str, nn.Module]:
    """A 3×3 convolution that keeps channels and size, in each of its forms."""
    torch.manual_seed(0)
    # Twice plain: the ratio of the second to the first is nothing but noise, and says how much of it there is.
    made = {name: nn.Conv2d(channels, channels, 3, padding=1) for name in ("plain", "plain, again")}
    made |= {name: constrain(nn.Conv2d(channels, channels, 3, padding=1)) for name, constrain in OURS.items()}
    made |= {name: peer(channels, channels, 3, padding=1, padding_mode="zeros") for name, peer in PEERS.items()}
    return {name: layer.to(device) for name, layer in made.items()}


class ResidualBlock(nn.Module):
    """x + f(x) with two free convolutions: what an SLL block stands beside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(self.first(x)))


def blocks(channels: int, device: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {name: ResidualBlock(channels) for name in ("plain residual", "plain residual, again")}
    made["SLL"] = SLL(channels, channels, 3)
    made["SLL, random filters"] = SLL(channels, channels, 3)  # whose norm depends on the frequency
    nn.init.normal_(made["SLL, random filters"].parametrizations.weight.original)
    return {name: block.to(device) for name, block in made.items()}


def exported(made: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What each library hands over for inference; orthogonium has no export, so its weight is made plain here."""
    return {
        name: layer.eval().vanilla_export().eval()
        if name == "torchlip Spectral"
        else without_parametrizations(layer)
        if name == "orthogonium AOC"
        else export(layer)
        for name, layer in made.items()
    }


def training_step(layer: nn.Module, x: torch.Tensor, precision: torch.dtype = torch.float32) -> Callable[[], None]:
    """Forward, backward and an update, with a gradient for the input as every layer but the first needs one."""
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = x.clone().requires_grad_()
    direction = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            y = layer(x)
        y.backward(direction.to(y.dtype))
        optimizer.step()

    return step


def recorded(step: Callable[[], None], device: str) -> Callable[[], None]:
    """The step as `lip.fit(..., recorded=True)` makes it: on a GPU one graph, recorded before anything is timed."""
    if not can_record(torch.device(device)):
        return step
    graph = Recorded(step, torch.device(device))
    for _ in range(WARM_UP + 1):
        graph()
    return graph


def inference_step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode():
            layer(x)

    return step


def vgg(constrain: Callable[[nn.Module], nn.Module] = nn.Sequential, logits: int = 10) -> nn.Sequential:
    """32-32-pool-64-64-pool-128-128-pool-head for pictures of 32×32."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs in [(3, 32), (32, 64), (64, 128)]:
        for a, b in [(inputs, outputs), (outputs, outputs)]:
            parts += [constrain(nn.Conv2d(a, b, 3, padding=1)), GroupSort2()]
        parts.append(ScaledL2NormPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), constrain(nn.Linear(128 * 16, logits)))

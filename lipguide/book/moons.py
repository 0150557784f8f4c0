"""The two small networks of the start page: trained here, put on record, and handed to the page with their weights.

    python -m lipguide.book.moons

writes `book/_static/moons-data.js`, in which the page finds the weights and evaluates them itself, and the record
`book/results/moons.cpu.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import lipguide as lip
from lipguide.book.ledger import Ledger
from lipguide.files import replacing

__all__ = ["described", "main", "trained", "two_moons"]

WIDTH = 48
SEED = 0


def two_moons(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half circles of radius 1 around (0, 0) and (1, 0.5), the second upside down; labels are -1 and 1."""
    angle = torch.pi * torch.rand(points, generator=generator)
    label = torch.randint(0, 2, (points,), generator=generator) * 2 - 1
    up = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(label[:, None] > 0, up, torch.tensor([1.0, 0.5]) - up)
    return x + 0.06 * torch.randn(points, 2, generator=generator), label.float()


def trained(network: nn.Module, x: Tensor, y: Tensor, steps: int = 400) -> nn.Module:
    """Fit the hinge, which asks every point for y·f of at least 0.3."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = (0.3 - y * network(x).squeeze(1)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def described(network: nn.Module) -> list[dict[str, list]]:
    """The dense layers of a network as they multiply, for a page without torch.

    >>> described(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))[0].keys()
    dict_keys(['weight', 'bias'])
    """
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    return [{"weight": _rounded(layer.weight), "bias": _rounded(layer.bias)} for layer in layers]


def _rounded(values: Tensor) -> list:
    return (
        [[float(f"{v:.6g}") for v in row] for row in values.tolist()]
        if values.dim() == 2
        else [float(f"{v:.6g}") for v in values.tolist()]
    )


def main(book: Path) -> int:
    """Train both networks and write what the page needs."""
    ledger = Ledger("moons", "cpu", "cpu", SEED, folder=book / "results")
    x, y = two_moons(600, torch.Generator().manual_seed(SEED))
    torch.manual_seed(SEED)
    ordinary = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    lipschitz = nn.Sequential(
        lip.orthogonal(nn.Linear(2, WIDTH)),
        lip.GroupSort2(),
        lip.orthogonal(nn.Linear(WIDTH, WIDTH)),
        lip.GroupSort2(),
        lip.orthogonal(nn.Linear(WIDTH, 1)),
    )
    new_x, new_y = two_moons(400, torch.Generator().manual_seed(SEED + 1))
    networks = {}
    for name, network in {"ordinary": ordinary, "lipschitz": lipschitz}.items():
        trained(network, x, y)
        networks[name] = described(network)
        scores = network(new_x).squeeze(1).detach()
        ledger[f"{name}.accuracy"] = 100 * (scores.sign() == new_y).float().mean()
        ledger[f"{name}.bound"] = lip.lipschitz_bound(network, (2,)).value
    ledger.save()
    _write(book / "_static" / "moons-data.js", networks, x[:240], y[:240], ledger)
    return 0


def _write(path: Path, networks: dict, x: Tensor, y: Tensor, ledger: Ledger) -> None:
    bound = ledger["lipschitz.bound"]
    data = {
        "networks": networks,
        "bound": bound,
        "points": [[*p, t] for p, t in zip(_rounded(x), y.tolist(), strict=True)],
    }
    text = json.dumps(data, separators=(",", ":"))
    with replacing(path) as temporary:
        temporary.write_text(f"// written by python -m lipguide.book.moons\nconst MOONS = {text};\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path("book")))

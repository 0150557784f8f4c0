"""The bounds after training of the chapter `frontier`: its walk from ball to ball, and what its run has on record."""

import ast
import math

import pytest
import torch
from torch import nn

import lipguide as lip
from lipguide.book.ledger import read
from tests.book.test_book import BOOK, code_cells

RESULTS = read(BOOK.ledger("frontier", "quick"))["results"]


def cells_names(**names):
    """The functions of the cell that walks, over the given pictures and network."""
    (cell,) = (cell for cell in code_cells("frontier") if "def from_ball_to_ball(" in cell.source)
    functions = [node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]
    names |= {"torch": torch, "certificates": lip.certificates, "trunk": 1.0}
    exec(compile(ast.Module(functions, []), "frontier", "exec"), names)
    return names


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("change", ["brighter", "contrasted"])
def test_a_walk_ends_before_the_label_changes_and_goes_further_than_one_ball(change, sign):
    """On a plane that looks at one pixel and on brightness a little, with a grid as the judge."""
    g = torch.Generator().manual_seed(0)
    x, w = 0.3 + 0.4 * torch.rand(30, 1, 2, 2, generator=g), torch.tensor([1.0, 0.3, -0.2, 0.5])
    plane = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        plane[1].weight.copy_(torch.stack([w, -w]))
        plane[1].bias.copy_(torch.tensor([-0.8, 0.8]))
    y = plane(x.double()).argmax(1)
    names = cells_names(x=x, shown=x, named=y, plain=plane, rows=plane[1].weight.detach())
    length = 2.0 if change == "brighter" else (x - 0.5).flatten(1).norm(dim=1)
    ball, way = names["from_ball_to_ball"](names[change], length, sign, 0.5)
    assert (way >= ball).all() and (way > 1.2 * ball).any()
    for s in torch.linspace(0, 0.5, 101, dtype=torch.float64):
        kept = plane(names[change](x.double(), sign * s)).argmax(1) == y
        assert kept[way >= s].all()


def test_changes_are_no_longer_than_their_length():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(20, 3, 4, 4, generator=g)
    names = cells_names(x=x)
    for s in (-0.3, 0.05, 0.4):
        brighter, contrasted = (names[k](x, s) - x for k in ("brighter", "contrasted"))
        assert brighter.norm() <= abs(s) * math.sqrt(x.numel()) + 1e-5
        assert (contrasted.flatten(1).norm(dim=1) <= abs(s) * (x - 0.5).flatten(1).norm(dim=1) + 1e-5).all()


def test_what_is_on_record_holds_together():
    for everywhere, near in RESULTS["local"]["certified"].values():
        assert near >= everywhere
    assert RESULTS["local.fallen"] == 0 < RESULTS["local.attacked"]
    for said in (RESULTS["said"][change] for change in ("brightness", "contrast")):
        assert said["ball"] <= said["walk"] <= said["held"] and said["refuted"] == 0

"""A brick written by the documented protocol and nothing else has its bound, its row and its export."""

import copy

import pytest
import torch
from torch import nn

import lipguide as lip
from lipguide.layers.brick import Brick


class PNormPool(nn.Module):
    """y = ‖window‖_p over windows of k pixels: 1-Lipschitz in the L2 norm for p ≥ 2."""

    def __init__(self, k: int, p: float) -> None:
        super().__init__()
        self.k, self.p = k, p

    def forward(self, x):
        if x.dim() != 3:  # what a graph cannot hold
            raise ValueError("give it (N, C, L)")
        return torch.linalg.vector_norm(x.unflatten(2, (-1, self.k)), self.p, 3)

    def lipschitz(self, constant, through):
        return constant * max(1.0, self.k ** (1 / self.p - 1 / 2))

    def plain(self):
        return PlainPNormPool(self.k, self.p)


class PlainPNormPool(nn.Module):
    def __init__(self, k: int, p: float) -> None:
        super().__init__()
        self.k = k
        self.p = p

    def forward(self, x):
        return torch.linalg.vector_norm(x.unflatten(2, (-1, self.k)), self.p, 3)

    def lipschitz(self, constant, through):
        return constant


class Weighted(Brick):
    """y = w f(x) with a weight of its own."""

    def __init__(self, part: nn.Module, weight: float) -> None:
        super().__init__()
        self.part, self.weight = part, nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        y = self.part(x)
        assert y.shape == x.shape
        return self.weight * y

    def lipschitz(self, constant, through):
        return self.weight.abs().item() * through(self.part, constant)

    def plain(self):
        return PlainWeighted(self.part, self.weight)


class PlainWeighted(Weighted):
    def __init__(self, part: nn.Module, weight: nn.Parameter) -> None:
        super().__init__(part, 1.0)
        self.weight = weight

    def forward(self, x):
        return self.weight * self.part(x)

    def lipschitz(self, constant, through):
        return self.weight.abs().item() * through(self.part, constant)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(lip.spectral(nn.Linear(8, 6)), PNormPool(2, 3), Weighted(lip.MaxMin(), -0.5)).eval()


def test_a_brick_of_ones_own_has_its_bound_its_row_and_its_export():
    model, x = network(), torch.randn(3, 2, 8)
    bound = lip.lipschitz_bound(model, (2, 8))
    assert bound.value == pytest.approx(0.5, rel=1e-5)
    assert [row.kind for row in bound.layers] == ["Linear (Spectral)", "PNormPool", "MaxMin", "Weighted"]
    assert [row.lipschitz for row in bound.layers] == pytest.approx([1, 1, 1, 0.5], rel=1e-5)

    plain = lip.export(model)
    torch.testing.assert_close(plain(x), model(x))
    kinds = {kind for part in plain.modules() for kind in type(part).__mro__}
    assert all(kind.__module__.split(".")[0] in ("torch", "builtins") for kind in kinds)
    again = lip.lipschitz_bound(plain, (2, 8))
    assert again.value <= bound.value * 1.001
    assert [row.kind for row in again.layers] == ["Linear", "PNormPool", "MaxMin", "Weighted"]


def test_its_export_is_bounded_with_the_weights_that_it_has_now(tmp_path):
    plain = lip.export(network())
    with torch.no_grad():
        plain[2].weight.mul_(6)
    for exported in (plain, copy.deepcopy(plain)):
        assert lip.lipschitz_bound(exported, (2, 8)).value == pytest.approx(3, rel=1e-2)
    torch.save(plain, tmp_path / "plain.pt")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=False)
    assert lip.lipschitz_bound(loaded, (2, 8)).value == pytest.approx(3, rel=1e-2)


def test_changed_code_is_followed_as_it_is_now():
    plain = lip.export(nn.Sequential(Weighted(nn.Identity(), 0.5)))
    (product,) = (node for node in plain[0].graph.nodes if node.op == "call_function")
    with plain[0].graph.inserting_after(product):
        twice = plain[0].graph.call_function(torch.add, (product, product))
    plain[0].graph.output_node().args = (twice,)
    plain[0].recompile()
    assert lip.lipschitz_bound(plain, (4,)).value == pytest.approx(1)


def test_what_plain_returns_must_be_a_module_that_can_be_traced():
    class Nothing(PNormPool):
        def plain(self):
            return None

    class Branching(PNormPool):
        def plain(self):
            return PNormPool(self.k, self.p)

    with pytest.raises(TypeError, match=r"plain\(\) of 0 returned a NoneType"):
        lip.export(nn.Sequential(Nothing(2, 3)))
    with pytest.raises(TypeError, match="0 is a Branching .* cannot be traced"):
        lip.export(nn.Sequential(Branching(2, 3)))

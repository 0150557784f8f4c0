"""The bricks that the chapter `frontier` builds in its cells, held to what their text says of them."""

import ast
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lipguide as lip
from lipguide.layers.orthogonal import orthonormal
from tests.book.test_book import code_cells

WANTED = {"BlockReflector", "Cholesky", "FrequencyReflector", "HalfAbs", "Shift", "ShiftBlock", "linear_residual"}


def _bricks():
    """The classes and functions of the chapter's cells, without what the cells do with them."""
    names = {"torch": torch, "nn": nn, "lip": lip, "parametrize": parametrize}
    for cell in code_cells("frontier"):
        tree = ast.parse(cell.source)
        kept = [node for node in tree.body if getattr(node, "name", None) in WANTED | {"forward", "lipschitz"}]
        kept += [node for node in tree.body if "ShiftBlock.forward" in ast.unparse(node) and node not in kept]
        exec(compile(ast.Module(kept, []), "frontier", "exec"), names)
    return {name: names[name] for name in WANTED}


BRICKS = _bricks()


def dense(outputs, inputs, constraint):
    layer = nn.Linear(inputs, outputs)
    parametrize.register_parametrization(layer, "weight", BRICKS[constraint]())
    return layer


def singular_values(layer, shape):
    x = torch.randn(1, *shape)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    return torch.linalg.svdvals(jacobian.reshape(-1, x.numel()).double())


def trained(layer, shape):
    """The layer after steps far too long, which stretch pairs of inputs."""
    optimizer = torch.optim.SGD(layer.train().parameters(), lr=3.0)
    for _ in range(10):
        a, b = torch.randn(2, 8, *shape)
        loss = -(layer(a) - layer(b)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.eval()


def some_brick(kind, seed):
    """A brick of a shape drawn at random, and the shape of its input."""
    torch.manual_seed(seed)
    side, other, few, many = (int(torch.randint(low, high, ())) for low, high in [(3, 8), (3, 8), (2, 7), (7, 13)])
    even = 2 * few
    return {
        "reflector, square": lambda: (dense(many, many, "BlockReflector"), (many,)),
        "reflector, wide": lambda: (dense(few, many, "BlockReflector"), (many,)),
        "reflector, tall": lambda: (dense(many, few, "BlockReflector"), (few,)),
        "Cholesky, wide": lambda: (dense(few, many, "Cholesky"), (many,)),
        "Cholesky, tall": lambda: (dense(many, few, "Cholesky"), (few,)),
        "by frequency": lambda: (BRICKS["FrequencyReflector"](even), (even, side, other)),
        "linear residual": lambda: (BRICKS["linear_residual"](few), (few, side, other)),
        "shift": lambda: (BRICKS["Shift"](), (8 * few, side, other)),
        "shift block": lambda: (BRICKS["ShiftBlock"](8, side), (8, side, side)),
    }[kind]()


ISOMETRIES = ["reflector, square", "Cholesky, tall", "by frequency", "shift", "shift block"]
KINDS = [*ISOMETRIES, "reflector, wide", "reflector, tall", "Cholesky, wide", "linear residual"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_brick_stretches_before_or_after_a_wild_training(kind, seed):
    layer, shape = some_brick(kind, seed)
    for brick in (layer.eval(), trained(layer, shape) if list(layer.parameters()) else layer):
        values = singular_values(brick, shape)
        assert values.max() <= 1 + 1e-5
        if kind in ISOMETRIES:
            assert values.min() >= 1 - 1e-5
        bound = lip.lipschitz_bound(brick, shape).value
        assert values.max() - 1e-5 <= bound <= 1 + 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_export_computes_the_same(kind):
    layer, shape = some_brick(kind, 5)
    plain, x = lip.export(layer.eval()), torch.randn(2, *shape)
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=1e-6)
    assert not any(parametrize.is_parametrized(part) for part in plain.modules())


@pytest.mark.parametrize("seed", range(3))
def test_reflector_is_the_mirror_of_the_published_formula(seed):
    torch.manual_seed(seed)
    raw = torch.randn(9, 9)
    w = BRICKS["BlockReflector"]()(raw).double()
    basis = torch.linalg.svd(raw[:, :4].double(), full_matrices=False).U  # what V spans
    mirror = torch.eye(9, dtype=torch.float64) - 2 * basis @ basis.mT
    torch.testing.assert_close(w, mirror, rtol=0, atol=1e-5)
    assert round(w.trace().item(), 4) == 9 - 2 * 4


def test_cholesky_gives_the_factor_of_qr():
    torch.manual_seed(0)
    for shape in ((7, 7), (9, 4), (4, 9)):
        raw = torch.randn(shape)
        torch.testing.assert_close(BRICKS["Cholesky"]()(raw), orthonormal(raw), rtol=0, atol=1e-4)


def test_by_frequency_equals_the_matrix_over_all_pixels():
    torch.manual_seed(0)
    layer = BRICKS["FrequencyReflector"](4).eval()
    x = torch.randn(1, 4, 5, 4)
    matrix = torch.autograd.functional.jacobian(layer, x).reshape(80, 80).double()
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-5)  # a mirror, as a whole
    torch.testing.assert_close(matrix @ matrix, torch.eye(80, dtype=torch.float64), rtol=0, atol=1e-4)


def test_half_of_the_absolute_values_are_maxmin_in_other_coordinates():
    x = torch.randn(50, 2)
    mirror = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    swapped = (x @ mirror).flip(1)  # the difference first: HalfAbs folds the first half
    folded = BRICKS["HalfAbs"]()(swapped).flip(1) @ mirror
    torch.testing.assert_close(folded, x.sort(1, descending=True).values)

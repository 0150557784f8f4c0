"""The local radius: never below `radius`, never above the true distance to another class, and no attack inside it."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import lipguide as lip
from lipguide.robustness.certificates import local, local_radius, radius
from lipguide.robustness.certificates.block import Block
from lipguide.tasks import TEST_SEED, trained
from lipguide.tasks.classification.data import pictures
from tests.robustness.common import generator


def tiny(seed: int, inputs: int = 2, inner: int = 4, classes: int = 3, scale: float = 0.7) -> nn.Sequential:
    """A rotation, an SLL block with free V of norm ≤ `scale` and biases that put kinks near, and a head."""
    g = generator(seed)
    torch.manual_seed(seed)
    below = lip.orthogonal(nn.Linear(inputs, inputs))
    block = lip.SLLLinear(inputs, inner, iterations=0)
    torch.nn.utils.parametrize.remove_parametrizations(block, "weight")
    model = nn.Sequential(nn.Flatten(), below, block, nn.Linear(inputs, classes)).eval()
    with torch.no_grad():
        v = torch.randn(inner, inputs, generator=g)
        block.weight.copy_(scale * v / torch.linalg.matrix_norm(v, 2))
        block.bias.copy_(0.2 * torch.randn(inner, generator=g))
        model[-1].weight.copy_(torch.randn(classes, inputs, generator=g))
        model[-1].bias.copy_(0.1 * torch.randn(classes, generator=g))
    return model


def images(n: int, seed: int, inputs: int = 2) -> Tensor:
    return torch.rand(n, inputs, 1, 1, generator=generator(seed))


def distance(model: nn.Sequential, x: Tensor, label: int, reach: float) -> float:
    """To the nearest point of another class within `reach` in the plane: 240 rays of 150 points in float64."""
    angles = torch.linspace(0, 2 * torch.pi, 240, dtype=torch.float64)
    lengths = torch.arange(1, 151, dtype=torch.float64) * reach / 150
    rays = torch.stack([angles.cos(), angles.sin()], 1)  # (A, 2)
    points = x.double().flatten() + lengths[:, None, None] * rays  # (R, A, 2)
    other = model.double()(points.reshape(-1, 2)).argmax(1).reshape(points.shape[:2]) != label
    model.float()
    return float(lengths[other.any(1)].min()) if other.any() else reach


@torch.no_grad()
def rows_of(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The prediction, what `radius` says of it, and what `local_radius` says."""
    below = lip.lipschitz_bound(model[:-1].eval(), tuple(x.shape[1:])).value
    logits = model(x)
    return logits.argmax(1), radius(logits, None, below, model[-1].weight), local_radius(model, x)


@pytest.mark.parametrize("seed", range(6))
def test_between_radius_and_the_true_distance(seed):
    model, x = tiny(seed), images(8, seed)
    labels, everywhere, near = rows_of(model, x)
    assert (near >= everywhere * (1 - 1e-5)).all()
    for picture, label, bound in zip(x, labels, near, strict=True):
        assert bound <= distance(model, picture, int(label), 1.2 * float(bound) + 1e-3) * (1 + 1e-6)


def test_gains_where_the_block_shrinks_and_nothing_where_it_reflects():
    gains = [(lambda _, e, n: float((n / e).max()))(*rows_of(tiny(seed), images(20, seed))) for seed in range(4)]
    assert max(gains) > 1.15
    model = tiny(0, inner=2)
    with torch.no_grad():
        model[-2].weight.copy_(torch.linalg.qr(torch.randn(2, 2, generator=generator(1))).Q)
    _, everywhere, near = rows_of(model, images(20, 0))
    torch.testing.assert_close(near.float(), everywhere, rtol=1e-4, atol=1e-6)


def test_one_unit_that_is_on_gives_the_distance_to_the_boundary():
    """Far from its kink the block is the matrix I − 2vvᵀ, the network is linear, and the bound is exact."""
    model = tiny(3, inner=1, classes=2, scale=0.3)
    with torch.no_grad():
        model[-2].bias.fill_(10.0)
    x = images(5, 3)
    with torch.no_grad():
        z = model.double()(x.double())
    model.float()
    v, w = model[-2].weight.detach().double()[0], model[-1].weight.detach().double()
    gradient = (w[0] - w[1]) @ (torch.eye(2, dtype=torch.float64) - 2 * torch.outer(v, v))
    true = (z[:, 0] - z[:, 1]).abs() / gradient.norm()
    torch.testing.assert_close(local_radius(model, x), true, rtol=1e-5, atol=0)


def test_steepness_bounds_every_gradient_near_by():
    """The true gradients at points within the distance, in more dimensions than rays can search."""
    g = generator(5)
    model = tiny(5, inputs=6, inner=9, classes=4, scale=0.9).double()
    features = torch.randn(3, 6, generator=g, dtype=torch.float64)
    logits = model[-2:](features).detach()
    labels = logits.argmax(1)
    v_t, bias, rows = (t.detach() for t in (model[-2].weight, model[-2].bias, model[-1].weight))
    pairs = local._pairs(features, logits, labels, Block(v_t, bias), rows)
    for t in (0.05, 0.3, 1.0):
        bound = pairs.steepness(torch.full((3,), t, dtype=torch.float64))
        step = torch.randn(400, 3, 6, generator=g, dtype=torch.float64)
        for move in t * step / step.norm(dim=2, keepdim=True):
            on = ((features + move) @ v_t.mT + bias > 0).double()
            w = rows[labels][:, None] - rows
            gradient = w - 2 * (on[:, None] * (w @ v_t.mT)) @ v_t
            assert (gradient.norm(dim=2) <= bound + 1e-9).all()


def test_wrong_labels_have_no_radius_and_batches_change_nothing():
    model, x = tiny(1), images(12, 1)
    labels = (model(x).argmax(1) + 1) % 3
    assert (local_radius(model, x, labels) <= 0).all()
    torch.testing.assert_close(local_radius(model, x, batch_size=5), local_radius(model, x))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), nn.Linear(2, 2)])
def test_other_endings_are_refused(model):
    with pytest.raises(ValueError, match="ends in SLLLinear and nn.Linear; this ends in .*Linear: use radius"):
        local_radius(model.eval(), images(2, 0))


class Louder(nn.Sequential):
    def forward(self, x):
        return super().forward(1.5 * x)


class Hot(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Twice(lip.SLLLinear):
    def forward(self, x):
        return 2 * super().forward(x)

    def lipschitz(self, constant, through):
        return 2 * super().lipschitz(constant, through)


@pytest.mark.parametrize("kind, place", [(Louder, None), (Twice, -2), (Hot, -1)])
def test_parts_that_compute_something_else_are_refused(kind, place):
    model = tiny(0)
    part = model if place is None else model[place]
    part.__class__ = kind
    with pytest.raises(ValueError, match=f"this ends in .*{kind.__name__}.*: use radius"):
        local_radius(model, images(8, 0))


@pytest.mark.parametrize("place", [None, -3, -2, -1])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_may_change_a_value_are_refused(place, before):
    model = tiny(0)
    part = model if place is None else model[place]
    if before:
        part.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    else:
        part.register_forward_hook(lambda module, args, output: 0.5 * output)
    with pytest.raises(ValueError, match="it carries a hook"):
        local_radius(model, images(8, 0))


def test_a_subclass_that_changes_nothing_is_looked_into():
    model = tiny(0)
    before = local_radius(model, images(8, 0))
    for part, base in ((model, nn.Sequential), (model[-2], lip.SLLLinear), (model[-1], nn.Linear)):
        part.__class__ = type("Renamed", (base,), {})
    assert torch.equal(local_radius(model, images(8, 0)), before)


def test_a_v_above_one_is_counted():
    """Its parametrization was taken off and V scaled up: the block is no longer 1-Lipschitz, and the radius shrinks."""
    for seed in range(12):
        model, x = tiny(seed, scale=1.1 + 0.2 * (seed % 2)), images(6, seed)
        for picture, label, bound in zip(x, model(x).argmax(1), local_radius(model, x), strict=True):
            assert bound <= distance(model, picture, int(label), 1.2 * float(bound) + 1e-3) * (1 + 1e-6)


def undecided_forgotten(pairs, distance):
    """Planted: every unit stays as it is."""
    return pairs.honest(torch.zeros_like(distance))


def filters_forgotten(pairs, distance):
    """Planted: a unit's input is taken to move a tenth of what it can."""
    block = dataclasses.replace(pairs.block)
    vars(block)["lengths"] = block.lengths / 10
    return dataclasses.replace(pairs, block=block).honest(distance)


@pytest.mark.parametrize("planted", [undecided_forgotten, filters_forgotten])
def test_planted_errors_are_caught(planted, monkeypatch):
    monkeypatch.setattr(local._Pairs, "honest", local._Pairs.steepness, raising=False)
    monkeypatch.setattr(local._Pairs, "steepness", planted)
    with pytest.raises(AssertionError):
        for seed in range(6):
            test_between_radius_and_the_true_distance(seed)


def stands(model: nn.Sequential, x: Tensor, y: Tensor, distance: Tensor | float, steps: int) -> bool:
    """Whether every label outlives an attack that goes just less far."""
    found = lip.attacks.pgd_l2(model, x, y, 0.9999 * distance, steps=steps)
    with torch.no_grad():
        return bool((model(found).argmax(1) == y).all())


def test_no_attack_inside_on_house_numbers():
    model, _ = trained("classification-sll", "cpu")
    x, y = pictures("house-numbers", "test", 40, TEST_SEED)
    near = local_radius(model, x, y)
    with torch.no_grad():
        below = lip.lipschitz_bound(model[:-1].eval(), (3, 32, 32)).value
        everywhere = radius(model(x), y, below, model[-1].weight)
    sure = near > 0
    assert (near[sure] / everywhere[sure]).mean() > 1.1
    assert stands(model, x[sure], y[sure], near[sure].float(), steps=15)

"""Logits in units of what the last SLL block lets through, and the training step that uses them."""

import math

import pytest
import torch
from torch import nn

import lipguide as lip
from lipguide.losses import OffsetCrossEntropy, local_logits, local_slopes
from lipguide.robustness.certificates import local
from lipguide.robustness.certificates.block import Block


def ending(seed, width=6, inner=5, classes=4, scale=None):
    """Features, labels, an SLL block whose units are on and off, and a head; in float64."""
    torch.manual_seed(seed)
    block, head = lip.SLLLinear(width, inner), nn.Linear(width, classes)
    block, head = block.double(), head.double()
    with torch.no_grad():
        block.parametrizations.weight.original.copy_(torch.randn(inner, width))
        block.bias.copy_(0.5 * torch.randn(inner))
        if scale is not None:
            torch.nn.utils.parametrize.remove_parametrizations(block, "weight")
            block.weight.mul_(scale)
    return torch.randn(8, width, dtype=torch.float64), torch.arange(8) % classes, block, head


@pytest.mark.parametrize("seed", range(4))
def test_where_every_unit_is_decided_the_slopes_are_the_lengths_of_the_true_gradients(seed):
    u, y, block, head = ending(seed)
    slopes = local_slopes(u, y, block, head, reach=1e-9)
    for n, (point, label) in enumerate(zip(u, y, strict=True)):
        jacobian = torch.autograd.functional.jacobian(lambda features: head(block(features)), point)  # (C, D)
        lengths = (jacobian[label] - jacobian).norm(dim=1)
        others = torch.arange(len(lengths)) != label
        torch.testing.assert_close(slopes[n, others], lengths[others])


@pytest.mark.parametrize("seed", range(4))
def test_slopes_follow_their_formula_unit_by_unit(seed):
    """A straight transcription, with the share of the way on which each unit is sure to be on."""
    u, y, block, head = ending(seed)
    reach, v = 0.7, block.weight.detach().mT  # (D, K)
    slopes, shares = local_slopes(u, y, block, head, reach), []
    for n, label in enumerate(y):
        on = torch.zeros(v.shape[1], dtype=torch.float64)
        for k in range(v.shape[1]):
            before = (v[:, k] @ u[n] + block.bias[k]).item()
            on[k] = min(1.0, max(0.0, before / (v[:, k].norm().item() * reach)))
        shares += on.tolist()
        for j in range(4):
            w = (head.weight[label] - head.weight[j]).detach()
            moved = torch.diag(on) @ (-2 * v.mT @ w)
            squared = w @ w - moved @ (torch.eye(len(on), dtype=torch.float64) - v.mT @ v) @ moved
            assert j == label or slopes[n, j].item() == pytest.approx(math.sqrt(squared), rel=1e-9)
    assert any(0 < share < 1 for share in shares)


@pytest.mark.parametrize("seed", range(4))
def test_slopes_are_never_above_the_constant_and_grow_with_the_reach(seed):
    u, y, block, head = ending(seed, width=12, inner=12)
    w = (head.weight[y][:, None] - head.weight).norm(dim=2)
    near, far = (local_slopes(u, y, block, head, reach) for reach in (1e-9, 1e9))
    apart = w > 0
    assert (near[apart] <= w[apart] * (1 + 1e-9)).all() and (near < 0.95 * w).any()
    torch.testing.assert_close(far[apart], w[apart])


def test_a_block_of_one_unit_has_the_certificates_slope_on_either_side_of_the_kink():
    """Where the unit cannot switch, estimate and bound are one."""
    u, y, block, head = ending(1, inner=1, classes=3, scale=0.6)
    with torch.no_grad():
        pairs = local._pairs(u, head(block(u)), y, Block(block.weight.detach(), block.bias.detach()), head.weight)
    sure = (u @ block.weight.mT + block.bias).abs().squeeze(1) > 0.1 * block.weight.norm()
    bound = pairs.steepness(torch.full((len(u),), 0.1, dtype=torch.float64))
    slopes = local_slopes(u, y, block, head, 0.1)
    others = torch.arange(3) != y[:, None]
    both = sure[:, None] & others
    assert both.sum() > 5
    torch.testing.assert_close(slopes[both], bound[both], rtol=1e-4, atol=0)


def test_a_gap_over_its_slope_is_the_distance_to_the_boundary_of_a_linear_piece():
    """One unit that is on everywhere: z_y − z_j is linear, and the logits are −√2 times the distance to it."""
    u, y, block, head = ending(2, inner=1, scale=0.6)
    with torch.no_grad():
        block.bias.fill_(1e3)
    z = local_logits(u, y, block, head)
    for n, label in enumerate(y):
        for j in range(4):
            jacobian = torch.autograd.functional.jacobian(lambda features: head(block(features)), u[n])
            gap = head(block(u[n]))[label] - head(block(u[n]))[j]
            expected = 0.0 if j == label else -math.sqrt(2) * (gap / (jacobian[label] - jacobian[j]).norm()).item()
            assert z[n, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_where_nothing_is_lost_they_are_the_logits():
    """A head of orthonormal rows and a block that is off: every gap moves by √2, and the losses agree."""
    u, y, block, head = ending(3, width=6, classes=4)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4, 6))
        block.bias.fill_(-1e3)
    z = head(block(u))
    torch.testing.assert_close(local_logits(u, y, block, head), z - z.gather(1, y[:, None]))
    loss = OffsetCrossEntropy()
    torch.testing.assert_close(loss(local_logits(u, y, block, head), y), loss(z, y))


def test_the_gradient_is_that_of_differences_and_reaches_every_part():
    class Whole(nn.Module):
        def __init__(self, block, head):
            super().__init__()
            self.block, self.head = block, head

        def forward(self, features):
            return local_logits(features, y, self.block, self.head, reach=0.7)

    u, y, block, head = ending(0, scale=1.0)
    whole = Whole(block, head)
    names, values = zip(*whole.named_parameters(), strict=True)

    def of_all(features, *parts):
        return torch.func.functional_call(whole, dict(zip(names, parts, strict=True)), (features,))

    assert torch.autograd.gradcheck(of_all, (u.requires_grad_(), *values))
    loss = OffsetCrossEntropy()(whole(u), y)
    assert all(gradient.abs().max() > 1e-4 for gradient in torch.autograd.grad(loss, (u, *values)))


@pytest.mark.parametrize("bias", [-1e3, 0.0, 1e3])
def test_units_of_no_length_and_gaps_that_do_not_move_leave_the_gradient_finite(bias):
    u, y, block, head = ending(0, scale=0.0)
    with torch.no_grad():
        block.bias.fill_(bias)
        head.weight[1] = head.weight[0]
    loss = OffsetCrossEntropy()(local_logits(u.requires_grad_(), y, block, head), y)
    for gradient in torch.autograd.grad(loss, (u, block.weight, block.bias, head.weight)):
        assert gradient.isfinite().all()

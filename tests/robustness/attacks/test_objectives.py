"""What attacks ascend: at every scale of the logits, and for labels of every type."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.robustness import attacks
from lipguide.robustness.attacks import pgd_l2
from tests.robustness.attacks.problems import Scale, accuracy
from tests.robustness.common import WHOLE, linear


def test_rescaled_cross_entropy_does_not_depend_on_the_scale_of_the_logits(models, test_set):
    x, y = test_set
    values = []
    for factor in (1e-6, 1.0, 1e6):
        model = nn.Sequential(models["ordinary"], Scale(factor)).eval()
        values.append(accuracy(model, pgd_l2(model, x, y, 0.4, steps=10), y))
    assert max(values) - min(values) <= 0.005


def test_plain_cross_entropy_overrates_the_robustness_at_both_ends_of_the_scale(models, test_set):
    """Why the default objective is what it is. Saturated logits also set off the warning."""
    x, y = test_set

    def plain(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")

    model = models["overconfident"]
    with pytest.warns(UserWarning, match="gradient of the loss was zero"):
        flattering = accuracy(model, pgd_l2(model, x, y, 0.5, loss=plain), y)
    assert flattering > accuracy(model, pgd_l2(model, x, y, 0.5), y) + 0.2
    model = models["1-Lipschitz"]
    assert (
        accuracy(model, pgd_l2(model, x, y, 0.5, loss=plain), y) > accuracy(model, pgd_l2(model, x, y, 0.5), y) + 0.02
    )


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("objective", [attacks.margin, attacks.rescaled_cross_entropy])
def test_a_label_is_the_same_in_every_whole_type(objective, dtype):
    """Class 156 is no ignored label, although -100 in eight bits without a sign is 156."""
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 7, 100 if dtype == torch.int8 else 156])
    assert torch.equal(objective(logits, y.to(dtype)), objective(logits, y))
    assert (objective(logits, y) != 0).all()


def test_an_ignored_pixel_counts_nothing():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[[0, -100], [1, 2]]])
    values = attacks.rescaled_cross_entropy(logits, y.to(torch.int8))
    assert values[0, 0, 1] == 0 and (values.flatten()[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("restarts", [1, 3])
def test_one_class_leaves_nothing_to_attack_towards(restarts):
    with pytest.raises(ValueError, match="one class"):
        pgd_l2(linear(torch.randn(1, 16)), torch.rand(2, 1, 4, 4), torch.zeros(2).long(), 0.1, restarts=restarts)

"""The counter that other tests go by."""

import torch

from tests.tasks.detection.counts import Counts, counts


def test_counts_see_a_product_and_a_number_that_is_read_back():
    x = torch.ones(3, requires_grad=True)
    assert counts(lambda: (x * 2) + 1) == Counts(2, 0)
    assert counts(lambda: (x * 2).sum().item()).synchronisations == 1
    assert counts(lambda: x[x > 0]).synchronisations == 1
    assert counts(lambda: bool(x.isfinite().all())).synchronisations == 1
    assert counts(lambda: x[:2][None].mT) == Counts(0, 0)


def test_counts_see_the_way_back_too():
    x = torch.ones(3, requires_grad=True)
    there = counts(lambda: (x * 2).sum())
    assert counts(lambda: (x * 2).sum().backward()).operators > there.operators

"""The search for multipliers: rows climb by themselves, and what was best is kept."""

import torch

from lipguide.robustness.certificates.climb import highest
from tests.robustness.common import generator


def hills(peaks):
    return lambda x: (-(x - peaks).square().sum(1), -2 * (x - peaks))


def test_each_row_climbs_its_own_hill():
    peaks = torch.randn(5, 3, generator=generator(0))
    (found,) = highest(hills(peaks), [torch.zeros(5, 3)], [0.1], 300, 0.99)
    assert torch.allclose(found, peaks, atol=1e-2)
    (alone,) = highest(hills(peaks[2:3]), [torch.zeros(1, 3)], [0.1], 300, 0.99)
    assert torch.equal(alone, found[2:3])


def test_the_best_is_kept_where_the_search_leaves_it():
    peaks = torch.tensor([[0.0], [1.0]])
    (found,) = highest(hills(peaks), [torch.zeros(2, 1)], [1.0], 4, 0.999)  # the first begins at its peak
    assert found[0] == 0 and (found[1] - 1).abs() < 1


def test_what_is_no_number_is_never_best():
    def broken(x):
        return torch.where(x[:, 0] > 0.5, torch.nan, x[:, 0]), torch.ones_like(x)

    (found,) = highest(broken, [torch.zeros(1, 1)], [0.2], 20, 0.99)
    assert 0 <= float(found) <= 0.5

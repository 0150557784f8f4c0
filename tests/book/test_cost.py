"""The measuring instruments themselves: times that take turns, and memory that is freed again."""

import time

import pytest
import torch
from torch import nn

from lipguide.book.cost import compare, peak_memory


def test_candidates_take_turns_and_ratios_are_to_the_first():
    order = []

    def wait(name: str, seconds: float):
        def step() -> None:
            order.append(name)
            time.sleep(seconds)

        return step

    costs = compare({"a": wait("a", 0.002), "b": wait("b", 0.008), "c": wait("c", 0.002)}, rounds=6)
    assert costs["a"].ratio == 1
    assert costs["b"].seconds >= 0.008 and costs["b"].ratio == costs["b"].seconds / costs["a"].seconds
    measured = order[6:]  # two runs each for the memory
    assert [measured[i : i + 3] for i in range(0, 9, 3)] == [list("abc"), list("bca"), list("cab")]
    assert all(measured.count(name) == 7 for name in "abc")  # the first round only warms up


def test_one_round_is_enough():
    assert compare({"a": lambda: None}, rounds=1)["a"].ratio == 1


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1000)

    def in_turn() -> None:
        for _ in range(10):
            _ = x + 1

    def together() -> None:
        _ = [x + 1 for _ in range(10)]

    assert peak_memory(in_turn) in (4000, 8000)  # the old one may live until the name is taken over
    assert peak_memory(together) == 40_000


def test_views_and_changes_in_place_are_free():
    x = torch.zeros(1000)
    assert peak_memory(lambda: x.view(10, 100).t()) == 0
    assert peak_memory(lambda: x.add_(1).mul_(2)) == 0


def test_a_training_step_holds_its_activations():
    layer, x = nn.Linear(100, 100), torch.randn(50, 100)

    def step() -> None:
        layer.zero_grad()
        layer(x).relu().sum().backward()

    activation, weights = 50 * 100 * 4, (100 * 100 + 100) * 4
    assert 2 * activation <= peak_memory(step) <= 5 * activation + weights


def test_what_a_step_keeps_is_counted_and_nothing_is_left_watching():
    kept = []
    assert peak_memory(lambda: kept.append(torch.zeros(250))) == pytest.approx(1000)
    assert torch.zeros(1).untyped_storage().nbytes() == 4

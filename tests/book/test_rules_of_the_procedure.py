"""The rules by which the chapter `procedure` decides, taken out of its cells and tried on other numbers."""

import ast
import math
from pathlib import Path

import jupytext
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

import lipguide as lip

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "procedure.md"
EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True)


def from_chapter(*names: str, **context) -> dict:
    """The chapter's functions of these names, defined in a namespace that holds `context`."""
    cells = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
    found = [node for source in cells for node in ast.parse(source).body if getattr(node, "name", None) in names]
    assert sorted(node.name for node in found) == sorted(names)
    exec(compile(ast.Module(found, []), str(CHAPTER), "exec"), context)
    return context


@EXAMPLES
@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_lower_bound_is_wilsons(n, share):
    right = round(share * n)
    z = 1.6448536269514722
    lower = from_chapter("lower", confidence=z)["lower"]
    interval = binomtest(right, n).proportion_ci(confidence_level=0.9, method="wilson")
    assert lower(100 * right / n, n) == pytest.approx(100 * interval.low, abs=1e-6)


@EXAMPLES
@given(shares=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=12, max_size=12))
def test_loop_repeats_no_setting_keeps_its_budget_and_ends(shares):
    """Whatever the trainings give: the rule walks from setting to setting, all new, none too long."""
    budget = {"rounds": 5, "steps": 800}
    next_setting = from_chapter("next_setting", budget=budget)["next_setting"]

    def row(setting, clean, certified):
        slack = {"clean": clean - 70, "certified": certified - 50}
        short = [name for name, value in slack.items() if value < 0]
        return {"offset": setting[0], "steps": setting[1], "short": short, "slack": min(slack.values())}

    log = [row((0.7, 200), *shares[0])]
    for share in shares[1:]:
        setting = next_setting(log)
        if setting is None:
            break
        assert setting not in [(r["offset"], r["steps"]) for r in log] and setting[1] <= budget["steps"]
        log.append(row(setting, *share))
    else:
        pytest.fail("the loop found new settings without end")


@pytest.mark.parametrize("short, expected", [("certified", (1.4, 200)), ("clean", (0.35, 200))])
def test_dial_is_turned_towards_what_is_short(short, expected):
    next_setting = from_chapter("next_setting", budget={"steps": 800})["next_setting"]
    log = [{"offset": 0.7, "steps": 200, "short": [short], "slack": -1.0}]
    assert next_setting(log) == expected


def test_both_short_turns_the_dial_both_ways_and_only_then_trains_longer():
    next_setting = from_chapter("next_setting", budget={"steps": 800})["next_setting"]
    log = [{"offset": 0.7, "steps": 200, "short": ["clean", "certified"], "slack": -1.0}]
    moves = []
    for _ in range(3):
        moves.append(next_setting(log))
        log.append({"offset": moves[-1][0], "steps": moves[-1][1], "short": ["clean", "certified"], "slack": -2.0})
    assert moves == [(0.35, 200), (1.4, 200), (0.7, 400)]


@EXAMPLES
@given(wanted=st.floats(1, 90), n=st.integers(300, 3000))
def test_the_region_that_is_drawn_is_the_one_that_the_rule_uses(wanted, n):
    context = from_chapter("lower", "share_for", confidence=1.645, held_labels=range(n))
    share, lower = context["share_for"](wanted), context["lower"]
    assert lower(share, n) >= wanted > lower(share - 100 / n, n)


@EXAMPLES
@given(seed=st.integers(0, 10**6))
def test_front_maps_the_ball_around_a_picture_onto_the_ball_around_its_grey_values(seed):
    """Its rows are orthonormal, so every shift of the reduced picture is that of a shift as long of the picture."""
    grey = nn.Conv2d(3, 1, 1)
    nn.init.constant_(grey.weight, 3**-0.5)
    nn.init.constant_(grey.bias, -1.5 * 3**-0.5)
    front = nn.Sequential(grey, lip.ScaledAvgPool2d(2), nn.Flatten()).double()
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(3 * 8 * 8, generator=generator, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda x: front(x.reshape(1, 3, 8, 8)).flatten(), picture)
    # the bias and the constants of the chapter are float32
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)
    extreme = [front(torch.full((1, 3, 8, 8), value, dtype=torch.float64)).mean().item() for value in (0.0, 1.0)]
    assert extreme == pytest.approx([-math.sqrt(3), math.sqrt(3)], abs=1e-6)


def test_a_hundred_equally_good_networks_look_two_and_a_half_errors_better():
    """The exercise on the best of many rounds: the mean of the largest of a hundred normal numbers."""
    draws = torch.randn(5000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert draws.amax(1).mean().item() == pytest.approx(2.5, abs=0.05)

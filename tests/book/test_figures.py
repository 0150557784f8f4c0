"""Plots: curves that stand for a kind of network have its colour, and no other curve has that of ordinary ones."""

import matplotlib.pyplot as plt
import pytest

from lipguide.book.figures import COLOURS, FREE, LIPSCHITZ, ORDINARY, axes, lines


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("count", [1, 3, 7, 13])
def test_no_curve_has_the_colour_of_ordinary_networks_by_chance(count):
    _, ax = axes("x", "y")
    lines(ax, range(5), {str(k): range(5) for k in range(count)})
    drawn = [ax.plot(range(5))[0].get_color() for _ in range(count)]  # without `lines`
    colours = [line.get_color() for line in ax.lines[:count]]
    assert ORDINARY not in colours + drawn
    assert len(set(colours)) == min(count, len(FREE))


def test_a_colour_that_is_given_is_taken_and_no_other_curve_gets_it():
    _, ax = axes("x", "y")
    curves = {name: range(5) for name in ("a", "ordinary", "b", "certified", "c")}
    lines(ax, range(5), curves, {"ordinary": ORDINARY, "certified": LIPSCHITZ})
    colours = {line.get_label(): line.get_color() for line in ax.lines}
    assert colours["ordinary"] == ORDINARY and colours["certified"] == LIPSCHITZ
    assert len(set(colours.values())) == len(curves) and set(colours.values()) <= set(COLOURS.values())
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(looks) == len(curves), "a curve is told apart without its colour, too"

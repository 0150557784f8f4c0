"""One look for every plot of the book: few, large, readable in grey, in dark mode and by colour-blind eyes."""

from __future__ import annotations

import sys
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "LIPSCHITZ", "ORDINARY", "axes", "lines", "style"]

# Okabe and Ito's palette without its yellow. Curves are told apart by dash and marker as well.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "vermillion": "#D55E00",
    "sky": "#56B4E9",
    "grey": "#6E6E6E",
}
# Through the whole book: a network with a bound is blue, an ordinary one is orange. No curve is orange by accident.
LIPSCHITZ, ORDINARY = COLOURS["blue"], COLOURS["orange"]
FREE = [colour for colour in COLOURS.values() if colour != ORDINARY]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P"]


def style() -> None:
    """Set matplotlib's defaults for this book; a line is told apart by colour, dash and marker.

    In a notebook, plots are drawings (SVG): sharp at every size, and small. Pictures in them are kept at 200 dpi.

    >>> style()
    >>> plt.rcParams["axes.spines.top"]
    False
    """
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 4.0),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "savefig.dpi": 200,
            "svg.hashsalt": "lipguide",  # so that one run draws the same file as the next
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "grid.color": "#D9D9D9",
            "grid.linewidth": 0.8,
            "lines.linewidth": 2.0,
            "lines.markersize": 5,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "image.interpolation": "none",  # a drawing keeps pixels as they are, and stays small
            "axes.prop_cycle": cycler(color=FREE) + cycler(linestyle=DASHES) + cycler(marker=MARKERS),
        }
    )
    _draw_in_notebooks()


def _draw_in_notebooks() -> None:
    """Ask the notebook that we are in, if any, for drawings instead of bitmaps."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def axes(xlabel: str, ylabel: str, title: str = "", columns: int = 1, **keywords) -> tuple[Figure, Axes]:
    """A figure in the book's style with its axes named, units included.

    Args:
        xlabel, ylabel: what the axes show, with the unit.
        title: what to see in the plot.
        columns: number of panels beside each other; an array of axes comes back for more than one.
        **keywords: handed on to `plt.subplots`.

    >>> figure, ax = axes("ε (L2 distance)", "accuracy (%)")
    >>> ax.get_xlabel()
    'ε (L2 distance)'
    """
    style()
    figure, panels = plt.subplots(1, columns, **keywords)
    for panel in np.atleast_1d(panels):
        panel.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        figure.suptitle(title)
    return figure, panels


def lines(ax: Axes, x, curves: dict[str, object], colours: dict[str, str] | None = None, **keywords) -> None:
    """Plot one curve a name and a legend; markers are thinned so that the dashes stay visible.

    Args:
        ax: what to draw on.
        x: the places of all curves.
        curves: the values of each, by name.
        colours: of those that have one for a reason, such as `ORDINARY`; the others share out the rest.
        **keywords: handed on to `ax.plot`.

    >>> figure, ax = axes("x", "y")
    >>> lines(ax, [0, 1], {"a": [0, 1], "ordinary": [1, 0]}, {"ordinary": ORDINARY})
    >>> [line.get_color() == ORDINARY for line in ax.lines]
    [False, True]
    """
    colours = colours or {}
    rest = cycle([colour for colour in FREE if colour not in colours.values()])
    for (name, values), dash, marker in zip(curves.items(), cycle(DASHES), cycle(MARKERS), strict=False):
        look = {"color": colours.get(name) or next(rest), "linestyle": dash, "marker": marker}
        ax.plot(x, values, label=name, markevery=max(1, len(np.asarray(x)) // 8), **{**look, **keywords})
    ax.legend()

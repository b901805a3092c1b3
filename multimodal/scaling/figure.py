"""The law over the points, with its interval, and what it foretells."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from multimodal.evals.drawing import BLUE, GREY, NORMAL, ORANGE, SMALL, new_figure
from multimodal.scaling.fit import Fit
from multimodal.scaling.points import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    points: Sequence[Point],
    fit: Fit,
    foretold: Sequence[tuple[float, float, float, float]],  # size, error, and its interval
    x_name: str,
    y_name: str,
) -> "Figure":
    """On logarithmic axes, up to the largest size that is foretold."""
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    sizes = [point.x for point in points] + [size for size, *_ in foretold]
    x = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 200)
    low, high = fit.band(x)
    axes.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(x, fit.law(x), color=BLUE, linewidth=1)
    axes.plot([p.x for p in points], [p.error for p in points], "o", color=BLUE, markersize=4, label="runs")
    for index, (size, error, below, above) in enumerate(foretold):
        label = None if index else "foretold, with 95% of runs"
        spans = [[error - below], [above - error]]
        axes.errorbar(size, error, yerr=spans, fmt="D", color=ORANGE, markersize=4, capsize=3, label=label)
    if fit.law.a > 0:
        axes.axhline(fit.law.a, color=GREY, linewidth=0.8, linestyle="--", label="floor")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(x_name, fontsize=NORMAL, parse_math=False)
    axes.set_ylabel(y_name, fontsize=NORMAL, parse_math=False)
    axes.tick_params(labelsize=SMALL, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=SMALL, frameon=False)
    return figure

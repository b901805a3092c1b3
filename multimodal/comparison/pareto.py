"""The Pareto front: what nothing else beats in one metric without losing in the other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from multimodal.comparison.statistics import Spread
from multimodal.evals.drawing import BLUE, GREY, NORMAL, SMALL, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 20.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def front(points: Sequence[tuple[float, float]], better: tuple[int, int]) -> list[bool]:
    """Which points are on it; `better` is 1 where more is better, else -1. Equal points are both on it."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        gains = [sign * (a - b) for sign, a, b in zip(better, one, other, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    return [not any(beats(other, point) for other in points) for point in points]


def draw(
    names: Sequence[str],
    points: Sequence[tuple[Spread, Spread]],
    on_front: Sequence[bool],
    axes_names: tuple[str, str],
) -> "Figure":
    """All groups, means with their spread over seeds, and the front as a line."""
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    for name, (x, y), best in zip(names, points, on_front, strict=True):
        colour = BLUE if best else GREY
        axes.errorbar(x.mean, y.mean, xerr=x.std or None, yerr=y.std or None, fmt="o", color=colour, capsize=2)
        axes.annotate(
            wrap(name, 36, 2), (x.mean, y.mean), (5, 4), textcoords="offset points", fontsize=SMALL, color=colour,
            parse_math=False,
        )  # fmt: skip
    line = sorted((x.mean, y.mean) for (x, y), best in zip(points, on_front, strict=True) if best)
    axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1)
    for scale, values in zip((axes.set_xscale, axes.set_yscale), zip(*points, strict=True), strict=True):
        means = [value.mean for value in values]
        if min(means) > 0 and max(means) > WIDE * min(means):
            scale("log")
    axes.margins(0.12)
    axes.set_xlabel(axes_names[0], fontsize=NORMAL, parse_math=False)
    axes.set_ylabel(axes_names[1], fontsize=NORMAL, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    return figure

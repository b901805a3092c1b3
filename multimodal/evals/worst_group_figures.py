"""Accuracy by group, one under the other."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from multimodal.evals.drawing import BLUE, GREY, NORMAL, ORANGE, SMALL, new_figure, wrap
from multimodal.parts import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = 40


def accuracies(by_group: Mapping[str, Estimate], overall: float, chance: float) -> "Figure":
    """The accuracy in each group with its interval, the worst last; of very many groups the worst ones are shown."""
    ordered = sorted(by_group.items(), key=lambda item: -item[1].value)
    shown = ordered[-LIMIT:]
    figure = new_figure(5.0, 1.1 + 0.2 * len(shown))
    axes = figure.subplots()
    for row, (_, found) in enumerate(shown):
        colour = ORANGE if row == len(shown) - 1 else BLUE
        if found.low is not None and found.high is not None:
            axes.plot([100 * found.low, 100 * found.high], [row, row], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(100 * found.value, row, "o", color=colour, markersize=3.5)
    axes.axvline(100 * overall, color=BLUE, linewidth=0.8)
    axes.axvline(100 * chance, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(shown)), [f"{wrap(name, 34, 1)} ({one.count})" for name, one in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("top-1 (%), 95% interval; line: all of them, dashes: chance", fontsize=SMALL)
    part = "" if len(shown) == len(ordered) else f"; the {len(shown)} worst of {len(ordered)} groups"
    axes.set_title(f"worst group {100 * shown[-1][1].value:.1f}%{part}", fontsize=NORMAL, loc="left")
    axes.tick_params(labelsize=SMALL, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, color="#DDDDDD")
    return figure

"""The effects of association tests, one under the other, with their intervals."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from multimodal.evals.drawing import BLUE, GREY, NORMAL, ORANGE, SMALL, new_figure, wrap
from multimodal.parts import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def effects(found: Mapping[str, Estimate], after: Mapping[str, Estimate] | None = None) -> "Figure":
    """Effect sizes by test: away from 0 one group of targets is nearer to one attribute than the other group is.

    With what they are `after` a change in orange below.
    """
    figure = new_figure(5.6, 0.9 + (0.19 if after is None else 0.28) * len(found))
    axes = figure.subplots()
    series = (
        [(found, BLUE, "before", 0.0)]
        if after is None
        else [(found, BLUE, "before", -0.16), (after, ORANGE, "after", 0.16)]
    )
    for estimates, colour, label, offset in series:
        for row, effect in enumerate(estimates.values()):
            place = row + offset
            if effect.low is not None and effect.high is not None:
                axes.plot([effect.low, effect.high], [place, place], color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(effect.value, place, "o", color=colour, markersize=3.5, label=None if row else label)
    if after is not None:
        axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(found)), [wrap(name, 46, 1) for name in found], parse_math=False)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(-2.1, 2.1)
    axes.set_xlabel("effect size, 95% interval", fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, color="#DDDDDD")
    return figure

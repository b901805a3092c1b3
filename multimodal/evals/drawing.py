"""What all figures have in common: colours, sizes, and no pyplot, so no global state."""

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito 2008, told apart by colour-blind readers as well
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, SKY)
GREY = "#8A8A8A"
SMALL, NORMAL = 7.5, 9


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def wrap(text: str, width: int, lines: int) -> str:
    """Text in so many lines at most, with dots where it was cut."""
    return textwrap.fill(text, width, max_lines=lines, placeholder=" ...")


def bare(axes: "Axes") -> None:
    """Take ticks and frame away."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def colour_bar(figure: "Figure", axes: "Axes", image: "AxesImage", label: str) -> None:
    """A thin bar beside the axes, which says what colours mean."""
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=0)
    bar.outline.set_visible(False)

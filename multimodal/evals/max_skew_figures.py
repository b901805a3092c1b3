"""Which values of an attribute queries find."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from multimodal.evals.drawing import NORMAL, SMALL, colour_bar, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shares(
    found: Tensor,  # float64 [q, A] among the first k
    desired: Tensor,  # float64 [A]
    queries: Sequence[str],
    names: Sequence[str],
    k: int,
) -> "Figure":
    """The share of each value among the first k images of each query, in percent; coloured by how far it is off.

    Blue is more than its share, orange less; the last row has the shares that are desired.
    """
    from matplotlib.colors import LinearSegmentedColormap

    off = 100 * (found - desired)
    most = max(1.0, off.abs().max().item())
    colours = LinearSegmentedColormap.from_list("off", ["#E69F00", "#FFFFFF", "#0072B2"])
    figure = new_figure(2.6 + 0.5 * len(names), 1.5 + 0.28 * len(queries))
    axes = figure.subplots()
    rows = [*off.tolist(), [0.0] * len(names)]
    image = axes.imshow(rows, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for row, values in enumerate([*found.tolist(), desired.tolist()]):
        for column, value in enumerate(values):
            ink = "white" if rows[row][column] > 0.7 * most else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set_yticks(range(len(rows)), [*(wrap(query, 34, 1) for query in queries), "desired"], parse_math=False)
    labels = [wrap(name, 20, 1) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.axhline(len(queries) - 0.5, color="white", linewidth=3)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.spines[:].set_visible(False)
    axes.set_title(f"% of the first {k} images", fontsize=NORMAL, loc="left")
    colour_bar(figure, axes, image, "points above desired")
    return figure

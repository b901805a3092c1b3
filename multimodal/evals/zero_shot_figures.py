"""Images that were taken for another class."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from multimodal.evals.drawing import GREY, NORMAL, RED, SMALL, bare, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLUMNS = 6


def failures(
    images: "Sequence[Image]",
    true: Sequence[str],  # class of each image
    predicted: Sequence[str],  # likewise
    probabilities: Sequence[float],  # of the predicted class
    wrong: int,  # how many there are
    total: int,
) -> "Figure":
    """A few images that are classified wrong, each with the class that it was taken for and the one that it is of."""
    rows = max(1, math.ceil(len(images) / COLUMNS))
    figure = new_figure(1.45 * COLUMNS, 0.35 + 1.9 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        bare(axes)
    for axes, image, name, other, probability in zip(grid.flat, images, true, predicted, probabilities, strict=False):
        axes.imshow(image.convert("RGB"))
        taken = wrap(f"{other} {probability:.0%}", 22, 2)
        axes.set_title(taken, fontsize=SMALL, color=RED, parse_math=False)
        axes.set_xlabel(wrap(name, 22, 2), fontsize=SMALL, color=GREY, parse_math=False)
    title = f"wrong: {wrong:,} of {total:,}; the surest are shown: predicted above, true below"
    figure.suptitle(title, fontsize=NORMAL, x=0.01, ha="left", parse_math=False)
    return figure

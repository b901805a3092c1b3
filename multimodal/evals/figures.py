"""Figures: confusion and similarity matrices, retrieval grids, training curves, a sheet of samples.

Drawn without pyplot, so without global state; text from data is never read as mathematics ("$5 or $6").
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimodal.evals.drawing import (
    BLUE,
    COLOURS,
    GREY,
    NORMAL,
    ORANGE,
    RED,
    SMALL,
    bare,
    colour_bar,
    new_figure,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

EVALUATION = "eval/", "eval_ema/"
"""What the names of an evaluation's metrics begin with."""
LOSS = "train/loss"


# --- matrices -------------------------------------------------------------------------------------------------------


def confusion_matrix(
    counts: Tensor,  # int64 [K, K] images by true class (row) and predicted class (column)
    class_names: Sequence[str],
    limit: int = 24,
) -> "Figure":
    """Each class's images by predicted class, in percent of the row: the diagonal is the recall of each class.

    Of more than `limit` classes the most frequent ones are shown, predictions of all others in one more column.
    """
    num_classes = len(counts)
    shown = counts.sum(dim=1).argsort(descending=True, stable=True)[:limit].sort().values
    rows = counts[shown].double()
    cells = rows[:, shown]
    names = [wrap(class_names[i], 30, 1) for i in shown]
    columns = names
    if len(shown) < num_classes:
        cells = torch.cat([cells, rows.sum(dim=1, keepdim=True) - cells.sum(dim=1, keepdim=True)], dim=1)
        columns = [*names, "(any other)"]
    percent = 100 * cells / rows.sum(dim=1, keepdim=True).clamp(min=1)

    side = max(3.6, 1.6 + 0.3 * len(shown))
    figure = new_figure(side + 1.0, side)
    axes = figure.subplots()
    image = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    for row, column in (percent >= 1).nonzero().tolist():
        value = percent[row, column].item()
        ink = "white" if value > 60 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=NORMAL)
    axes.set_ylabel("true", fontsize=NORMAL)
    recall = 100 * counts.diagonal().sum() / counts.sum().clamp(min=1)
    part = "" if len(shown) == num_classes else f"; the {len(shown)} most frequent of {num_classes} classes are shown"
    axes.set_title(f"top-1 {recall:.1f}%{part}", fontsize=NORMAL, loc="left")
    colour_bar(figure, axes, image, "% of the true class")
    return figure


def similarity_matrix(
    similarity: Tensor,  # [n, n] cosine of image (row) and caption (column); pairs on the diagonal
    captions: Sequence[str],
) -> "Figure":
    """The cosines of a few pairs, each image with each caption: a trained model shows a bright diagonal."""
    n = len(similarity)
    side = max(3.0, 0.17 * n)
    figure = new_figure(side + 4.2, side + 0.9)
    axes = figure.subplots()
    image = axes.imshow(similarity.T.numpy(), cmap="viridis")
    axes.set_yticks(range(n), [textwrap.shorten(text, 48, placeholder=" ...") for text in captions], parse_math=False)
    axes.set_xticks(range(0, n, 4))
    axes.tick_params(length=0, labelsize=SMALL)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("image", fontsize=NORMAL)
    others = (similarity.sum() - similarity.trace()) / max(1, n * (n - 1))
    title = f"mean cosine: pairs {similarity.diagonal().mean():z.2f}, others {others:z.2f}"
    axes.set_title(title, fontsize=NORMAL, loc="left")
    colour_bar(figure, axes, image, "cosine")
    return figure


# --- pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A caption with what was found for it."""

    caption: str
    rank: int
    """Of its own image, from 1."""
    own: "Image"
    found: "Sequence[Image]"
    """The first few images, nearest first; its own is among them if `rank` says so."""


def retrieval_grid(queries: Sequence[Query], num_images: int) -> "Figure":
    """Captions, each with its own image and the first images found for it, where its own is framed."""
    num_found = max((len(query.found) for query in queries), default=0)
    figure = new_figure(2.6 + 1.05 * (1 + num_found), 0.5 + 1.1 * max(1, len(queries)))
    widths = [2.4, 1, 0.12, *[1] * num_found]
    grid = figure.subplots(max(1, len(queries)), len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        bare(axes)
    for row, query in zip(grid, queries, strict=False):
        colour = BLUE if query.rank == 1 else RED
        row[0].text(0, 0.95, f"rank {query.rank} of {num_images}", fontsize=SMALL, color=colour, va="top")
        row[0].text(0, 0.76, wrap(query.caption, 34, 4), fontsize=NORMAL, va="top", parse_math=False)
        for axes, picture in zip([row[1], *row[3:]], [query.own, *query.found], strict=False):
            axes.imshow(picture.convert("RGB"))
        if query.rank <= len(query.found):
            row[2 + query.rank].spines[:].set(visible=True, color=BLUE, linewidth=3)
    for axes, title in zip(grid[0, 1:], ["its image", "", *map(str, range(1, num_found + 1))], strict=True):
        axes.set_title(title, fontsize=NORMAL, color=GREY)
    return figure


def batch_sheet(
    images: Tensor,  # uint8 [n, 3, H, W]
    captions: Sequence[str],
) -> "Figure":
    """Images as a tower gets them, each with its caption: what to look at before training on a new dataset."""
    num_columns = min(8, math.ceil(math.sqrt(max(1, len(images)))))
    num_rows = max(1, math.ceil(len(images) / num_columns))
    figure = new_figure(1.5 * num_columns, 1.95 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        bare(axes)
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_xlabel(wrap(caption, 26, 3), fontsize=SMALL, parse_math=False)
    return figure


# --- curves ---------------------------------------------------------------------------------------------------------


def _panels(points: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[str, list[str]]]:
    """Titles and keys of the panels: the loss, evaluations (their fractions together, their others too), the rest."""
    training = [(key, [key]) for key in points if not key.startswith(EVALUATION)]
    training.sort(key=lambda panel: panel[0] != LOSS)
    first = training[:1] if LOSS in points else []
    evaluations: dict[tuple[str, bool], list[str]] = {}
    for key in points:
        if key.startswith(EVALUATION):
            fraction = all(0 <= value <= 1 for _, value in points[key])
            evaluations.setdefault((key.rpartition("/")[0], fraction), []).append(key)
    return first + [(title, keys) for (title, _), keys in evaluations.items()] + training[len(first) :]


def _curve(axes: "Axes", key: str, points: Sequence[tuple[int, float]], colour: str) -> None:
    chance = key.endswith("/chance")
    marked = (key.startswith(EVALUATION) or len(points) == 1) and not chance
    axes.plot(
        [step for step, _ in points],
        [value for _, value in points],
        color=GREY if chance else colour,
        linestyle="--" if chance else "-",
        linewidth=1.2,
        marker="o" if marked else None,
        markersize=3,
        label=key.rpartition("/")[2],
    )


def curves(
    rows: Sequence[Mapping[str, Any]],  # each {"step": int, "train/loss": float, "eval/shapes/top1": float, ...}
) -> "Figure":
    """Metrics over steps in small multiples, evaluations with a marker where they were run."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if "/" in key and value is not None:
                points.setdefault(key, []).append((row["step"], value))
    panels = _panels(points)
    num_columns = min(3, max(1, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = new_figure(3.5 * num_columns, 2.1 * num_rows)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, keys) in zip(grid, panels, strict=False):
        for index, key in enumerate(keys):
            _curve(axes, key, points[key], COLOURS[index % len(COLOURS)])
        if len(keys) > 1:
            axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.2, loc="best")
        axes.set_title(title, fontsize=NORMAL, loc="left")
        axes.set_xlabel("step", fontsize=SMALL)
        axes.set_xlim(0, 1.02 * max(1, *(row["step"] for row in rows)))
        axes.ticklabel_format(axis="y", useOffset=False)  # ticks that are told apart
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, color="#DDDDDD")
    return figure


def lines(
    series: Mapping[str, Sequence[float]],
    places: Sequence[float],  # of each value, from left to right
    title: str,
    labels: tuple[str, str],  # of the two axes
) -> "Figure":
    """A few series of values over the same places, with a legend beside them."""
    figure = new_figure(5.2, 3.0)
    axes = figure.subplots()
    for index, (name, values) in enumerate(series.items()):
        style = "-" if index < len(COLOURS) else "--"
        axes.plot(places, values, style, color=COLOURS[index % len(COLOURS)], marker="o", markersize=3, label=name)
    axes.set_xticks(places)
    axes.set_xlabel(labels[0], fontsize=SMALL)
    axes.set_ylabel(labels[1], fontsize=SMALL)
    axes.set_title(title, fontsize=NORMAL, loc="left", parse_math=False)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, color="#DDDDDD")
    axes.legend(fontsize=SMALL, frameon=False, handlelength=1.6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[float],  # one for each name, from 0 to 1
    title: str,
    chance: Sequence[float],  # likewise; none where that is not known
    limit: int = 40,
) -> "Figure":
    """Values by name, one below the other, each with its chance level; of more than `limit` the first and the last."""
    kept = list(range(len(names)))
    if len(kept) > limit:
        kept = kept[: limit // 2] + kept[len(kept) - limit + limit // 2 :]
        title = f"{title}; the first and last of {len(names)}"
    rows = range(len(kept))
    figure = new_figure(5.2, 0.9 + 0.2 * max(3, len(kept)))
    axes = figure.subplots()
    axes.barh(rows, [values[place] for place in kept], color=BLUE, height=0.7)
    if chance:
        axes.plot([chance[place] for place in kept], rows, "|", color=ORANGE, markersize=8, markeredgewidth=2)
    axes.set_yticks(rows, [wrap(names[place], 40, 1) for place in kept], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title(title if not chance else f"{title} (orange: chance)", fontsize=NORMAL, loc="left", parse_math=False)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    return figure

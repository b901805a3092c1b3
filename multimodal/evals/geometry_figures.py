"""Pictures of the space: how its directions are used, and where images and texts lie."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from multimodal.evals.drawing import BLUE, GREY, NORMAL, ORANGE, SMALL, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_SHOWN = 400
PAIRS_JOINED = 40


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=SMALL, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def spectrum(
    of_images: Tensor,  # [k] singular values, falling
    of_texts: Tensor,  # [k]
    image_rank: float,
    text_rank: float,
) -> "Figure":
    """The singular values of both modalities, as shares of the largest; a steep fall is a space that is hardly used."""
    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()
    for values, rank, name, colour in (
        (of_images, image_rank, "images", BLUE),
        (of_texts, text_rank, "texts", ORANGE),
    ):
        shares = (values / values.max().clamp(min=1e-30)).clamp(min=1e-6).numpy()
        label = f"{name}, effective rank {rank:.1f}"
        axes.plot(np.arange(1, len(shares) + 1), shares, color=colour, linewidth=1.4, label=label)
        axes.axvline(rank, color=colour, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(max(1e-6, axes.get_ylim()[0]), 1.3)
    axes.set_xlabel("singular value, from the largest", fontsize=NORMAL)
    axes.set_ylabel("share of the largest", fontsize=NORMAL)
    axes.legend(fontsize=SMALL, frameon=False)
    axes.grid(axis="y", linewidth=0.4, color="#DDDDDD")
    _plain(axes)
    return figure


def plane(
    image_features: Tensor,  # [n, D]
    text_features: Tensor,  # [m, D]
    owners: Tensor,  # int64 [m] the image that each caption belongs to
    gap: float,
) -> "Figure":
    """The first two principal components of both modalities together, and a few pairs joined by lines.

    Components are those of all samples, each modality with the same weight; drawn are the first few hundred.
    """
    images, texts = image_features.double(), text_features.double()
    centre = (images.mean(dim=0) + texts.mean(dim=0)) / 2
    scaled = torch.cat([(images - centre) / len(images) ** 0.5, (texts - centre) / len(texts) ** 0.5])
    _, values, directions = torch.linalg.svd(scaled, full_matrices=False)
    shares = 100 * values.square() / values.square().sum().clamp(min=1e-30)
    shown = min(POINTS_SHOWN, len(images))
    first = torch.searchsorted(owners, torch.arange(shown))
    x, y = ((part - centre) @ directions[:2].T for part in (images[:shown], texts[first]))

    figure = new_figure(4.8, 4.6)
    axes = figure.subplots()
    step = max(1, shown // PAIRS_JOINED)
    for one, other in zip(x[::step].tolist(), y[::step].tolist(), strict=True):
        axes.plot([one[0], other[0]], [one[1], other[1]], color=GREY, linewidth=0.5, alpha=0.6, zorder=1)
    for points, name, colour in ((x, "images", BLUE), (y, "texts", ORANGE)):
        axes.scatter(points[:, 0], points[:, 1], s=7, color=colour, linewidths=0, alpha=0.7, label=name, zorder=2)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"component 1 ({shares[0]:.0f}% of the variance)", fontsize=NORMAL)
    axes.set_ylabel(f"component 2 ({shares[1]:.0f}%)", fontsize=NORMAL)
    axes.set_title(f"modality gap {gap:.2f}", fontsize=NORMAL, loc="left")
    axes.legend(fontsize=SMALL, frameon=False, markerscale=2)
    _plain(axes)
    return figure

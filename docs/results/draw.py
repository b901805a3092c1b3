"""Draw what docs/results.md shows from the tables beside this file: `uv run python docs/results/draw.py`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.compute as pc
from pyarrow import csv

HERE = Path(__file__).parent
BLUE, ORANGE = "#0072b2", "#d55e00"
PANELS = (("shapes", "top1", "top-1, %"), ("flickr8k", "t2i_r10", "text to image R@10, %"))


def batch_and_loss() -> None:
    """Every run is a point; the line goes through the mean of what three seeds gave, or of the best learning rate."""
    table = csv.read_csv(HERE / "batch_and_loss.csv")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, (data, metric, title) in zip(axes, PANELS, strict=True):
        of = table.filter(pc.and_(pc.equal(table["data"], data), pc.equal(table["metric"], metric)))
        for loss, color in (("infonce", BLUE), ("sigmoid", ORANGE)):
            one = of.filter(pc.equal(of["loss"], loss))
            batch, value, lr, seed = (one[name].to_numpy() for name in ("global_batch_size", "value", "lr", "seed"))
            axis.plot(batch, 100 * value, ".", color=color, alpha=0.4)
            sizes = np.unique(batch)
            chosen = [lr[(batch == size) & (seed == 2)][0] for size in sizes]  # only the best got more seeds
            means = [
                100 * value[(batch == size) & (lr == rate)].mean() for size, rate in zip(sizes, chosen, strict=True)
            ]
            axis.plot(sizes, means, color=color, label=loss)
        axis.set(xscale="log", xlabel="batch", ylabel=title, title=data, ylim=(0, None))
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(HERE.parent / "images" / "batch_and_loss.png", dpi=110)


def space() -> None:
    """Every run is a point, lines go through means; the level is that of the default, learned and 128 wide."""
    table = csv.read_csv(HERE / "space.csv")
    scale, width, learned, top1 = (table[name].to_numpy() for name in ("logit_scale", "embed_dim", "learned", "top1"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True, sharey=True)
    for axis, x, drawn, title in (
        (axes[0], scale, ~learned, "logit scale (1 / temperature), fixed"),
        (axes[1], width, learned, "embedding dimension"),
    ):
        axis.plot(x[drawn], 100 * top1[drawn], ".", color=BLUE, alpha=0.4)
        places = np.unique(x[drawn])
        axis.plot(places, [100 * top1[drawn & (x == place)].mean() for place in places], color=BLUE)
        axis.axhline(100 * top1[learned & (width == 128)].mean(), color=ORANGE, lw=1, label="the default's mean")
        axis.set(xscale="log", xlabel=title)
        axis.set_xticks(places, [f"{place:.3g}" for place in places], minor=False)
        axis.minorticks_off()
        axis.legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("shapes, top-1, %")
    figure.savefig(HERE.parent / "images" / "space.png", dpi=110)


def scaling() -> None:
    """The law of five widths, what it foretold of a sixth, and what came."""
    fitted, came = csv.read_csv(HERE / "scaling.csv"), csv.read_csv(HERE / "scaling-came.csv")
    foretold = json.loads((HERE / "scaling-foretold.jsonl").read_text().splitlines()[0])
    a, b, c = (foretold["law"][name]["value"] for name in "abc")
    figure, axis = plt.subplots(figsize=(5.5, 3.6), constrained_layout=True)
    flops = np.geomspace(fitted["flops"].to_numpy().min(), foretold["x"])
    axis.plot(flops, 100 * (a + b * flops**-c), color=BLUE, label="the law")
    axis.plot(fitted["flops"], 100 * fitted["error"].to_numpy(), ".", color=BLUE, alpha=0.5, label="fitted, GPU")
    axis.vlines(foretold["x"], 100 * foretold["low"], 100 * foretold["high"], color=BLUE, alpha=0.5, label="foretold")
    axis.plot(came["flops"], 100 * came["error"].to_numpy(), "x", color=ORANGE, label="came after, CPU")
    axis.set(xscale="log", xlabel="FLOPs of training", ylabel="error on shapes, %", ylim=(0, None))
    axis.set_xticks([3e12, 1e13, 3e13], ["3e12", "1e13", "3e13"], minor=False)
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(HERE.parent / "images" / "scaling_came.png", dpi=110)


if __name__ == "__main__":
    batch_and_loss()
    space()
    scaling()

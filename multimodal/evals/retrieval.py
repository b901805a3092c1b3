"""Retrieval between images and captions in both directions, with any number of captions an image."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.views import Inputs
from multimodal.evals import figures
from multimodal.parts import Dataset, Encoder, Eval, Report, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS_SHOWN = 32
QUERIES_SHOWN = 6
IMAGES_SHOWN = 5

# --- metrics --------------------------------------------------------------------------------------------------------


def best_ranks(
    scores: Tensor,  # [n, m] of every query with every item
    right: Tensor,  # bool [n, m] which items are right for which query
) -> Tensor:  # int64 [n], from 1
    """The place of each query's best right item: 1 + the wrong ones that do not score below it.

    So ties count against the model, and NaN too: one that gives all items the same score, or none, comes last. Other
    right items do not stand in the way. A query without a right item comes after all.
    """
    best = torch.where(right, scores, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + (~(scores < best) & ~right).sum(dim=1)


def retrieval_ranks(
    image_features: Tensor,  # [n, D] unit norm
    text_features: Tensor,  # [m, D] unit norm
    owners: Tensor,  # int64 [m] the image that each caption belongs to
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:  # int64 [n] image to text, int64 [m] text to image
    """For each image the rank of its best caption, for each caption the rank of its image, by cosine.

    Only a caption's own image is right: the same words under another image are wrong, as in the usual protocol for
    Flickr30k and COCO (Karpathy and Fei-Fei 2015). Memory grows with `chunk`, the queries at a time, not with n x m.
    """
    images, texts = torch.arange(len(image_features)), torch.arange(len(text_features))
    image_to_text = [
        best_ranks(image_features[rows] @ text_features.T, rows[:, None] == owners)
        for rows in torch.split(images, chunk)
    ]
    text_to_image = [
        best_ranks(text_features[rows] @ image_features.T, owners[rows, None] == images)
        for rows in torch.split(texts, chunk)
    ]
    return torch.cat(image_to_text), torch.cat(text_to_image)


def rank_metrics(
    ranks: Tensor,  # int64 [n], from 1
    direction: str,
) -> dict[str, float]:
    """Recall at 1, 5, 10 and the median and mean rank, as `<direction>_r1`, `<direction>_median_rank`.

    "Recall" as retrieval papers on images use it: a query is a hit if any right item is among the first k, so with
    five captions an image it is the hit rate, not the share of the five that were found.
    """
    recalls = {f"{direction}_r{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return {
        **recalls,
        f"{direction}_median_rank": ranks.double().quantile(0.5).item(),
        f"{direction}_mean_rank": ranks.double().mean().item(),
    }


# --- figures --------------------------------------------------------------------------------------------------------


def pick_queries(
    ranks: Tensor,  # int64 [m], from 1
    count: int = QUERIES_SHOWN,
) -> list[int]:
    """At most `count` queries for a picture, spread over the data: half answered at rank 1, half not, if possible."""
    hits, misses = (ranks == 1).nonzero().flatten().tolist(), (ranks > 1).nonzero().flatten().tolist()
    missed = _spread(misses, max(count // 2, count - len(hits)))
    return _spread(hits, count - len(missed)) + missed


def _spread(items: list[int], count: int) -> list[int]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def nearest(
    scores: Tensor,  # [n] of one query with every item
    own: int,
    rank: int,
    count: int = IMAGES_SHOWN,
) -> list[int]:
    """A query's first `count` items, best first, with its `own` one at its `rank`: behind those that it ties with."""
    order = [item for item in scores.argsort(descending=True).tolist() if item != own]
    return [*order[: rank - 1], own, *order[rank - 1 :]][:count]


def _grid(
    images: Inputs, captions: list[str], owners: Tensor, ranks: Tensor, image_features: Tensor, text_features: Tensor
) -> "Figure":
    queries = []
    for index in pick_queries(ranks):
        own, rank = int(owners[index]), int(ranks[index])
        shown = nearest(image_features @ text_features[index], own, rank)
        queries.append(figures.Query(captions[index], rank, images[own], [images[item] for item in shown]))
    return figures.retrieval_grid(queries, len(images))


# --- evaluation -----------------------------------------------------------------------------------------------------


class Retrieval(Eval):
    """Find an image's captions among all captions (i2t), and a caption's image among all images (t2i).

    Metrics for each direction: `r1`, `r5`, `r10` (hit rate among the first k), `median_rank`, `mean_rank` (from 1).
    """

    dataset: Dataset
    """Images with captions."""
    max_samples: int | None = Field(gt=0)
    """Take only the first so many images; null for all. Recall is easier among fewer, so compare equal numbers."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(
            f"{direction}_{metric}"
            for direction in ("i2t", "t2i")
            for metric in ("r1", "r5", "r10", "median_rank", "mean_rank")
        )

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        source = data.open(self.dataset)
        images = Inputs(source, "image", self.max_samples)
        if len(images) == 0:
            raise ValueError("the dataset is empty: retrieval needs images with captions")
        pairs = [(caption, place) for place in images.places for caption in source.captions(place)]
        captions, owners = [caption for caption, _ in pairs], torch.tensor([place for _, place in pairs])
        if missing := set(images.places).difference(owners.tolist()):
            raise ValueError(f"sample {min(missing)} of the dataset has no caption: retrieval needs one for each image")
        return partial(self._run, images, captions, owners)

    def _run(self, images: Inputs, captions: list[str], owners: Tensor, encoder: Encoder) -> Report:
        image_features, text_features = encoder.encode("image", images), encoder.encode("text", captions)
        image_to_text, text_to_image = retrieval_ranks(image_features, text_features, owners)
        first = torch.searchsorted(owners, torch.arange(min(PAIRS_SHOWN, len(images))))
        similarity = image_features[: len(first)] @ text_features[first].T
        drawn: dict[str, Callable[[], Figure]] = {
            "retrieval_grid": partial(_grid, images, captions, owners, text_to_image, image_features, text_features),
            "similarity_matrix": partial(figures.similarity_matrix, similarity, [captions[i] for i in first]),
        }
        return Report({**rank_metrics(image_to_text, "i2t"), **rank_metrics(text_to_image, "t2i")}, drawn)

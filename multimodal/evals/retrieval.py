"""Retrieval between images and captions in both directions, with any number of captions an image."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from multimodal import distributed
from multimodal.data.views import Inputs
from multimodal.evals import figures
from multimodal.evals.ranking import METRICS, Matches, rank_metrics, ranked
from multimodal.parts import Dataset, Encoder, Eval, Report, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS_SHOWN = 32
QUERIES_SHOWN = 6
IMAGES_SHOWN = 5
DIRECTIONS = "i2t", "t2i"

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
    right: Tensor,  # bool [n]
    own: int,  # the one of the right items that is shown
    rank: int,
    count: int = IMAGES_SHOWN,
) -> list[int]:
    """A query's first `count` items, best first, with its `own` one at its `rank`: behind those that it ties with."""
    order = [item for item in scores.argsort(descending=True).tolist() if not right[item]]
    return [*order[: rank - 1], own, *order[rank - 1 :]][:count]


# --- evaluation -----------------------------------------------------------------------------------------------------


def digests(images: Inputs) -> Tensor:  # int64 [n]
    """A number for each image, equal where size and pixels are; each rank reads its share."""
    bounds = [len(images) * r // distributed.world_size() for r in range(distributed.world_size() + 1)]
    mine = range(bounds[distributed.rank()], bounds[distributed.rank() + 1])
    hide = True if distributed.rank() else None  # None hides it where there is no terminal
    found = torch.empty(len(mine), dtype=torch.int64)
    for place in tqdm(mine, desc="comparing images", unit="", leave=False, delay=1, disable=hide):
        image = images[place]
        digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=8).digest()
        found[place - mine.start] = int.from_bytes(digest, "big", signed=True)
    return distributed.gather_uneven(found, [end - start for start, end in pairwise(bounds)])


class Retrieval(Eval):
    """Find an image's captions among all captions (i2t), and a caption's image among all images (t2i).

    Metrics for each direction: `r1`, `r5`, `r10` (hit rate among the first k), `median_rank` and `mean_rank` (from 1),
    `mrr` (mean reciprocal rank), `ndcg10`.
    """

    dataset: Dataset
    """Images with captions."""
    max_samples: int | None = Field(gt=0)
    """Take only the first so many images; null for all. Recall is easier among fewer, so compare equal numbers."""
    duplicates: Literal["right", "wrong"] = "right"
    """What the same words under another image are, and an image that is there twice. Papers on Flickr30k and COCO count
    only a caption's own image as right, as if there were none: wrong."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"{direction}_{metric}" for direction in DIRECTIONS for metric in METRICS)

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        source = data.open(self.dataset)
        images = Inputs(source, "image", self.max_samples)
        if len(images) == 0:
            raise ValueError("the dataset is empty: retrieval needs images with captions")
        pairs = [(caption, place) for place in images.places for caption in source.captions(place)]
        captions, owners = [caption for caption, _ in pairs], torch.tensor([place for _, place in pairs])
        if missing := set(images.places).difference(owners.tolist()):
            raise ValueError(f"sample {min(missing)} of the dataset has no caption: retrieval needs one for each image")
        return _Run(images, captions, owners, self.duplicates == "right")


@dataclass
class _Run:
    """An evaluation whose data are open."""

    images: Inputs
    captions: Sequence[str]
    owners: Tensor  # int64 [m] the image of each caption
    alike: bool  # whether what is equal is as right as what belongs together

    @cached_property
    def matches(self) -> Matches:
        if not self.alike:
            return Matches.of(self.owners, torch.arange(len(self.images)), torch.arange(len(self.captions)))
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        texts = torch.tensor([numbers[caption] for caption in self.captions])
        return Matches.of(self.owners, digests(self.images), texts)

    def __call__(self, encoder: Encoder) -> Report:
        images, texts = encoder.encode("image", self.images), encoder.encode("text", self.captions)
        to_texts, to_images = self.matches, self.matches.reversed
        i2t, t2i = ranked(images, texts, to_texts), ranked(texts, images, to_images)
        found = {
            "i2t": rank_metrics(*i2t, to_texts.counts, len(texts)),
            "t2i": rank_metrics(*t2i, to_images.counts, len(images), self.owners),
        }
        first = torch.searchsorted(self.owners, torch.arange(min(PAIRS_SHOWN, len(images))))
        similarity = images[: len(first)] @ texts[first].T
        drawn: dict[str, Callable[[], Figure]] = {
            "retrieval_grid": partial(self._grid, t2i[0], images, texts),
            "similarity_matrix": partial(figures.similarity_matrix, similarity, [self.captions[i] for i in first]),
        }
        metrics = {f"{direction}_{name}": one for direction, by_name in found.items() for name, one in by_name.items()}
        return Report(metrics, drawn)

    def _grid(self, ranks: Tensor, images: Tensor, texts: Tensor) -> "Figure":
        queries = []
        for index in pick_queries(ranks):
            own, rank = int(self.owners[index]), int(ranks[index])
            right = self.matches.reversed.right(torch.tensor([index]))[0]
            shown = nearest(images @ texts[index], right, own, rank)
            found = [self.images[item] for item in shown]
            queries.append(figures.Query(self.captions[index], rank, self.images[own], found))
        return figures.retrieval_grid(queries, len(images))

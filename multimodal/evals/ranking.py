"""Ranks of what was searched for: which items are right, where they come, and where chance would put them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from multimodal.evals.intervals import means, median
from multimodal.parts import Estimate

TILE = 2**22
"""Scores in memory at a time."""
RECALLS = 1, 5, 10
CUT = 10
"""Places that nDCG looks at."""
METRICS = *(f"r{k}" for k in RECALLS), "median_rank", "mean_rank", "mrr", "ndcg10"

# --- what is right --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """Which captions are right for which images: pairs of the two, and all that are equal to a pair's."""

    images: Tensor
    """int64 [n], equal for images that are the same."""
    texts: Tensor
    """int64 [m], equal for captions that are the same."""
    pairs: Tensor
    """int64 [p, 2], an image's number and a caption's, each pair once."""

    @classmethod
    def of(
        cls,
        owners: Tensor,  # int64 [m] the image that each caption belongs to
        images: Tensor,  # int64 [n], equal for images that are the same
        texts: Tensor,  # int64 [m], likewise for captions
    ) -> "Matches":
        """A caption is right for its image, for all that equal this one, and so are all captions that equal it."""
        image_ids, text_ids = (torch.unique(ids, return_inverse=True)[1] for ids in (images, texts))
        return cls(image_ids, text_ids, torch.unique(torch.stack([image_ids[owners], text_ids], dim=1), dim=0))

    @property
    def reversed(self) -> "Matches":
        """The same for captions that look for images."""
        return Matches(self.texts, self.images, self.pairs.flip(1))

    @cached_property
    def _by_number(self) -> tuple[list[Tensor], list[Tensor]]:
        """The numbers of right captions by image number, and the places of captions by their number."""
        count = int(self.images.max()) + 1 if len(self.images) else 0
        order, sizes = self.pairs[:, 0].argsort(stable=True), torch.bincount(self.pairs[:, 0], minlength=count)
        places, copies = self.texts.argsort(stable=True), torch.bincount(self.texts)
        by_image = torch.split(self.pairs[order, 1], sizes.tolist())
        return list(by_image), list(torch.split(places, copies.tolist()))

    def of_image(self, image: int) -> Tensor:  # int64 [g]
        """The places of the captions that are right for an image."""
        numbers, places = self._by_number
        found = [places[number] for number in numbers[int(self.images[image])].tolist()]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def right(
        self,
        rows: Tensor,  # int64 [r] places of images
    ) -> Tensor:  # bool [r, m]
        """Which captions are right for some images."""
        mask = torch.zeros(len(rows), len(self.texts), dtype=torch.bool)
        for row, image in zip(mask, rows.tolist(), strict=True):
            row[self.of_image(image)] = True
        return mask

    @property
    def counts(self) -> Tensor:  # int64 [n]
        """How many captions are right for each image."""
        copies = torch.bincount(self.texts, minlength=int(self.texts.max()) + 1)
        found = torch.zeros(int(self.images.max()) + 1, dtype=torch.int64)
        return found.index_add(0, self.pairs[:, 0], copies[self.pairs[:, 1]])[self.images]


# --- metrics --------------------------------------------------------------------------------------------------------


def best_ranks(
    scores: Tensor,  # [n, m] of every query with every item
    right: Tensor,  # bool [n, m] which items are right for which query
) -> Tensor:  # int64 [n], from 1
    """The place of each query's best right item: 1 + the wrong ones that do not score below it.

    So ties count against the model, and NaN too: one that gives all items the same score, or none, comes last. Other
    right items do not stand in the way. A query without a right item comes after all.
    """
    return _ranks_and_gains(scores.clone(), _places(right))[0]


def ndcg(
    scores: Tensor,  # [n, m] of every query with every item
    right: Tensor,  # bool [n, m]
) -> Tensor:  # float64 [n]
    """Normalised discounted cumulative gain of the first ten items, where an item is right or wrong.

    Where nothing ties it is that of trec_eval, and so of MTEB; there ties are broken by the items' names, here
    against the model. 0 for a query without a right item. Järvelin and Kekäläinen 2002.
    """
    return _ranks_and_gains(scores.clone(), _places(right))[1]


def _ranks_and_gains(scores: Tensor, right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both at once, from the places [g] of each query's right items; scores are written over.

    Row by row: temporaries of a tile's size, with small results kept between them, make the heap grow without end.
    """
    k, found = min(CUT, scores.shape[1]), torch.tensor([len(places) for places in right])
    hits, wrong = torch.full((2, len(scores), k), -torch.inf, dtype=scores.dtype)  # the best right and wrong ones
    above = torch.empty(len(scores), dtype=torch.int64)
    for number, (row, places) in enumerate(zip(scores, right, strict=True)):
        best = row[places].nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True).values[:k]
        hits[number, : len(best)] = best
        row.nan_to_num_(torch.inf, torch.inf, -torch.inf)
        row[places] = -torch.inf  # which come last
        above[number] = (row >= hits[number, 0]).sum()
        wrong[number] = row.topk(k).values
    num_wrong, order = scores.shape[1] - found, torch.arange(1, k + 1)
    before = ((wrong[:, None, :] >= hits[:, :, None]) & (order <= num_wrong[:, None])[:, None, :]).sum(dim=2)
    places = order + before  # [n, k], of the first right one, the second, ...
    gained = torch.where((places <= k) & (order <= found[:, None]), 1 / torch.log2(1 + places.double()), 0.0)
    ideal = (1 / torch.log2(1 + order.double())).cumsum(0)[found.clamp(1, k) - 1]
    return 1 + above.minimum(num_wrong), gained.sum(dim=1) / ideal


def _places(right: Tensor) -> list[Tensor]:
    return [row.nonzero().flatten() for row in right]


def ranked(
    queries: Tensor,  # [n, D] unit norm
    items: Tensor,  # [m, D] unit norm
    matches: Matches,  # of queries (its images) and items (its texts)
    tile: int = TILE,  # scores in memory at a time
) -> tuple[Tensor, Tensor]:  # int64 [n] ranks from 1, float64 [n] nDCG@10
    """For each query the rank of its best right item by cosine, and its nDCG@10.

    Exact, in tiles of some queries with all items: memory grows with n and m, not with their product.
    """
    ranks, gains = torch.empty(len(queries), dtype=torch.int64), torch.empty(len(queries), dtype=torch.float64)
    size = max(1, tile // max(1, len(items)))
    scores = torch.empty(min(size, len(queries)), len(items), dtype=queries.dtype)
    for rows in torch.split(torch.arange(len(queries)), size):
        some = torch.mm(queries[rows], items.T, out=scores[: len(rows)])
        ranks[rows], gains[rows] = _ranks_and_gains(some, [matches.of_image(row) for row in rows.tolist()])
    return ranks, gains


def rank_metrics(
    ranks: Tensor,  # int64 [n], from 1
    gains: Tensor,  # [n] nDCG@10
    num_right: Tensor,  # int64 [n] of each query
    num_items: int,
    groups: Tensor | None = None,  # int64 [n], queries that are drawn together: the captions of an image
) -> dict[str, Estimate]:
    """`r1`, `r5`, `r10`, `mrr`, `ndcg10`, `mean_rank`, `median_rank`, each with its chance level and interval.

    "Recall" as retrieval papers on images use it: a query is a hit if any right item is among the first k, so with
    five captions an image it is the hit rate, as in CLIP_benchmark, and not the share of the five that were found,
    as in MTEB. The reciprocal rank is over all items; MTEB's is 0 beyond its k.
    """
    scores = {f"r{k}": ranks <= k for k in RECALLS}
    scores |= {"mrr": 1 / ranks.double(), "ndcg10": gains, "mean_rank": ranks}
    chance = chance_metrics(num_right, num_items)
    return {**means(scores, chance, groups), "median_rank": median(ranks, chance["median_rank"], groups)}


def chance_metrics(
    num_right: Tensor,  # int64 [n] of each query
    num_items: int,
) -> dict[str, float]:
    """What an order of items at random gives on average; of the median rank, the median."""
    found, times = torch.unique(num_right, return_counts=True)
    share = times.double() / times.sum()
    g, m = found.double()[:, None], float(num_items)
    place = torch.arange(num_items, dtype=torch.float64)
    left = torch.cumprod(((m - g - place) / (m - place)).clamp(min=0), dim=1)  # [., m] no right one among the first k
    beyond = torch.cat([torch.ones_like(g), left], dim=1)  # that the rank is above k = 0, 1, ..., m
    first = (beyond[:, :-1] - beyond[:, 1:]) / (1 + place)
    discounts = 1 / torch.log2(2 + place[:CUT])
    ideal = discounts.cumsum(0)[(found.clamp(1, len(discounts)) - 1)]
    by_count = {
        **{f"r{k}": 1 - beyond[:, min(k, num_items)] for k in RECALLS},
        "mrr": torch.where(found > 0, first.sum(dim=1), 1 / (1 + m)),
        "ndcg10": found / m * discounts.sum() / ideal,
        "mean_rank": 1 + (m - found) / (found + 1),
    }
    mixed = (share[:, None] * beyond).sum(dim=0)
    middle = int((mixed <= 0.5).nonzero()[0]) if (mixed <= 0.5).any() else num_items + 1
    return {**{name: (share * values).sum().item() for name, values in by_count.items()}, "median_rank": float(middle)}

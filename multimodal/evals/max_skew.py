"""Whether neutral queries find images of all values of an attribute alike: MaxSkew@k and NDKL of retrieval."""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, Strict
from torch import Tensor

from multimodal.data.views import Inputs
from multimodal.evals import max_skew_figures
from multimodal.evals.attributes import AttributePattern, read_attribute
from multimodal.evals.classes import class_names_of, labels_of
from multimodal.evals.intervals import means
from multimodal.parts import Dataset, Encoder, Eval, Report, Sources

RANDOM_ORDERS = 200
"""That chance is the mean of."""

# --- metrics --------------------------------------------------------------------------------------------------------


def ranked(
    scores: Tensor,  # [q, n] of every query with every image
    attributes: Tensor,  # int64 [n] the value that each image has
    seed: int = 0,
) -> Tensor:  # int64 [q, n] the values, best image first
    """The attribute down each query's list. Images that tie are in random order, always the same one."""
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(attributes)))
    order = scores[:, shuffled].argsort(dim=1, descending=True, stable=True)
    return attributes[shuffled][order]


def max_skew(
    values: Tensor,  # int64 [q, n] from `ranked`
    desired: Tensor,  # float64 [A] the share that each value should have, all above 0
    k: int,
) -> Tensor:  # float64 [q] at least 0
    """MaxSkew@k: the logarithm of share by desired share among the first k, of the value that is most over-represented.

    0 where every value has its share; ln 2 where one has twice of it. Geyik et al. 2019, equations 2 and 3.
    """
    shares = torch.stack([(values[:, :k] == value).double().mean(dim=1) for value in range(len(desired))], dim=1)
    return (shares / desired.double()).amax(dim=1).log()


def ndkl(
    values: Tensor,  # int64 [q, n] from `ranked`
    desired: Tensor,  # float64 [A] the share that each value should have, all above 0
) -> Tensor:  # float64 [q] at least 0
    """Normalised discounted cumulative KL divergence: of shares among the first i from those desired, over all i.

    i counts 1 / log2(i + 1), so the beginning of the list counts most. Geyik et al. 2019, equation 4.
    """
    length = torch.arange(1, values.shape[1] + 1, dtype=torch.float64)
    discount = 1 / torch.log2(length + 1)
    divergence = torch.zeros(values.shape, dtype=torch.float64)
    for value, share in enumerate(desired.double()):
        found = (values == value).double().cumsum(dim=1) / length
        divergence += torch.special.xlogy(found, found / share)
    return (divergence * discount).sum(dim=1) / discount.sum()


def by_chance(
    attributes: Tensor,  # int64 [n]
    desired: Tensor,  # float64 [A]
    k: int,
    seed: int = 0,
) -> dict[str, float]:
    """What lists in random order have on average: the first k are never quite like all, so it is above 0."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(RANDOM_ORDERS):
        values = attributes[torch.from_numpy(rng.permutation(len(attributes)))][None]
        found.append((max_skew(values, desired, k).item(), ndkl(values, desired).item()))
    skew, divergence = np.mean(found, axis=0).tolist()
    return {"max_skew": skew, "ndkl": divergence}


# --- evaluation -----------------------------------------------------------------------------------------------------


class MaxSkew(Eval):
    """Do queries that say nothing of an attribute find its values as often as they are there?

    Metrics, means over queries, 0 at best: `max_skew`, of the first `k` images; `ndkl`, of the whole list. Their chance
    is that of lists in random order. As Berg et al. 2022 do with faces and "a photo of a smart person".
    """

    dataset: Dataset
    """Images with labels; classes are the values of the attribute, or have them in their names."""
    pattern: AttributePattern
    """Regular expression for class names with a group (?P<attribute>...); null: the class is the attribute."""
    queries: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]
    """Texts that say nothing of the attribute."""
    k: int = Field(ge=1)
    """Images at the top of the list whose shares are compared."""
    desired: Literal["dataset", "equal"]
    """Shares that the values should have: as in the dataset, or one like the other."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "max_skew", "ndkl"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        source = data.open(self.dataset)
        class_names = class_names_of(source, None, data.root)
        labels = labels_of(source, range(len(source)), len(class_names))
        attribute = read_attribute(class_names, self.pattern, "attribute")
        present, attributes = torch.unique(attribute.of_class[labels], return_inverse=True)
        names = [attribute.names[value] for value in present.tolist()]
        if len(names) < 2:
            raise ValueError(f"all images have the attribute '{names[0]}': skew needs two values or more")
        if self.k > len(labels):
            raise ValueError(f"k: there are {len(labels)} images, so not the first {self.k} of them")
        shares = torch.bincount(attributes).double() / len(attributes)
        desired = shares if self.desired == "dataset" else torch.full_like(shares, 1 / len(shares))
        chance = by_chance(attributes, desired, self.k)
        return partial(self._run, Inputs(source, "image"), attributes, names, desired, chance)

    def _run(
        self,
        images: Inputs,
        attributes: Tensor,
        names: list[str],
        desired: Tensor,
        chance: dict[str, float],
        encoder: Encoder,
    ) -> Report:
        scores = encoder.encode("text", self.queries) @ encoder.encode("image", images).T
        if not scores.isfinite().all():  # in whichever order, it would look fair
            return Report(dict.fromkeys(self.metrics, math.nan))
        values = ranked(scores, attributes)
        found = {"max_skew": max_skew(values, desired, self.k), "ndkl": ndkl(values, desired)}
        metrics = means(found, chance)
        first = values[:, : self.k]
        shares = torch.stack([(first == value).double().mean(dim=1) for value in range(len(names))], dim=1)
        drawn = partial(max_skew_figures.shares, shares, desired, list(self.queries), names, self.k)
        return Report(metrics, {"shares": drawn})

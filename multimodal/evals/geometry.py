"""Geometry of the space: how images and texts lie in it, and what that costs retrieval."""

import math
from collections.abc import Callable
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.views import Inputs
from multimodal.evals import geometry_figures
from multimodal.evals.intervals import bootstrap, means
from multimodal.evals.ranking import Matches
from multimodal.evals.retrieval import digests
from multimodal.evals.space import (
    CHANGES,
    alignment,
    anisotropy,
    effective_rank,
    hubness,
    k_occurrence,
    margins,
    modality_gap,
    retrieval_after,
    separability,
    spectrum,
    uniformity,
)
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Opened:
    """Images with their captions; which of them are the same is found when it is asked for first."""

    def __init__(self, images: Inputs) -> None:
        self.images = images
        pairs = [(caption, place) for place in images.places for caption in images.source.captions(place)]
        self.captions = [caption for caption, _ in pairs]
        self.owners = torch.tensor([place for _, place in pairs], dtype=torch.int64)

    @cached_property
    def matches(self) -> Matches:
        """What is right for what; reads the images once more, for those that are there twice."""
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        return Matches.of(self.owners, digests(self.images), torch.tensor([numbers[one] for one in self.captions]))

    @cached_property
    def siblings(self) -> Tensor:
        """int64 [p, 2] pairs of captions of one image."""
        bounds = [0, *torch.bincount(self.owners).cumsum(dim=0).tolist()]
        pairs = [torch.combinations(torch.arange(a, b)) for a, b in pairwise(bounds)]
        return torch.cat(pairs)


class Geometry(Eval):
    """How images and texts lie in the space: together or apart, spread or in few directions, and what that costs.

    Metrics: `alignment` (squared distance of pairs; `alignment_text`: of captions of one image, where there are
    several), `uniformity_*`, `modality_gap` and `modality_separability` (a linear classifier's accuracy, 0.5 if they
    are mixed), `effective_rank_*`, `anisotropy_*` (mean cosine of random pairs), `hubness_*` and `anti_hubs_*` of
    retrieval, `margin_*` of pairs over the hardest negative, and on one half of the images `i2t_r1`, `t2i_r1`
    as they are, `_centred` and `_whitened` by the other half.
    """

    dataset: Dataset
    """Images with captions."""
    max_samples: int | None = Field(ge=10)
    """Take only the first so many images; null for all. Compare equal numbers: most of these depend on it."""
    k: int = Field(ge=1)
    """Neighbours of a query that are counted for hubness; 10 is usual."""

    @property
    def metrics(self) -> tuple[str, ...]:
        modalities, directions = ("image", "text"), ("i2t", "t2i")
        return (
            "alignment",
            *(f"uniformity_{which}" for which in (*modalities, "cross")),
            "modality_gap",
            "modality_separability",
            *(f"{name}_{modality}" for name in ("effective_rank", "anisotropy") for modality in modalities),
            *(f"{name}_{direction}" for name in ("hubness", "anti_hubs", "margin") for direction in directions),
            *(f"{direction}_{name}" for direction in directions for name in CHANGES),
        )

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        images = Inputs(data.open(self.dataset), "image", self.max_samples)
        if len(images) < max(10, self.k):
            least = f"{self.k}, as k says" if self.k > 10 else "10"
            raise ValueError(f"the dataset has {len(images)} images: its geometry needs at least {least}")
        opened = _Opened(images)
        if missing := set(images.places).difference(opened.owners.tolist()):
            key = images.source.key(min(missing))
            raise ValueError(f"sample {min(missing)} of the dataset ({key}) has no caption: each image needs one")
        return partial(self._run, opened)

    def _run(self, opened: _Opened, encoder: Encoder) -> Report:
        images, texts = encoder.encode("image", opened.images), encoder.encode("text", opened.captions)
        if not (images.isfinite().all() and texts.isfinite().all()):
            return Report(dict.fromkeys(self.metrics, math.nan))
        spectra = spectrum(images), spectrum(texts)
        metrics = {
            **_distances(opened, images, texts),
            **_spread(opened, images, texts, spectra),
            **_neighbours(opened, images, texts, self.k),
            **retrieval_after(images, texts, opened.owners, opened.matches),
        }
        drawn: dict[str, Callable[[], Figure]] = {
            "spectrum": partial(geometry_figures.spectrum, *spectra, *map(effective_rank, spectra)),
            "map": partial(geometry_figures.plane, images, texts, opened.owners, metrics["modality_gap"].value),
        }
        return Report(metrics, drawn)


def _distances(opened: _Opened, images: Tensor, texts: Tensor) -> dict[str, Estimate]:
    """Within pairs, between all others, between the means."""
    owners, places = opened.owners, torch.arange(len(images))
    first = torch.searchsorted(owners, places)
    sums = torch.zeros(images.shape, dtype=torch.float64).index_add(0, owners, texts.double())
    sizes, doubles = torch.bincount(owners).double(), images.double()

    def gaps(drawn: Tensor) -> Tensor:
        of_images = drawn @ doubles / drawn.sum(dim=1, keepdim=True)
        distances: Tensor = torch.linalg.vector_norm(of_images - drawn @ sums / (drawn @ sizes)[:, None], dim=1)
        return distances

    low, high = bootstrap(gaps, len(images))
    metrics = means({"alignment": alignment(images[owners], texts)}, groups=owners)
    if len(opened.siblings):
        one, other = opened.siblings.unbind(dim=1)
        _, groups = torch.unique(owners[one], return_inverse=True)
        metrics |= means({"alignment_text": alignment(texts[one], texts[other])}, groups=groups)
    return metrics | {
        "uniformity_image": Estimate(uniformity(images, places), count=len(images)),
        "uniformity_text": Estimate(uniformity(texts, owners), count=len(texts)),
        "uniformity_cross": Estimate(uniformity(images, places, texts, owners), count=len(texts)),
        "modality_gap": Estimate(modality_gap(images, texts), low.item(), high.item(), count=len(images)),
        **means(
            {"modality_separability": separability(images, texts[first])},
            {"modality_separability": 0.5},
            groups=places.repeat(2),
        ),
    }


def _spread(opened: _Opened, images: Tensor, texts: Tensor, spectra: tuple[Tensor, Tensor]) -> dict[str, Estimate]:
    """Over how many directions, and whether to one side."""
    metrics: dict[str, Estimate] = {}
    groups = torch.arange(len(images)), opened.owners
    for name, features, owners, values in zip(("image", "text"), (images, texts), groups, spectra, strict=True):
        mean_cosine = anisotropy(features, owners)
        value = mean_cosine(torch.ones(1, len(images), dtype=torch.float64)).item()
        low, high = bootstrap(mean_cosine, len(images))
        metrics[f"effective_rank_{name}"] = Estimate(effective_rank(values), count=len(features))
        metrics[f"anisotropy_{name}"] = Estimate(value, low.item(), high.item(), chance=0.0, count=len(features))
    return metrics


def _neighbours(opened: _Opened, images: Tensor, texts: Tensor, k: int) -> dict[str, Estimate]:
    """What is found too often or never, and how safely what is right."""
    metrics: dict[str, Estimate] = {}
    for name, queries, items in (("i2t", images, texts), ("t2i", texts, images)):
        counts = k_occurrence(queries, items, k)
        metrics[f"hubness_{name}"], metrics[f"anti_hubs_{name}"] = hubness(counts, len(queries))
    found = margins(images, texts, opened.owners, opened.matches)
    scores = {"margin_i2t": found.image_to_text, "margin_t2i": found.text_to_image}
    return metrics | means(scores, groups=opened.owners)

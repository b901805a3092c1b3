"""Accuracy over images, by group of them, and averaged over classes."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from multimodal.evals.intervals import bootstrap, means
from multimodal.parts import Estimate


def group_accuracies(
    hits: Tensor,  # [n] 1 where right
    groups: Tensor,  # int64 [n]
    counts: Tensor | None = None,  # [R, n] how often each image is there; once each if not given
) -> Tensor:  # float64 [R, G] NaN for a group without images
    """The accuracy in each group, in R samples of the images."""
    counts = torch.ones(1, len(hits), dtype=torch.float64) if counts is None else counts.double()
    empty = torch.zeros(len(counts), int(groups.max()) + 1, dtype=torch.float64)
    return empty.index_add(1, groups, counts * hits.double()) / empty.index_add(1, groups, counts)


def mean_per_class(
    hits: Tensor,  # [n] 1 where right
    labels: Tensor,  # int64 [n]
    counts: Tensor | None = None,  # [R, n]
) -> Tensor:  # float64 [R]
    """Accuracy averaged over classes, not images; equals it when classes are balanced. Absent classes are out."""
    return group_accuracies(hits, labels, counts).nanmean(dim=1)


def accuracies(
    hits: Mapping[str, Tensor],  # by metric, [n] whether each image is right; `top1` among them
    labels: Tensor,  # int64 [n]
    chance: Mapping[str, float],  # by metric, `mean_per_class` among them
) -> dict[str, Estimate]:
    """The mean of each, and `mean_per_class` of top-1, with intervals over images and what guessing gives."""
    per_class = partial(mean_per_class, hits["top1"], labels)
    low, high = bootstrap(per_class, len(labels))
    averaged = Estimate(per_class().item(), low.item(), high.item(), chance["mean_per_class"], len(labels))
    return {**means(hits, chance), "mean_per_class": averaged}

"""Zero-shot classification of images with any number of classes, by mean average precision."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.prompts import NamedClasses, NamedTemplates
from multimodal.evals import figures
from multimodal.evals.classes import Named, open_named
from multimodal.evals.intervals import bootstrap
from multimodal.evals.zero_shot import zero_shot_classifier
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Source, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# --- metrics --------------------------------------------------------------------------------------------------------


Statistic = Callable[[Tensor], Tensor]
"""From how often each of n samples is taken, float64 [R, n], to values [R, ...]."""


def average_precision(
    scores: Tensor,  # [n] of one class
    positive: Tensor,  # bool [n]
) -> Statistic:  # to float64 [R]; NaN where no positive was taken
    """The mean, over positives, of the precision among all that score at least as high; samples are sorted once.

    Equals scikit-learn's `average_precision_score` with counts as weights. Equal scores share a threshold, so that a
    model that gives all images the same score has the prevalence, whatever their order. Where a score is NaN, the
    sample has the worst place.
    """
    worst = torch.where(positive, -torch.inf, torch.inf).to(scores.dtype)
    ordered, order = torch.where(scores.isnan(), worst, scores).sort(descending=True)
    right = positive[order]
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1  # of those with the same score

    def of(counts: Tensor) -> Tensor:
        taken = counts[:, order]
        hits = taken * right
        precision = hits.cumsum(dim=1)[:, last] / taken.cumsum(dim=1)[:, last]
        # before the first sample that was taken there is 0 / 0, where there is no hit either
        return torch.where(hits > 0, hits * precision, 0).sum(dim=1) / hits.sum(dim=1)

    return of


def average_precisions(
    scores: Tensor,  # [n, K]
    positive: Tensor,  # bool [n, K]
) -> Statistic:  # to float64 [R, K]
    """The average precision of each class; NaN for those without a positive."""
    classes = [average_precision(score, right) for score, right in zip(scores.T, positive.T, strict=True)]
    return lambda counts: torch.stack([one(counts) for one in classes], dim=-1)


def chance_precision(
    num_positive: Tensor,  # int64 [K], each at least 1
    count: int,  # n
) -> Tensor:  # float64 [K]
    """The average precision that n samples in random order have on average.

    Above the share of positives, which it tends to where these are many: where the only one comes first, it is 1.
    """
    harmonic = (1 / torch.arange(1, count + 1, dtype=torch.float64)).sum()
    others = (num_positive.double() - 1) / max(1, count - 1)
    return (harmonic + others * (count - harmonic)) / count


# --- evaluation -----------------------------------------------------------------------------------------------------


def _positive(source: Source, places: Sequence[int], num_classes: int) -> Tensor:
    """Which samples are of which classes, bool [n, K]; ValueError unless that is known of all, and one is of some."""
    positive = torch.zeros(len(places), num_classes, dtype=torch.bool)
    for row, place in enumerate(places):
        labels = source.labels_of(place)
        if labels is None:
            raise ValueError(
                f"sample {place} of the dataset has no labels: this evaluation needs classes of all samples"
            )
        if labels and not 0 <= min(labels) <= max(labels) < num_classes:
            raise ValueError(
                f"sample {place} has labels from {min(labels)} to {max(labels)} but there are {num_classes} class "
                "names: set class_names, one for each label from 0"
            )
        positive[row, list(labels)] = True
    if not positive.any():
        raise ValueError(f"none of the {len(places)} samples is of any class: there is nothing to find")
    return positive


class MultiLabel(Eval):
    """Rank all images for each class, by its name set into templates; no image of these classes need have been seen.

    Metrics: `map`, the average precision, averaged over the classes that have an image. Its chance level is that of
    random orders, averaged likewise. The interval is over images.
    """

    dataset: Dataset
    """Images with any number of labels, or one each."""
    templates: NamedTemplates | None
    """Prompts with one {} for the class name, averaged; null for those that the dataset brings."""
    class_names: NamedClasses | None
    """By label, instead of the dataset's own; null for those."""
    max_samples: int | None = Field(gt=0)
    """So many images, drawn at random; null for all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("map",)

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        named = open_named(data, self.dataset, self.class_names, self.templates, self.max_samples)
        positive = _positive(named.images.source, named.images.places, len(named.class_names))
        return partial(self._run, named, positive)

    def _run(self, named: Named, positive: Tensor, encoder: Encoder) -> Report:
        images, class_names, templates = named
        classifier = zero_shot_classifier(encoder, class_names, templates)
        scores = encoder.encode("image", images) @ classifier.T
        precisions = average_precisions(scores, positive)
        by_class = precisions(torch.ones(1, len(scores), dtype=torch.float64))[0]
        ends = bootstrap(lambda drawn: precisions(drawn).nanmean(dim=1), len(scores))
        found = positive.sum(dim=0)
        chance = torch.where(found > 0, chance_precision(found, len(scores)), torch.nan)
        estimate = Estimate(
            by_class.nanmean().item(),
            low=ends[0].item(),
            high=ends[1].item(),
            chance=chance.nanmean().item(),
            count=len(scores),
        )
        return Report({"map": estimate}, {"average_precision": partial(_by_class, by_class, chance, class_names)})


def _by_class(by_class: Tensor, chance: Tensor, class_names: Sequence[str]) -> "Figure":
    shown = (~chance.isnan()).nonzero().flatten()
    shown = shown[by_class[shown].argsort(descending=True, stable=True)]
    names = [class_names[place] for place in shown]
    title = f"mean average precision {by_class.nanmean():.3f}"
    return figures.bars(names, by_class[shown].tolist(), title, chance[shown].tolist())

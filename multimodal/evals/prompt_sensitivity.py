"""How much zero-shot accuracy depends on the words around the class name."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.prompts import NamedClasses, NamedTemplates
from multimodal.evals import figures
from multimodal.evals.classes import Named, labels_of, open_named
from multimodal.evals.intervals import bootstrap, means
from multimodal.evals.zero_shot import class_embeddings, label_ranks, prompt_features
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERMUTATIONS = 200
"""Of labels, that chance is the mean of."""

# --- metrics --------------------------------------------------------------------------------------------------------


def spread(
    accuracies: Tensor,  # [..., T] of each template
) -> Tensor:  # [..., 4]
    """Mean, standard deviation, best and worst over templates."""
    values = accuracies.mean(-1), accuracies.std(-1), accuracies.amax(-1), accuracies.amin(-1)
    return torch.stack(values, dim=-1)


def chance_spread(
    predicted: Tensor,  # int64 [n, T] the class that each template names, -1 for none
    labels: Tensor,  # int64 [n]
) -> Tensor:  # float64 [4], as of `spread`
    """What is left of the spread where labels have nothing to do with images: its mean over random permutations.

    Templates differ then, too, and the best of them is above guessing: the less they agree, the further.
    """
    rng = np.random.default_rng(0)
    orders = (torch.from_numpy(rng.permutation(len(labels))) for _ in range(PERMUTATIONS))
    accuracies = [(predicted == labels[order, None]).double().mean(dim=0) for order in orders]
    return spread(torch.stack(accuracies)).mean(dim=0)


def guessed(
    predicted: Tensor,  # int64 [n, T] the class that each template names, -1 for none
    labels: Tensor,  # int64 [n]
) -> Tensor:  # float64 [T]
    """The mean accuracy over all permutations of the labels: 1 / K where all classes are as frequent."""
    shares = torch.bincount(labels, minlength=int(predicted.max()) + 1).double() / len(labels)
    return torch.where(predicted >= 0, shares[predicted], 0.0).mean(dim=0)


def alone_first(logits: Tensor) -> Tensor:
    """int64 [n] the class with the highest logit; -1 where several have it, which counts as wrong whatever is right."""
    first = logits.argmax(dim=1)
    return torch.where(label_ranks(logits, first) == 1, first, -1)


# --- evaluation -----------------------------------------------------------------------------------------------------


class PromptSensitivity(Eval):
    """Zero-shot top-1 with one template at a time, and with all of them averaged.

    Metrics: `mean`, `std`, `best` and `worst` over single templates, and `ensemble`. Intervals are over images. The
    best template was chosen on the images that it is judged by, so it flatters, and chance does, too: its best and
    worst are those where labels are permuted.
    """

    dataset: Dataset
    """Images with labels."""
    templates: NamedTemplates | None
    """At least two prompts with one {} for the class name; null for those that the dataset brings."""
    class_names: NamedClasses | None
    """By label, instead of the dataset's own; null for those."""
    max_samples: int | None = Field(gt=0)
    """So many images, drawn at random; null for all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "mean", "std", "best", "worst", "ensemble"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        named = open_named(data, self.dataset, self.class_names, self.templates, self.max_samples)
        if len(named.templates) < 2:
            raise ValueError(f"there is only the template '{named.templates[0]}': set templates, at least two")
        labels = labels_of(named.images.source, named.images.places, len(named.class_names))
        return partial(self._run, named, labels)

    def _run(self, named: Named, labels: Tensor, encoder: Encoder) -> Report:
        images, class_names, templates = named
        text_features = prompt_features(encoder, class_names, templates)  # [K, T, D]
        features = encoder.encode("image", images)
        predicted = torch.stack([alone_first(features @ one.T) for one in text_features.unbind(dim=1)], dim=1)
        single = (predicted == labels[:, None]).double()  # [n, T]
        accuracies = single.mean(dim=0)
        low, high = bootstrap(lambda drawn: spread(drawn @ single / len(single)), len(single))
        _, _, best, worst = chance_spread(predicted, labels).tolist()
        chance = guessed(predicted, labels).mean().item(), None, best, worst
        rows = zip(self.metrics[:4], spread(accuracies).tolist(), low.tolist(), high.tolist(), chance, strict=True)
        metrics: dict[str, float | Estimate] = {
            name: Estimate(value, lower, upper, by_chance, len(single)) for name, value, lower, upper, by_chance in rows
        }
        ensemble = alone_first(features @ class_embeddings(text_features).T)
        by_chance = guessed(ensemble[:, None], labels).item()
        metrics.update(means({"ensemble": ensemble == labels}, {"ensemble": by_chance}))
        return Report(metrics, {"templates": partial(_by_template, accuracies, templates, by_chance)})


def _by_template(accuracies: Tensor, templates: Sequence[str], chance: float) -> "Figure":
    order = accuracies.argsort(descending=True, stable=True).tolist()
    values = [accuracies[place].item() for place in order]
    title = f"top-1 by template, {min(values):.3f} to {max(values):.3f}"
    return figures.bars([templates[place] for place in order], values, title, [chance] * len(order))

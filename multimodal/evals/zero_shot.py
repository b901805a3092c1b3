"""Zero-shot classification, as in CLIP: class names set into templates are the classifier."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from multimodal.data.prompts import NamedClasses, NamedTemplates
from multimodal.data.views import Inputs
from multimodal.evals import accuracy, figures, zero_shot_figures
from multimodal.evals.classes import Named, labels_of, open_named, require_images
from multimodal.evals.intervals import bootstrap
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15
"""Of probabilities, in the calibration error."""
FAILURES, OF_A_CLASS = 24, 3
"""How many are shown, and at most of one class."""

# --- metrics --------------------------------------------------------------------------------------------------------


def class_embeddings(
    text_features: Tensor,  # [K, T, D] unit norm, of every class name in every template
) -> Tensor:  # [K, D] unit norm
    """The zero-shot classifier: per class the mean of its prompts' embeddings, brought back to unit norm.

    Equals the weights of open_clip's `build_zero_shot_classifier`, transposed. Radford et al. 2021, section 3.1.4.
    """
    return F.normalize(text_features.mean(dim=1), dim=-1)


def label_ranks(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
) -> Tensor:  # int64 [n], 1 to K
    """The place of the right class when classes are ordered by logit, from 1.

    A wrong class that ties with the right one stands before it, and so does everything when a logit is NaN: a model
    that gives all classes the same logit, or none, gets the last place and not the first.
    """
    right = logits.gather(1, labels[:, None])
    return (~(logits < right)).sum(dim=1)  # the right class itself counts 1


def top_k_accuracy(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
    k: int,
) -> float:
    """The fraction of images whose class is among the k highest logits; ties count against. 1 where k reaches K."""
    return (label_ranks(logits, labels) <= k).double().mean().item()


def calibration_error(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
    bins: int = BINS,
) -> Estimate:
    """Expected calibration error: how far the probability of the first class is from its accuracy, on average.

    Over bins of equal width of that probability, weighted by their counts. Equals torchmetrics' "l1" with as many
    bins. Guo et al. 2017. A model's probabilities are the softmax of its scaled cosines.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    place = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    excess = torch.zeros(len(labels), bins, dtype=torch.float64)
    excess[torch.arange(len(labels)), place] = confidence - (predicted == labels).double()

    def error(drawn: Tensor) -> Tensor:
        return (drawn @ excess).abs().sum(dim=1) / drawn.sum(dim=1)

    low, high = bootstrap(error, len(labels))
    value = error(torch.ones(1, len(labels), dtype=torch.float64))
    return Estimate(value.item(), low.item(), high.item(), None, len(labels))


def accuracies(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
) -> dict[str, Estimate]:
    """`top1`, `top5` and `mean_per_class` with intervals and what guessing gives."""
    ranks, num_classes = label_ranks(logits, labels), logits.shape[1]
    chance = {f"top{k}": min(1.0, k / num_classes) for k in (1, 5)}
    hits = {f"top{k}": ranks <= k for k in (1, 5)}
    return accuracy.accuracies(hits, labels, {**chance, "mean_per_class": chance["top1"]})


def in_order_of_names(
    logits: Tensor,  # [n, K]
    names: Sequence[str],  # K
) -> Tensor:  # [n, K]
    """Logits in which a class comes just behind those before it that have its name, as `topk` would put them.

    For lists with a name twice that everybody uses: open_clip's of ImageNet has "missile" and "sunglasses" so.
    """
    logits, seen = logits.clone(), Counter[str]()
    for place, name in enumerate(names):
        for _ in range(seen[name]):
            logits[:, place] = logits[:, place].nextafter(torch.tensor(-torch.inf, dtype=logits.dtype))
        seen[name] += 1
    return logits


def confusion_counts(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
) -> Tensor:  # int64 [K, K]
    """How many images of each class (row) were taken for each class (column); the diagonal adds up to top-1."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    predicted = torch.where(label_ranks(logits, labels) == 1, labels, wrong)
    num_classes = logits.shape[1]
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def surest_failures(
    probabilities: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
    limit: int = FAILURES,
    of_a_class: int = OF_A_CLASS,
) -> list[int]:
    """Places of images whose first class is a wrong one, the most probable first; of one true class a few at most."""
    probability, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels) & ~probability.isnan()
    order = probability.where(wrong, -1.0).argsort(descending=True, stable=True)[: int(wrong.sum())].tolist()
    seen = Counter[int]()
    chosen = []
    for place in order:
        label = int(labels[place])
        if seen[label] < of_a_class:
            chosen.append(place)
        seen[label] += 1
    return chosen[:limit]


# --- evaluation -----------------------------------------------------------------------------------------------------


def prompt_features(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:  # [K, T, D] unit norm
    """The embedding of every class name in every template."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    return encoder.encode("text", prompts).view(len(class_names), len(templates), -1)


def zero_shot_classifier(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:  # [K, D] unit norm
    """The classifier of class names in templates."""
    return class_embeddings(prompt_features(encoder, class_names, templates))


class ZeroShot(Eval):
    """Classify images by the nearest class name, set into templates; no image of these classes need have been seen.

    Metrics: `top1`, `top5`, `mean_per_class` (top-1 averaged over classes, as torchmetrics' accuracy with
    average="macro", where top-1 is its "micro"), `ece` (expected calibration error), and `chance`, the top-1 of
    guessing. Papers give top-1, but `mean_per_class` for Caltech-101, Oxford Pets, Flowers-102 and FGVC Aircraft
    (Radford et al. 2021, table 9), and mean average precision for data sets with several labels an image: `MultiLabel`.
    """

    dataset: Dataset
    """Images with labels."""
    templates: NamedTemplates | None
    """Prompts with one {} for the class name, averaged; none that training captions were made with, to be fair. A
    list, a .txt file with one a line, imagenet (OpenAI's 80), imagenet_simple (seven of them), or null for those that
    the dataset brings."""
    class_names: NamedClasses | None
    """By label, instead of the dataset's own: a list, a .txt file with one a line, imagenet; null for the dataset's."""
    allow_empty_classes: bool = False
    """Whether there may be classes without an image, which are then out of `mean_per_class`."""
    max_samples: int | None = Field(default=None, gt=0)
    """So many images, drawn at random; null for all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "top1", "top5", "mean_per_class", "ece", "chance"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        named = open_named(data, self.dataset, self.class_names, self.templates, self.max_samples)
        source, places = named.images.source, named.images.places
        labels = labels_of(source, range(len(source)), len(named.class_names))
        if not self.allow_empty_classes:
            require_images(labels, named.class_names)
        return partial(self._run, named, labels[torch.as_tensor(places)])

    def _run(self, named: Named, labels: Tensor, encoder: Encoder) -> Report:
        images, names, templates = named
        cosines = encoder.encode("image", images) @ zero_shot_classifier(encoder, names, templates).T
        cosines = in_order_of_names(cosines, names)
        metrics: dict[str, float | Estimate] = {
            **accuracies(cosines, labels),
            "ece": calibration_error(encoder.logit_scale * cosines, labels),
            "chance": 1 / len(names),
        }
        counts = confusion_counts(cosines, labels)
        probabilities = (encoder.logit_scale * cosines).softmax(dim=1)
        drawn: dict[str, Callable[[], Figure]] = {
            "confusion_matrix": partial(figures.confusion_matrix, counts, names),
            "failures": partial(_failures, images, labels, names, probabilities, int(len(labels) - counts.trace())),
        }
        return Report(metrics, drawn)


def _failures(
    images: Inputs,
    labels: Tensor,  # int64 [n]
    names: Sequence[str],
    probabilities: Tensor,  # [n, K]
    wrong: int,
) -> "Figure":
    probability, predicted = probabilities.max(dim=1)
    shown = surest_failures(probabilities, labels)
    return zero_shot_figures.failures(
        [images[place] for place in shown],
        [names[label] for label in labels[shown].tolist()],
        [names[label] for label in predicted[shown].tolist()],
        probability[shown].tolist(),
        wrong,
        len(labels),
    )

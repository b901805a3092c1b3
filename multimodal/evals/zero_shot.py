"""Zero-shot classification, as in CLIP: class names set into templates are the classifier."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.data.files import ClassNames, Templates
from multimodal.data.views import Inputs
from multimodal.evals import figures
from multimodal.parts import Dataset, Encoder, Eval, Report, Source, Sources

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


def mean_per_class_recall(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
) -> float:
    """Top-1 accuracy averaged over classes, not images; equals it when classes are balanced. Absent classes are out."""
    hits = (label_ranks(logits, labels) == 1).double()
    found, present = torch.bincount(labels, hits), torch.bincount(labels)
    return (found[present > 0] / present[present > 0]).mean().item()


def confusion_counts(
    logits: Tensor,  # [n, K]
    labels: Tensor,  # int64 [n]
) -> Tensor:  # int64 [K, K]
    """How many images of each class (row) were taken for each class (column); the diagonal adds up to top-1."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    predicted = torch.where(label_ranks(logits, labels) == 1, labels, wrong)
    num_classes = logits.shape[1]
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


# --- evaluation -----------------------------------------------------------------------------------------------------


def _labels(source: Source, class_names: Sequence[str]) -> Tensor:
    """Every sample's label; ValueError unless all have one and names tell the classes apart."""
    if not class_names:
        raise ValueError("the dataset has no class names: set class_names, one for each label")
    if "" in (stripped := [name.strip() for name in class_names]):
        raise ValueError(f"the class name of label {stripped.index('')} is empty: set class_names, one for each label")
    name, count = Counter(class_names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} classes are named '{name}', which no prompt can tell apart: set class_names")
    labels = [source.label(index) for index in range(len(source))]
    known = [label for label in labels if label is not None]
    if not known or len(known) < len(labels):
        missing = f"sample {labels.index(None)} of the dataset has no label" if labels else "the dataset is empty"
        raise ValueError(f"{missing}: zero-shot classification needs a dataset whose samples all have one")
    if not 0 <= min(known) <= max(known) < len(class_names):
        raise ValueError(
            f"labels go from {min(known)} to {max(known)} but there are {len(class_names)} class names: "
            "set class_names, one for each label from 0"
        )
    return torch.tensor(known)


class ZeroShot(Eval):
    """Classify images by the nearest class name, set into templates; no image of these classes need have been seen.

    Metrics: `top1`, `top5`, `mean_per_class` (top-1 averaged over classes), and `chance`, the top-1 of guessing.
    """

    dataset: Dataset
    """Images with labels."""
    templates: Templates
    """Prompts with one {} for the class name, averaged; none that training captions were made with, to be fair."""
    class_names: ClassNames | None
    """By label, instead of the dataset's own; null for those."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "top1", "top5", "mean_per_class", "chance"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        source = data.open(self.dataset)
        class_names = source.class_names if self.class_names is None else self.class_names
        return partial(self._run, Inputs(source, "image"), _labels(source, class_names), class_names)

    def _run(self, images: Inputs, labels: Tensor, class_names: Sequence[str], encoder: Encoder) -> Report:
        prompts = [template.replace("{}", name) for name in class_names for template in self.templates]
        text_features = encoder.encode("text", prompts)
        classifier = class_embeddings(text_features.view(len(class_names), len(self.templates), -1))
        logits = encoder.encode("image", images) @ classifier.T
        metrics = {
            "top1": top_k_accuracy(logits, labels, 1),
            "top5": top_k_accuracy(logits, labels, 5),
            "mean_per_class": mean_per_class_recall(logits, labels),
            "chance": 1 / len(class_names),
        }
        counts = confusion_counts(logits, labels)
        return Report(metrics, {"confusion_matrix": partial(figures.confusion_matrix, counts, class_names)})

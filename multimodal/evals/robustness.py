"""Zero-shot classification of images that were made worse, as in ImageNet-C (Hendrycks and Dietterich 2019)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, Strict
from torch import Tensor

from multimodal.data.prompts import NamedClasses, NamedTemplates
from multimodal.evals import figures
from multimodal.evals.classes import Named, labels_of, open_named
from multimodal.evals.corruptions import Corrupted
from multimodal.evals.intervals import bootstrap, means
from multimodal.evals.zero_shot import label_ranks, zero_shot_classifier
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Sources

Corruption = Literal["noise", "blur", "jpeg", "brightness", "contrast", "occlusion", "rotation"]


def _once(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"each should be there once, got {', '.join(map(str, values))}")
    return values


# --- metrics --------------------------------------------------------------------------------------------------------


def relative(
    clean: Tensor,  # [n] whether each image is right
    corrupted: Tensor,  # [n] how often each is right when it is made worse
) -> Estimate:
    """What is left of the accuracy: a ratio of means, with its interval over images.

    NaN where no image was right as it is, whatever is right by luck when they are made worse; samples of the bootstrap
    without a right one are left out.
    """
    both = torch.stack([clean.double(), corrupted.double()], dim=1)

    def ratio(sums: Tensor) -> Tensor:
        return torch.where(sums[..., 0] > 0, sums[..., 1] / sums[..., 0], torch.nan)

    low, high = bootstrap(lambda drawn: ratio(drawn @ both), len(both))
    return Estimate(ratio(both.sum(dim=0)).item(), low.item(), high.item(), count=len(both))


# --- evaluation -----------------------------------------------------------------------------------------------------


class Robustness(Eval):
    """Zero-shot top-1 under corruptions of five severities.

    Metrics: `clean`; `mean` over all corruptions and severities; `relative`, the latter by the former, which is no
    number where `clean` is 0; and the top-1 of each corruption, the mean over severities. Every severity of every
    corruption embeds all images anew.
    """

    dataset: Dataset
    """Images with labels."""
    templates: NamedTemplates | None
    """Prompts with one {} for the class name, averaged; null for those that the dataset brings."""
    class_names: NamedClasses | None
    """By label, instead of the dataset's own; null for those."""
    corruptions: Annotated[tuple[Corruption, ...], Strict(False), Field(min_length=1), AfterValidator(_once)]
    """What is done to images."""
    severities: Annotated[
        tuple[Annotated[int, Field(ge=1, le=5)], ...], Strict(False), Field(min_length=1), AfterValidator(_once)
    ]
    """How much, from 1 to 5."""
    max_samples: int | None = Field(gt=0)
    """So many images, drawn at random; null for all."""
    seed: int = Field(ge=0)
    """Of what is random in a corruption, with the place of the image."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "clean", "mean", "relative", *self.corruptions

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        named = open_named(data, self.dataset, self.class_names, self.templates, self.max_samples)
        labels = labels_of(named.images.source, named.images.places, len(named.class_names))
        return partial(self._run, named, labels)

    def _run(self, named: Named, labels: Tensor, encoder: Encoder) -> Report:
        images, class_names, templates = named
        classifier = zero_shot_classifier(encoder, class_names, templates)

        def hits(inputs: Sequence[object]) -> Tensor:
            return (label_ranks(encoder.encode("image", inputs) @ classifier.T, labels) == 1).double()

        severities = sorted(self.severities)
        clean = hits(images)
        found: dict[str, Tensor] = {
            corruption: torch.stack([hits(Corrupted(images, corruption, degree, self.seed)) for degree in severities])
            for corruption in self.corruptions
        }  # [severities, n] each
        mean = torch.cat(list(found.values())).mean(dim=0)
        scores = {"clean": clean, "mean": mean, **{name: one.mean(dim=0) for name, one in found.items()}}
        metrics = means(scores, dict.fromkeys(scores, 1 / len(class_names)))
        curves = {name: [clean.mean().item(), *one.mean(dim=1).tolist()] for name, one in found.items()}
        title, axes = f"top-1 of {len(labels):,} images", ("severity (0: as they are)", "top-1")
        drawn = partial(figures.lines, curves, [0, *severities], title, axes)
        return Report({**metrics, "relative": relative(clean, mean)}, {"severity": drawn})

"""What probes share: they learn classes from image features of one data set, and are tested on another."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.views import Inputs
from multimodal.evals.classes import drawn_places, labels_of
from multimodal.parts import Dataset, Encoder, Eval, Report, Source, Sources


@dataclass(frozen=True)
class Examples:
    """Features and labels of both data sets."""

    train_features: Tensor
    """[n, D] unit norm; zeros where the model gave no number."""
    train_labels: Tensor
    """int64 [n]."""
    features: Tensor
    """[m, D], of the test, likewise."""
    labels: Tensor
    """int64 [m]."""
    class_names: Sequence[str]
    """By label; the labels themselves where the datasets have no names."""

    @property
    def num_classes(self) -> int:
        """K, named or seen in training."""
        return len(self.class_names)

    @property
    def chance(self) -> float:
        """Top-1 of guessing classes as often as training has them: 1 / K where all are as frequent."""
        counts = [torch.bincount(some, minlength=self.num_classes) for some in (self.train_labels, self.labels)]
        shares = [some.double() / some.sum() for some in counts]
        return (shares[0] * shares[1]).sum().item()

    @property
    def chance_per_class(self) -> float:
        """Of accuracy averaged over classes: of those that training has, one is named."""
        return 1 / len(torch.unique(self.train_labels))


class Probe(Eval):
    """Image features, judged by how well classes are told by them."""

    towers: ClassVar[tuple[str, ...]] = ("image",)

    train: Dataset
    """Labelled images that classes are learnt from."""
    dataset: Dataset
    """Labelled images that it is tested on, with the same classes."""
    max_train: int | None = Field(gt=0)
    """So many training images, drawn at random; null for all."""

    @abstractmethod
    def probe(self, examples: Examples) -> Report:
        """What the features are worth."""

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        sources = data.open(self.train), data.open(self.dataset)
        names = _shared_names(*sources)
        places = drawn_places(len(sources[0]), self.max_train), range(len(sources[1]))
        whats = "the dataset `train`", "the dataset"
        known = len(names) or None
        labels = [
            labels_of(source, some, known, what) for source, some, what in zip(sources, places, whats, strict=True)
        ]
        self.check(labels[0])
        if unknown := set(labels[1].tolist()) - set(labels[0].tolist()):
            raise ValueError(
                f"no image among the {len(labels[0])} of `train` is of the class {_told(min(unknown), names)}, "
                "which images of the dataset are of: set max_train higher, or take other data"
            )
        names = names or [str(label) for label in range(int(labels[0].max()) + 1)]
        inputs = [Inputs(source, "image", some) for source, some in zip(sources, places, strict=True)]
        return partial(self._run, inputs[0], labels[0], inputs[1], labels[1], names)

    def check(self, labels: Tensor) -> None:
        """ValueError where the training labels are not enough."""
        if labels.min() == labels.max():
            raise ValueError("all images of `train` are of one class: there is nothing to learn")

    def _run(
        self,
        train: Inputs,
        train_labels: Tensor,
        images: Inputs,
        labels: Tensor,
        class_names: Sequence[str],
        encoder: Encoder,
    ) -> Report:
        features = [encoder.encode("image", inputs).nan_to_num() for inputs in (train, images)]
        return self.probe(Examples(features[0], train_labels, features[1], labels, class_names))


def _shared_names(train: Source, test: Source) -> Sequence[str]:
    """The class names of both; ValueError if they differ, so that labels mean different things."""
    if train.class_names and test.class_names and train.class_names != test.class_names:
        pairs = zip(train.class_names, test.class_names, strict=False)
        differ = next((f"label {i} is '{a}' and '{b}'" for i, (a, b) in enumerate(pairs) if a != b), None)
        counts = f"there are {len(train.class_names)} and {len(test.class_names)}"
        raise ValueError(f"class names of `train` and of the dataset differ: {differ or counts}; set class_names")
    return train.class_names or test.class_names


def _told(label: int, names: Sequence[str]) -> str:
    return f"{label} ('{names[label]}')" if names else str(label)

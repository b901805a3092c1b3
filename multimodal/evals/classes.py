"""What evaluations with classes share: names, templates and labels, checked before the run; which samples are taken."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multimodal.data.prompts import IMAGENET, NamedClasses, NamedTemplates, named_classes, named_templates
from multimodal.data.views import Inputs
from multimodal.parts import Dataset, Source, Sources


def class_names_of(source: Source, given: NamedClasses | None, root: Path) -> tuple[str, ...]:
    """The `given` names, below `root` if they are in a file, or the dataset's own; ValueError if they are no names.

    They have to tell classes apart, unless they are open_clip's of ImageNet, which everybody uses as they are.
    """
    class_names = named_classes(given, root, source.class_names)
    if not class_names:
        raise ValueError("the dataset has no class names: set class_names, one for each label")
    if "" in (stripped := [name.strip() for name in class_names]):
        label = stripped.index("")
        where = f" ({given}, line {label + 1})" if isinstance(given, str) else ""
        raise ValueError(f"the class name of label {label} is empty{where}: set class_names, one for each label")
    name, count = Counter(class_names).most_common(1)[0]
    if count > 1 and given != IMAGENET:
        raise ValueError(f"{count} classes are named '{name}', which no prompt can tell apart: set class_names")
    return class_names


def templates_of(source: Source, given: NamedTemplates | None, root: Path) -> tuple[str, ...]:
    """The `given` templates, below `root` if they are in a file, or the dataset's own; ValueError if there are none."""
    return named_templates(given, root, source.templates)


class Named(NamedTuple):
    """Images, and what classes are told by."""

    images: Inputs
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def open_named(
    data: Sources,
    dataset: Dataset,
    class_names: NamedClasses | None,
    templates: NamedTemplates | None,
    max_samples: int | None = None,
) -> Named:
    """All images of a dataset, or so many drawn at random, with names and templates given or the dataset's own."""
    source = data.open(dataset)
    names = class_names_of(source, class_names, data.root)
    prompts = templates_of(source, templates, data.root)
    return Named(Inputs(source, "image", drawn_places(len(source), max_samples)), names, prompts)


def require_images(labels: Tensor, names: Sequence[str]) -> None:
    """ValueError if a class has no image."""
    absent = (torch.bincount(labels, minlength=len(names)) == 0).nonzero().flatten().tolist()
    if absent:
        told = f"{len(absent)} of {len(names)} classes have no image, such as label {absent[0]}, '{names[absent[0]]}'"
        raise ValueError(f"{told}: leave their names out, or set allow_empty_classes=true")


def drawn_places(count: int, limit: int | None, seed: int = 0) -> Sequence[int]:
    """All places, or `limit` of them at random, in rising order: many datasets are sorted by class."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist())


def labels_of(
    source: Source,
    places: Sequence[int],
    num_classes: int | None = None,  # None where the dataset has no names to say so
    what: str = "the dataset",
) -> Tensor:  # int64 [n]
    """The labels of the samples at some places; ValueError unless all have one, below the number of classes."""
    labels = [source.label(place) for place in places]
    known = [label for label in labels if label is not None]
    if not known or len(known) < len(labels):
        missing = f"sample {places[labels.index(None)]} of {what} has no label" if labels else f"{what} is empty"
        raise ValueError(f"{missing}: this evaluation needs a dataset whose samples all have one")
    if min(known) < 0 or (num_classes is not None and max(known) >= num_classes):
        raise ValueError(
            f"labels go from {min(known)} to {max(known)} but there are {num_classes or 'no'} class names: "
            "set class_names, one for each label from 0"
        )
    return torch.tensor(known)

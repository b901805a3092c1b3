"""What evaluations with classes share: names, templates and labels, checked before the run; which samples are taken."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from multimodal.parts import Source


def class_names_of(source: Source, given: Sequence[str] | None) -> tuple[str, ...]:
    """The `given` names, or the dataset's own; ValueError unless they tell the classes apart."""
    class_names = source.class_names if given is None else tuple(given)
    if not class_names:
        raise ValueError("the dataset has no class names: set class_names, one for each label")
    if "" in (stripped := [name.strip() for name in class_names]):
        raise ValueError(f"the class name of label {stripped.index('')} is empty: set class_names, one for each label")
    name, count = Counter(class_names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} classes are named '{name}', which no prompt can tell apart: set class_names")
    return class_names


def templates_of(source: Source, given: Sequence[str] | None) -> tuple[str, ...]:
    """The `given` templates, or the dataset's own; ValueError if there are none."""
    templates = source.templates if given is None else tuple(given)
    if not templates:
        raise ValueError("the dataset brings no templates of its own: set templates")
    return templates


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

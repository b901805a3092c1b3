"""Zero-shot accuracy by group: how well the group does that does worst."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.prompts import NamedTemplates
from multimodal.data.views import Inputs
from multimodal.evals import worst_group_figures
from multimodal.evals.accuracy import group_accuracies
from multimodal.evals.attributes import ClassAndGroupPattern, read_attribute
from multimodal.evals.classes import class_names_of, labels_of, templates_of
from multimodal.evals.intervals import bootstrap
from multimodal.evals.zero_shot import label_ranks, zero_shot_classifier
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Source, Sources

# --- metrics --------------------------------------------------------------------------------------------------------


def worst_and_gap(
    hits: Tensor,  # [n] 1 where right
    groups: Tensor,  # int64 [n]
    counts: Tensor | None = None,  # [R, n]
) -> Tensor:  # float64 [R, 3]
    """Accuracy over all images, worst-group accuracy, and the gap: by how much the worst is below all.

    Sagawa et al. 2020. The worst of many small groups is low by chance as well: see `guessing`.
    """
    accuracies = group_accuracies(hits, groups, counts)
    worst = accuracies.nan_to_num(nan=torch.inf).amin(dim=1)
    weights = torch.ones(1, len(hits), dtype=torch.float64) if counts is None else counts.double()
    overall = weights @ hits.double() / weights.sum(dim=1)
    return torch.stack([overall, worst, overall - worst], dim=1)


def guessing(
    sizes: Tensor,  # int64 [G] images by group
    rate: float,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Accuracy, worst-group accuracy and gap on average, if every image is right with the same probability."""
    right = np.random.default_rng(seed).binomial(sizes.numpy(), rate, size=(draws, len(sizes)))
    worst = (right / sizes.numpy()).min(axis=1).mean()
    return rate, float(worst), rate - float(worst)


# --- evaluation -----------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """What every image is, and which group it is in."""

    class_names: tuple[str, ...]
    labels: Tensor
    """int64 [n] into `class_names`"""
    group_names: tuple[str, ...]
    groups: Tensor
    """int64 [n] into `group_names`"""


class WorstGroup(Eval):
    """Zero-shot classification by group, such as the place in the picture: a good mean may hide a group that fails.

    Metrics: `top1` of the images of all groups that are large enough, `worst_group` (of the group that does worst),
    `gap` (`top1` less that), and the accuracy in each group as `top1_<group>`, with "_" for "/". Chance is guessing,
    which has a worst group, too. Sagawa et al. 2020.
    """

    dataset: Dataset
    """Images with labels."""
    groups: Dataset | None
    """The same images in the same order, labelled by group; null: `pattern` says it."""
    pattern: ClassAndGroupPattern
    """Regular expression for class names with groups (?P<class>...) and (?P<group>...); null: `groups` says it."""
    by_class: bool
    """Whether groups are divided by class as well, as in Sagawa et al. 2020: waterbirds on land."""
    min_samples: int = Field(ge=1)
    """Groups with fewer images are left out: the worst of very small ones is the smallest."""
    templates: NamedTemplates | None
    """Prompts with one {} for the class name, averaged; none that training captions were made with, to be fair."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Without those of groups, whose names are in the data."""
        return "top1", "worst_group", "gap"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        if (self.groups is None) == (self.pattern is None):
            raise ValueError("groups: should say which image is in which group, or pattern, and not both")
        source = data.open(self.dataset)
        task = self._task(source, None if self.groups is None else data.open(self.groups), data.root)
        sizes = torch.bincount(task.groups, minlength=len(task.group_names))
        kept = (sizes >= self.min_samples).nonzero().flatten()
        if len(kept) < 2:
            raise ValueError(
                f"min_samples: {len(kept)} of {int((sizes > 0).sum())} groups have {self.min_samples} images or more; "
                "two are needed"
            )
        inside = torch.isin(task.groups, kept)
        names = tuple(task.group_names[group] for group in kept.tolist())
        groups = torch.searchsorted(kept, task.groups[inside])
        for name, others in _by_metric(names).items():
            if len(others) > 1:
                told = " and ".join(f"'{other}'" for other in others)
                raise ValueError(f"groups: {told} would both be the metric {name}: name them in another way")
        templates = templates_of(source, self.templates, data.root)
        task = task._replace(group_names=names, groups=groups)
        return partial(self._run, Inputs(source, "image"), inside, task, templates)

    def _task(self, source: Source, grouped: Source | None, root: Path) -> _Task:
        names = class_names_of(source, None, root)
        labels = labels_of(source, range(len(source)), len(names))
        if grouped is None:
            class_names, of_class = read_attribute(names, self.pattern, "class")
            group_names, of_group = read_attribute(names, self.pattern, "group")
            labels, groups = of_class[labels], of_group[labels]
        else:
            class_names, group_names = names, class_names_of(grouped, None, root)
            groups = labels_of(grouped, range(len(grouped)), len(group_names), "the dataset `groups`")
            if len(groups) != len(labels):
                raise ValueError(f"groups: {len(groups)} images, but {len(labels)} in the dataset: should be the same")
        if len(class_names) < 2:
            raise ValueError(f"there is one class only, '{class_names[0]}': nothing to tell apart")
        if self.by_class:
            divided = tuple(f"{name}, {group}" for name in class_names for group in group_names)
            return _Task(class_names, labels, divided, labels * len(group_names) + groups)
        return _Task(class_names, labels, group_names, groups)

    def _run(self, images: Inputs, inside: Tensor, task: _Task, templates: Sequence[str], encoder: Encoder) -> Report:
        classifier = zero_shot_classifier(encoder, task.class_names, templates)
        ranks = label_ranks(encoder.encode("image", images) @ classifier.T, task.labels)
        return _report((ranks == 1).double()[inside], task, 1 / len(task.class_names))


def _by_metric(group_names: Sequence[str]) -> dict[str, list[str]]:
    """The groups that are reported as each metric; "/" divides keys."""
    found: dict[str, list[str]] = {}
    for name in group_names:
        found.setdefault(f"top1_{name.replace('/', '_')}", []).append(name)
    return found


def _report(hits: Tensor, task: _Task, chance: float) -> Report:
    sizes = torch.bincount(task.groups, minlength=len(task.group_names))
    values = worst_and_gap(hits, task.groups)[0].tolist()
    ends = zip(*bootstrap(partial(worst_and_gap, hits, task.groups), len(hits)), strict=True)
    metrics: dict[str, float | Estimate] = {
        name: Estimate(value, low.item(), high.item(), chance=guessed, count=len(hits))
        for name, value, (low, high), guessed in zip(
            ("top1", "worst_group", "gap"), values, ends, guessing(sizes, chance), strict=True
        )
    }
    low, high = bootstrap(partial(group_accuracies, hits, task.groups), len(hits))
    by_group = {
        name: Estimate(value, lower, upper, chance=chance, count=size)
        for name, value, lower, upper, size in zip(
            task.group_names,
            group_accuracies(hits, task.groups)[0].tolist(),
            low.tolist(),
            high.tolist(),
            sizes.tolist(),
            strict=True,
        )
    }
    metrics |= {name: by_group[group] for name, (group,) in _by_metric(task.group_names).items()}
    return Report(metrics, {"groups": partial(worst_group_figures.accuracies, by_group, values[0], chance)})

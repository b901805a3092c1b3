"""Debiasing by projection: a subspace that pairs of texts differ in is removed; what that does, and what it costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, Strict
from torch import Tensor

from multimodal.data.prompts import NamedClasses, NamedTemplates
from multimodal.evals import weat_figures
from multimodal.evals.classes import Named, labels_of, open_named
from multimodal.evals.intervals import means
from multimodal.evals.weat import Concepts, Template, Tests, in_template, open_tests, run_tests, summary
from multimodal.evals.zero_shot import class_embeddings, label_ranks, prompt_features
from multimodal.parts import Dataset, Encoder, Estimate, Eval, Report, Sources

# --- metrics --------------------------------------------------------------------------------------------------------


class Subspace(NamedTuple):
    """Directions that pairs differ in."""

    basis: Tensor
    """float64 [c, D] orthonormal, the one with most of the differences first."""
    explained: float
    """Share of the squared differences that lies in it; near 1 where all pairs differ in the same way."""


def bias_subspace(
    first: Tensor,  # [p, D] unit norm, such as of "she", "woman"
    second: Tensor,  # [p, D] unit norm, of "he", "man"
    components: int,
) -> Subspace:
    """The principal components of pairs about their own middle: c of them, or fewer if pairs differ in fewer.

    Nothing of pairs that are the same. Bolukbasi et al. 2016, section 5.1.
    """
    differences = first.double() - second.double()
    _, values, directions = torch.linalg.svd(differences, full_matrices=False)
    there = values[:components] > 1e-9
    total = values.square().sum().item()
    explained = values[:components].square().sum().item() / total if total > 0 else math.nan
    return Subspace(directions[:components][there], explained)


def project_out(
    features: Tensor,  # [n, D] unit norm
    basis: Tensor,  # [c, D] orthonormal
) -> Tensor:  # float64 [n, D] unit norm, 0 for what lies in the subspace entirely
    """Without what lies in the subspace, and back to unit norm: "neutralise" of Bolukbasi et al. 2016."""
    features = features.double()
    left = features - features @ basis.T @ basis
    return torch.where(left.norm(dim=1, keepdim=True) > 1e-9, F.normalize(left, dim=1), 0.0)


def removed_share(
    features: Tensor,  # [n, D] unit norm
    basis: Tensor,  # [c, D] orthonormal
) -> float:
    """The share of the squared norm that `project_out` takes away, on average."""
    return (features.double() @ basis.T).square().sum(dim=1).mean().item()


# --- evaluation -----------------------------------------------------------------------------------------------------

Pair = Annotated[tuple[str, str], Strict(False)]


class Projection(Eval):
    """Remove the subspace of pairs of texts from texts and images: associations before and after, and accuracy beside.

    Metrics, each also with `_projected`: `mean_absolute_effect` and `share_significant` of association tests,
    `<test>_effect`, `<test>_p`, and zero-shot `top1`, with `top1_change`; `explained`, the share of the differences of
    pairs that lies in the subspace, and `removed_text`, `removed_image`, the share of features that does. A smaller
    effect is no proof that the bias is gone: it can be found in what is left (Gonen and Goldberg 2019).
    """

    pairs: Annotated[tuple[Pair, ...], Strict(False), Field(min_length=1)]
    """Pairs of texts that differ in what is to be removed: [she, he]."""
    components: int = Field(ge=1)
    """Directions that are removed."""
    path: str
    """JSON with association tests, as of May et al. 2019, or an archive of it."""
    member: str | None
    """Where in the tar archive; null if `path` is the file itself."""
    tests: Tests | None
    """Names of tests in the file; null for all."""
    template: Template
    """A text with one {} that words of pairs and tests are set into; null: words by themselves."""
    permutations: int = Field(ge=99)
    """Random divisions of the targets for a p-value, where there are too many (100,000) to go through all."""
    dataset: Dataset
    """Images with labels, for zero-shot classification."""
    templates: NamedTemplates | None
    """Prompts with one {} for the class name, averaged."""
    class_names: NamedClasses | None
    """By label, instead of the dataset's own; null for those."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """With the tests' own only if `tests` names them; other names are in the file."""
        own = [f"{test}_{number}" for test in self.tests or () for number in ("effect", "p")]
        both = ["mean_absolute_effect", "share_significant", "top1", *own]
        return (
            *(name + after for name in both for after in ("", "_projected")),
            "top1_change",
            "explained",
            "removed_text",
            "removed_image",
        )

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        if self.components > len(self.pairs):
            raise ValueError(f"components: {len(self.pairs)} pairs differ in that many directions at most")
        for first, second in self.pairs:
            if not first.strip() or not second.strip() or first == second:
                raise ValueError(f"pairs: ['{first}', '{second}'] should be two different texts, none of them empty")
        tests = open_tests(data.root, self.path, self.member, self.tests)
        named = open_named(data, self.dataset, self.class_names, self.templates)
        labels = labels_of(named.images.source, named.images.places, len(named.class_names))
        return partial(self._run, tests, named, labels)

    def _run(self, tests: Mapping[str, Concepts], named: Named, labels: Tensor, encoder: Encoder) -> Report:
        texts = partial(encoder.encode, "text")
        first, second = (texts([in_template(self.template, pair[side]) for pair in self.pairs]) for side in (0, 1))
        if not (first.isfinite().all() and second.isfinite().all()):
            return Report(dict.fromkeys(self.metrics, math.nan))
        subspace = bias_subspace(first, second, self.components)
        prompts = prompt_features(encoder, named.class_names, named.templates).flatten(0, 1)  # [K x T, D]
        images = encoder.encode("image", named.images)

        metrics: dict[str, float | Estimate] = {}
        hits, effects = {}, []
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "": Tensor.double,
            "_projected": partial(project_out, basis=subspace.basis),
        }
        for after, change in changes.items():
            found = run_tests(tests, self.permutations, partial(_changed, change, texts), self.template)
            effects.append({test: one.effect for test, one in found.items()})
            metrics |= {f"{name}{after}": value for name, value in summary(found).items()}
            for test, one in found.items():
                metrics |= {f"{test}_effect{after}": one.effect, f"{test}_p{after}": one.p}
            classifier = class_embeddings(change(prompts).view(len(named.class_names), len(named.templates), -1))
            hits[f"top1{after}"] = (label_ranks(change(images) @ classifier.T, labels) == 1).double()
        hits["top1_change"] = hits["top1_projected"] - hits["top1"]
        chance = 1 / len(named.class_names)
        metrics |= means(hits, {"top1": chance, "top1_projected": chance})
        metrics |= {
            "explained": Estimate(subspace.explained, count=len(self.pairs)),
            "removed_text": Estimate(removed_share(prompts, subspace.basis), count=len(prompts)),
            "removed_image": Estimate(removed_share(images, subspace.basis), count=len(images)),
        }
        return Report(metrics, {"effects": partial(weat_figures.effects, *effects)})


def _changed(change: Callable[[Tensor], Tensor], encode: Callable[[Sequence[str]], Tensor], texts: list[str]) -> Tensor:
    return change(encode(texts))

"""A linear classifier on image features that stay as they are, as in CLIP (Radford et al. 2021, appendix A.3)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from multimodal import distributed
from multimodal.evals import figures
from multimodal.evals.accuracy import accuracies
from multimodal.evals.probes import Examples, Probe
from multimodal.evals.zero_shot import confusion_counts
from multimodal.parts import Report
from multimodal.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COARSEST = tuple(10.0**power for power in range(-6, 7, 2))
"""Where the search for C begins, in steps of two decades."""

# --- fitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A linear classifier."""

    weight: Tensor
    """[K, D] of the classes that it was fitted on."""
    bias: Tensor
    """[K]."""
    classes: Tensor
    """int64 [K], their labels."""

    def __call__(
        self,
        features: Tensor,  # [m, D]
    ) -> Tensor:  # int64 [m]
        """The most likely class of each."""
        return self.classes[(features.double() @ self.weight.T + self.bias).argmax(dim=1)]


def fit(
    features: Tensor,  # [n, D]
    labels: Tensor,  # int64 [n]
    c: float,
    max_iter: int = 1000,
    tol: float = 1e-3,
) -> Linear:
    """scikit-learn's multinomial logistic regression: L-BFGS, the inverse strength `c` of L2 on weights, not biases.

    Features of unit norm lie close together, far from the origin, where L-BFGS is slow. They are centred, and all
    divided by one number, which the bias and `c` make up for: the optimum is the same, found in fewer iterations.
    One thread does it: the matrices are small, and threads that wait for each other took twelve times as long beside
    other work.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features = features.double()
    centre = features.mean(dim=0)
    scale = max((features - centre).square().mean().sqrt().item(), 1e-12)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with little regularisation max_iter is the end
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # one image of each
        found = LogisticRegression(C=c * scale**2, max_iter=max_iter, tol=tol)
        found.fit(((features - centre) / scale).numpy(), labels.numpy())
    weight, bias = torch.from_numpy(found.coef_) / scale, torch.from_numpy(found.intercept_)
    if len(weight) == 1:  # of two classes it has the second one's
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return Linear(weight, bias - weight @ centre, torch.from_numpy(found.classes_))


def search(
    score: Callable[[float], float],  # of a C, the higher the better
    refinements: int,
) -> float:
    """The best C: over seven of two decades' step, then by halving the step around the best one so many times.

    Four refinements are CLIP's eight values a decade. Of equally good values the smallest, the most regularised, wins.
    """
    scores = {c: score(c) for c in COARSEST}
    step = 2.0
    for _ in range(refinements):
        step /= 2
        best = _best(scores)
        scores.update({c: score(c) for c in (best * 10**-step, best * 10**step) if c not in scores})
    return _best(scores)


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda c: (-scores[c], c))


def split(
    labels: NDArray[np.int64],  # [n]
    share: float,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the training and the validation part; each class gives its `share` to the latter, rounded down."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    held = np.zeros(len(labels), dtype=bool)
    for start, stop in pairwise(starts):
        held[order[start : start + int(share * (stop - start))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


# --- evaluation -----------------------------------------------------------------------------------------------------


class LinearProbe(Probe):
    """L2-regularised logistic regression on image features; its strength is chosen on a part of the training images.

    Then it is fitted again on all of them. Metrics: `top1`, `mean_per_class` (averaged over classes), and `c`, the
    inverse strength that was chosen. Features are those of the shared space, of unit norm. One rank fits
    while the others wait for it, half an hour at most (`distributed.TIMEOUT`): for sets so large that it takes longer
    set max_train or refinements lower, or evaluate the run when it has ended, in one process.
    """

    validation: float = Field(gt=0, lt=1)
    """Share of the training images of each class that C is chosen on."""
    refinements: int = Field(ge=0, le=6)
    """How often the step between values of C is halved, from two decades; 4 in CLIP."""
    max_iter: int = Field(gt=0)
    """Iterations of L-BFGS at most; 1,000 in CLIP."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "top1", "mean_per_class", "c"

    def check(self, labels: Tensor) -> None:
        super().check(labels)
        _, held = split(labels.numpy(), self.validation, 0)
        if not len(held):
            raise ValueError(
                f"validation={self.validation:g} of each class of `train` is not one image: set it higher, or max_train"
            )

    def probe(self, examples: Examples) -> Report:
        c, predicted = distributed.on_first_rank(partial(self._fit, examples))
        chance = {"top1": examples.chance, "mean_per_class": examples.chance_per_class}
        return Report(
            {**accuracies({"top1": predicted == examples.labels}, examples.labels, chance), "c": c},
            {"confusion_matrix": partial(_confusion, predicted, examples)},
        )

    def _fit(self, examples: Examples) -> tuple[float, Tensor]:
        """The C that was chosen, and what the classifier that was fitted with it on all takes the test images for."""
        features, labels = examples.train_features, examples.train_labels
        training, held = map(torch.from_numpy, split(labels.numpy(), self.validation, 0))

        def score(c: float) -> float:
            classifier = fit(features[training], labels[training], c, self.max_iter)
            return (classifier(features[held]) == labels[held]).double().mean().item()

        c = search(score, self.refinements)
        return c, fit(features, labels, c, self.max_iter)(examples.features)


def _confusion(predicted: Tensor, examples: Examples) -> "Figure":
    logits = F.one_hot(predicted, examples.num_classes).double()
    return figures.confusion_matrix(confusion_counts(logits, examples.labels), examples.class_names)

"""A linear classifier on the features of a few images a class, several times over."""

from functools import partial
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, Strict
from torch import Tensor

from multimodal import distributed
from multimodal.evals import figures
from multimodal.evals.intervals import means
from multimodal.evals.linear_probe import fit
from multimodal.evals.probes import Examples, Probe
from multimodal.parts import Estimate, Report


def draw_shots(
    labels: NDArray[np.int64],  # [n]
    shots: int,
    seed: int,
) -> NDArray[np.int64]:  # [shots x classes] rising places
    """So many places of each class that occurs; with the same seed, fewer are a part of more."""
    order = np.random.default_rng(seed).permutation(len(labels))
    places = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(places))


class FewShot(Probe):
    """Logistic regression on a few training images of each class, the mean over several draws of them.

    Metrics: for each number of shots `top1_<shots>`, whose interval is over test images, and `std_<shots>`, the
    standard deviation over draws. A draw's fewer images are among its more.
    """

    shots: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Strict(False), Field(min_length=1)]
    """Numbers of images of each class."""
    draws: int = Field(ge=2)
    """How often images are drawn."""
    c: float = Field(gt=0)
    """Inverse strength of L2: a few images are not enough to choose it by."""
    max_iter: int = Field(gt=0)
    """Iterations of L-BFGS at most."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"{metric}_{shots}" for shots in self.shots for metric in ("top1", "std"))

    def check(self, labels: Tensor) -> None:
        super().check(labels)
        most, counts = max(self.shots), torch.bincount(labels)
        present = counts > 0
        if (counts[present] < most).any():
            label = int(torch.where(present, counts, len(labels)).argmin())
            raise ValueError(
                f"{most} images of each class are asked for, but `train` has {counts[label]} of label {label}: "
                "set shots lower, or max_train higher"
            )

    def probe(self, examples: Examples) -> Report:
        hits = distributed.on_first_rank(partial(self._hits, examples))
        metrics: dict[str, float | Estimate] = {}
        for shots, found in hits.items():  # [draws, n]
            metrics.update(means({f"top1_{shots}": found.mean(dim=0)}, {f"top1_{shots}": examples.chance_per_class}))
            metrics[f"std_{shots}"] = found.mean(dim=1).std().item()
        curves = {"mean": [found.mean().item() for found in hits.values()]}
        for name, worst in (("best draw", max), ("worst draw", min)):
            curves[name] = [worst(found.mean(dim=1).tolist()) for found in hits.values()]
        title = f"linear probe of a few images a class, {self.draws} draws"
        axes = "images of each class", "top-1"
        return Report(metrics, {"few_shot": partial(figures.lines, curves, list(hits), title, axes)})

    def _hits(self, examples: Examples) -> dict[int, Tensor]:
        """For each number of shots, whether each draw's classifier is right, float64 [draws, n]."""
        labels = examples.train_labels.numpy()

        def right(shots: int, seed: int) -> Tensor:
            places = torch.from_numpy(draw_shots(labels, shots, seed))
            classifier = fit(examples.train_features[places], examples.train_labels[places], self.c, self.max_iter)
            return (classifier(examples.features) == examples.labels).double()

        return {shots: torch.stack([right(shots, seed) for seed in range(self.draws)]) for shots in sorted(self.shots)}

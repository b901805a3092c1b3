"""Classification of images by their nearest neighbours among labelled ones; nothing is trained."""

import torch
from pydantic import Field
from torch import Tensor

from multimodal.evals.intervals import means
from multimodal.evals.probes import Examples, Probe
from multimodal.parts import Report

# --- metrics --------------------------------------------------------------------------------------------------------


def nearest_neighbours(
    queries: Tensor,  # [m, D] unit norm
    features: Tensor,  # [n, D] unit norm
    k: int,
    tile: int = 1024,
) -> tuple[Tensor, Tensor]:  # [m, k] cosines, the highest first; int64 [m, k] places among features
    """The `k` nearest features of each query, by cosine; memory grows with `tile` queries times n, not with m times n.

    Among those that are equally near at the end of the k, any may be taken.
    """
    found = [(rows @ features.T).topk(k, dim=1) for rows in torch.split(queries, tile)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def vote(
    labels: Tensor,  # int64 [m, k] of the neighbours
    weights: Tensor,  # [m, k]
    num_classes: int,
) -> Tensor:  # int64 [m]
    """The class with the most weight among the neighbours; of equal ones the lowest label, as in scikit-learn."""
    ballots = torch.zeros(len(labels), num_classes, dtype=torch.float64).scatter_add_(1, labels, weights.double())
    return (ballots == ballots.amax(dim=1, keepdim=True)).int().argmax(dim=1)  # argmax may take any of equal ones


# --- evaluation -----------------------------------------------------------------------------------------------------


class KNN(Probe):
    """k nearest neighbours by cosine.

    Metrics: `majority`, the accuracy where each neighbour has one vote (scikit-learn's KNeighborsClassifier), and
    `weighted`, where a vote weighs exp(cosine / temperature), as in Wu et al. 2018 and DINO. Equal votes go to the
    lowest label.
    """

    k: int = Field(gt=0)
    """Neighbours that vote; DINO's table has the best of 10, 20, 100 and 200, usually 20."""
    temperature: float = Field(gt=0)
    """How fast a vote loses weight with the cosine: 0.07 in the papers."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "majority", "weighted"

    def check(self, labels: Tensor) -> None:
        super().check(labels)
        if self.k > len(labels):
            raise ValueError(f"k={self.k} neighbours are asked for, but `train` has {len(labels)} images")

    def probe(self, examples: Examples) -> Report:
        cosines, places = nearest_neighbours(examples.features, examples.train_features, self.k)
        labels = examples.train_labels[places]
        weights = {
            "majority": torch.ones_like(cosines),
            "weighted": ((cosines.double() - 1) / self.temperature).exp(),
        }
        predicted = {name: vote(labels, weight, examples.num_classes) for name, weight in weights.items()}
        hits = {name: (found == examples.labels).double() for name, found in predicted.items()}
        return Report(means(hits, dict.fromkeys(hits, examples.chance)))

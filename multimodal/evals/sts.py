"""Semantic text similarity: whether the text tower finds two sentences as alike as people do."""

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from multimodal.data.archives import described, read_text
from multimodal.data.texts import lines_of
from multimodal.evals.intervals import bootstrap
from multimodal.parts import Encoder, Estimate, Eval, Report, Sources

# --- metrics --------------------------------------------------------------------------------------------------------


def midranks(
    values: Tensor,  # [n]
    counts: Tensor,  # [R, n] how often each value is there
) -> Tensor:  # float64 [R, n] from 1, equal values the mean of their places
    """Ranks in R samples of the same values; with all counts 1 they equal `scipy.stats.rankdata`."""
    unique, place = torch.unique(values, return_inverse=True)
    counts = counts.double()
    sizes = torch.zeros(len(counts), len(unique), dtype=torch.float64).index_add(1, place, counts)
    return (sizes.cumsum(dim=1) - (sizes - 1) / 2)[:, place]


def pearson(
    x: Tensor,  # [n] or [R, n]
    y: Tensor,  # likewise
    counts: Tensor,  # [R, n] how often each pair is there
) -> Tensor:  # float64 [R]
    """Pearson's correlation in R samples of the same pairs; not a number where one side does not vary."""
    weights = counts.double() / counts.double().sum(dim=1, keepdim=True)
    (x, in_x), (y, in_y) = (_centred(values.double().expand_as(weights), weights) for values in (x, y))
    covariance = (weights * x * y).sum(dim=1)
    return torch.where((in_x > 0) & (in_y > 0), covariance / (in_x * in_y).sqrt(), torch.nan).clamp(-1, 1)


def _centred(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Without their mean, and the variance: 0 where it is not above what rounding leaves of equal values."""
    centred = values - (weights * values).sum(dim=1, keepdim=True)
    variance, size = (weights * centred**2).sum(dim=1), (weights * values**2).sum(dim=1)
    return centred, torch.where(variance > 1e-24 * size, variance, 0.0)


def spearman(
    x: Tensor,  # [n]
    y: Tensor,  # [n]
    counts: Tensor,  # [R, n] how often each pair is there
) -> Tensor:  # float64 [R]
    """Spearman's rank correlation in R samples of the same pairs: `scipy.stats.spearmanr` of each of them.

    Says whether the order is right, whatever the scale: the number that is reported for STS (Reimers et al. 2016).
    """
    if not (x.isfinite().all() and y.isfinite().all()):
        return torch.full((len(counts),), torch.nan, dtype=torch.float64)  # what is no number has no rank
    return pearson(midranks(x, counts), midranks(y, counts), counts)


def correlation(
    statistic: Callable[[Tensor, Tensor, Tensor], Tensor],  # `spearman` or `pearson`
    x: Tensor,  # [n]
    y: Tensor,  # [n]
) -> Estimate:
    """A correlation with its interval, over pairs drawn again; one that knows nothing has 0."""
    value = statistic(x, y, torch.ones(1, len(x))).item()
    low, high = bootstrap(partial(statistic, x, y), len(x))
    return Estimate(value, low.item(), high.item(), chance=0.0, count=len(x))


# --- data -----------------------------------------------------------------------------------------------------------

COLUMNS = "genre, file, year, id, score, sentence1, sentence2"
SCORES = (0.0, 5.0)


class ScoredPair(NamedTuple):
    """Two sentences, and how alike people found them."""

    score: float
    """0 (nothing in common) to 5 (the same meaning)."""
    first: str
    second: str


def read_pairs(text: str, name: str) -> list[ScoredPair]:
    """The rows of a file in the form of STS-B: seven columns by tabs, no header, no quotes; further ones are left out.

    ValueError, naming the line, for a row of another form.
    """
    found = []
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < 7:
            raise ValueError(f"{name}, line {number}: {len(fields)} columns by tabs instead of seven ({COLUMNS})")
        try:
            score = float(fields[4])
        except ValueError:
            score = math.nan
        if not SCORES[0] <= score <= SCORES[1]:
            raise ValueError(f"{name}, line {number}: the fifth column should be a score, 0 to 5, got '{fields[4]}'")
        if not fields[5] or not fields[6]:
            raise ValueError(f"{name}, line {number}: a sentence is empty, which no tower can embed")
        found.append(ScoredPair(score, fields[5], fields[6]))
    return found


# --- evaluation -----------------------------------------------------------------------------------------------------


class TextSimilarity(Eval):
    """How the cosines of pairs of sentences follow the scores that people gave them; asks the text tower alone.

    Metrics: `spearman`, of ranks, which is what is usually reported; `pearson`. Cer et al. 2017.
    """

    towers: ClassVar[tuple[str, ...]] = ("text",)

    path: str
    """A file in the form of STS-B (genre, file, year, id, score, sentence1, sentence2 by tabs), or an archive of it."""
    member: str | None
    """Where in the tar archive; null if `path` is the file itself."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "spearman", "pearson"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        name = described(self.path, self.member)
        pairs = read_pairs(read_text(data.root, self.path, self.member), name)
        if len({pair.score for pair in pairs}) < 2:
            raise ValueError(f"{name}: {len(pairs)} pairs with not two different scores, so nothing to correlate with")
        return partial(self._run, pairs)

    def _run(self, pairs: list[ScoredPair], encoder: Encoder) -> Report:
        features = encoder.encode("text", [pair.first for pair in pairs] + [pair.second for pair in pairs]).double()
        cosines = (features[: len(pairs)] * features[len(pairs) :]).sum(dim=1)
        scores = torch.tensor([pair.score for pair in pairs], dtype=torch.float64)
        return Report(
            {"spearman": correlation(spearman, cosines, scores), "pearson": correlation(pearson, cosines, scores)}
        )

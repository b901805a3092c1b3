"""Spread over seeds, and whether two groups differ by more than their seeds do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["t", "permutation"]
NAMES: dict[Kind, str] = {"t": "paired t-test", "permutation": "paired permutation test"}
FEWEST = 3
"""Pairs: with two, a t-test has one degree of freedom, and signs can be permuted in two ways that differ."""


@dataclass(frozen=True)
class Spread:
    """Of a metric over the runs of a group."""

    mean: float
    std: float | None
    """Of the sample (n - 1); None for a single run."""
    count: int


@dataclass(frozen=True)
class Paired:
    """Of the differences of two groups over the seeds that both have."""

    difference: float
    """Mean of the second less that of the first."""
    pairs: int
    p: float | None
    """Two-sided; None for fewer than 3 pairs, and for a t-test where all differences are the same but not 0."""


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def paired(first: Mapping[int, float], second: Mapping[int, float], kind: Kind = "t") -> Paired | None:
    """Values by seed; None where no seed is in both.

    The t-test takes differences to be normal, which few seeds cannot show. The permutation test does not: it counts the
    signs of the differences that give a mean as far from 0, so its p is at least 2 / 2^pairs, 0.25 with 3 pairs.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = np.array([second[seed] - first[seed] for seed in seeds])
    return Paired(float(differences.mean()), len(seeds), _p(differences, kind) if len(seeds) >= FEWEST else None)


def _p(differences: np.ndarray, kind: Kind) -> float | None:
    from scipy import stats

    if not differences.any():
        return 1.0
    if kind == "permutation":
        found = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=2**14, rng=0
        )
        return float(found.pvalue)
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Corrected for their number: the chance of any false alarm among them stays below the level. Holm 1979."""
    corrected = [math.nan] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected

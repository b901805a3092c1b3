"""The law error = a + b x^-c, fitted to points, with intervals by the bootstrap."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from multimodal.threads import one_thread

Floats = NDArray[np.float64]

FEWEST = 4
"""Sizes: three of them are met by some law whatever they are."""
HUBER = 0.01
"""Residuals of the logarithm beyond which a point counts less: 1% of the error."""
STARTS = (0.0, 0.3, 0.6, 0.9)
"""What the floor is at the start, as a share of the least error."""
STEEPEST = 5.0
NOTHING = 1e-12
"""A share of the least error: what falls is never less, in the middle of the sizes."""
TAIL = 2.5
"""Percent, on each side of an interval."""


@dataclass(frozen=True)
class Law:
    """error = a + b x^-c."""

    a: float
    """The floor, 0 or more: what no size gets below."""
    log_b: float
    """b is of the unit of x, and may be any size."""
    c: float

    def __call__(self, x: float | Floats) -> Floats:
        """The error at a size."""
        return self.a + np.exp(self.log_b - self.c * np.log(x))


@dataclass(frozen=True)
class Fit:
    """The law of some points, and those of the points as they might also have been."""

    law: Law
    resampled: list[Law]
    noise: Floats
    """Residuals of the logarithm, widened for the three numbers that were fitted, and as Student's t is, because their
    spread is itself known from few points."""
    seed: int

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% intervals of a, log_b and c."""
        names = ("a", "log_b", "c")
        return {name: _interval(np.array([getattr(law, name) for law in self.resampled])) for name in names}

    def band(self, x: Floats) -> tuple[Floats, Floats]:
        """The 95% interval of the law at some sizes."""
        drawn = np.array([law(x) for law in self.resampled])
        low, high = np.percentile(drawn, [TAIL, 100 - TAIL], axis=0)
        return low, high

    def foretold(self, x: float) -> tuple[float, float, float]:
        """The error of one more run, and its 95% interval: the law's own, and what runs are off it."""
        rng = np.random.default_rng(self.seed + 1)
        noise = rng.choice(self.noise, len(self.resampled))
        drawn = np.array([law(x) for law in self.resampled]) * np.exp(noise)
        return float(self.law(x)), *_interval(drawn)


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [TAIL, 100 - TAIL])
    return float(low), float(high)


def fit(
    x: Floats,  # [n] sizes, positive
    error: Floats,  # [n] positive
    resamples: int = 1000,
    seed: int = 0,
) -> Fit:
    """By a Huber loss on logarithms, from several starts, as Hoffmann et al. 2022 (Chinchilla) did; a is 0 or more.

    Intervals are of a bootstrap of residuals: with few sizes, samples of the points themselves would often lack the
    ends. ValueError for fewer than 4 sizes, or for an error that is 0.
    """
    from scipy import stats

    if (sizes := len(np.unique(x))) < FEWEST:
        raise ValueError(f"{sizes} sizes: a law of three numbers wants {FEWEST} or more")
    if not (error > 0).all() or not (x > 0).all():
        raise ValueError("an error or a size of 0 has no logarithm")
    law = _best(x, error, STARTS)
    fitted = law(x)
    residuals = np.log(error / fitted)
    left = len(x) - 3
    noise = (residuals - residuals.mean()) * np.sqrt(len(x) / left) * stats.t.ppf(0.975, left) / stats.norm.ppf(0.975)
    rng = np.random.default_rng(seed)
    drawn = (fitted * np.exp(rng.choice(noise, len(x))) for _ in range(resamples))
    bar = tqdm(drawn, total=resamples, desc="Fitting resamples", unit="fit", delay=2, disable=None)
    return Fit(law, [_best(x, one, (STARTS[0], STARTS[-1])) for one in bar], noise, seed)


def _best(x: Floats, error: Floats, starts: tuple[float, ...]) -> Law:
    """The law with the least loss of those that starts lead to."""
    from scipy.optimize import minimize

    centre = np.exp(np.log(x).mean())
    z, logs, top = np.log(x / centre), np.log(error), error.min()

    levels = (logs.min() + np.log(NOTHING), logs.max() + STEEPEST * z.max())

    def loss(p: Floats) -> tuple[float, Floats]:
        """Of a in units of the least error, the level at the centre, and c; and its gradient."""
        falling = np.exp(p[1] - p[2] * z)
        whole = p[0] * top + falling
        off = (np.log(whole) - logs) / HUBER
        pull = np.clip(off, -1, 1) / whole  # the slope of the Huber loss
        gradient = np.array([top * pull.sum(), pull @ falling, -(pull * falling) @ z])
        return float((np.clip(off, -1, 1) * (off - np.clip(off, -1, 1) / 2)).sum()), gradient / HUBER

    def solutions() -> Iterator[Any]:
        for share in starts:
            slope, level = np.polyfit(z, np.log(error - share * top), 1)
            start = np.array([share, level, np.clip(-slope, 0, STEEPEST)])
            bounds = [(0, error.max() / top), levels, (0, STEEPEST)]
            options = {"ftol": 1e-9, "gtol": 1e-6, "maxiter": 500}
            yield minimize(loss, start, method="L-BFGS-B", jac=True, bounds=bounds, options=options)

    with one_thread():
        a, level, c = min(solutions(), key=lambda solution: solution.fun).x
    return Law(float(a * top), float(level + c * np.log(centre)), float(c))

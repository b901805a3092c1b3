"""How sure a number is: 95% intervals by the bootstrap."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multimodal.parts import Estimate

RESAMPLES = 1000
LEVEL = 0.95
AT_A_TIME = 2**19
"""So many counts in memory."""
IN_CACHE = 2**14
"""So many that are drawn at once."""


def bootstrap(
    statistic: Callable[[Tensor], Tensor],  # from how often each unit was drawn, float64 [R, n], to its values [R, ...]
    count: int,  # n, units that are drawn: samples, or images with all of their captions
    seed: int = 0,
    strata: Tensor | None = None,  # int64 [n]: of each kind as many are drawn as there are
) -> tuple[Tensor, Tensor]:  # [...] each, the ends of the 95% interval
    """The percentiles of a statistic over 1,000 samples of the same size, drawn from the data with replacement.

    The statistic is given counts, not data, so that the same draws serve many numbers. Efron 1979.
    """
    rng = np.random.default_rng(seed)
    kinds, order = (torch.zeros(count) if strata is None else strata).sort(stable=True)
    sizes = torch.unique_consecutive(kinds, return_counts=True)[1]
    firsts, highs = (torch.repeat_interleave(ends, sizes).numpy() for ends in (sizes.cumsum(0) - sizes, sizes))
    units = order.numpy()  # kind by kind: for each one another of its kind is drawn

    def draw(rows: int) -> NDArray[np.int64]:  # [rows, n] how often each unit is
        found = rng.integers(count if strata is None else highs, size=(rows, count))
        if strata is not None:
            found = units[firsts + found]
        found += count * np.arange(rows)[:, None]
        return np.bincount(found.ravel(), minlength=rows * count).reshape(rows, count)

    drawn = torch.empty(min(RESAMPLES, max(1, AT_A_TIME // max(1, count))), count, dtype=torch.float64)
    values: Tensor | None = None
    for start in range(0, RESAMPLES, len(drawn)):
        some = drawn[: RESAMPLES - start]
        for piece in torch.split(some, max(1, IN_CACHE // max(1, count))):
            piece.numpy()[:] = draw(len(piece))
        found = statistic(some)
        if values is None:  # in one piece: small ones that are kept between large ones that go make the heap grow
            values = torch.empty(RESAMPLES, *found.shape[1:], dtype=torch.float64)
        values[start : start + len(some)] = found
    assert values is not None
    tail = (1 - LEVEL) / 2
    low, high = values.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def means(
    scores: Mapping[str, Tensor],  # by metric, [n], one number for each sample
    chance: Mapping[str, float] | None = None,  # by metric
    groups: Tensor | None = None,  # int64 [n], from 0, of samples that are drawn together: the captions of an image
) -> dict[str, Estimate]:
    """The mean of each metric over samples, with its interval, count and, where it is known, chance level."""
    table = torch.stack([values.double() for values in scores.values()], dim=1)  # [n, metrics]
    groups = torch.arange(len(table)) if groups is None else groups
    sizes = torch.bincount(groups).double()
    sums = torch.zeros(len(sizes), table.shape[1], dtype=torch.float64).index_add(0, groups, table)
    low, high = bootstrap(lambda drawn: drawn @ sums / (drawn @ sizes)[:, None], len(sizes))
    known, sure = chance or {}, len(sizes) > 1  # one unit says nothing of others
    return {
        name: Estimate(value, below if sure else None, above if sure else None, known.get(name), len(table))
        for name, value, below, above in zip(
            scores, table.mean(dim=0).tolist(), low.tolist(), high.tolist(), strict=True
        )
    }


def median(
    values: Tensor,  # [n]
    chance: float | None = None,
    groups: Tensor | None = None,  # int64 [n], as in `means`
) -> Estimate:
    """The median with its interval; the mean of the middle two where their number is even."""
    ordered, order = values.double().sort()
    groups = torch.arange(len(values)) if groups is None else groups
    groups = groups[order]

    def weighted(drawn: Tensor) -> Tensor:
        below = drawn[:, groups].cumsum(dim=1)
        half = below[:, -1:] / 2
        middle = [torch.searchsorted(below, half, right=right).clamp(max=len(ordered) - 1) for right in (False, True)]
        return (ordered[middle[0]] + ordered[middle[1]]).squeeze(1) / 2

    value, count = ordered.quantile(0.5).item(), int(groups.max()) + 1
    if count < 2:
        return Estimate(value, chance=chance, count=len(values))
    low, high = bootstrap(weighted, count)
    return Estimate(value, low.item(), high.item(), chance, len(values))

"""How sure a number is: 95% intervals by the bootstrap."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from multimodal.parts import Estimate

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    statistic: Callable[[Tensor], Tensor],  # from how often each unit was drawn, float64 [R, n], to its values [R, ...]
    count: int,  # n, units that are drawn: samples, or images with all of their captions
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # [...] each, the ends of the 95% interval
    """The percentiles of a statistic over 1,000 samples of the same size, drawn from the data with replacement.

    The statistic is given counts, not data, so that the same draws serve many numbers. Efron 1979.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // max(1, count))
    values = []
    for start in range(0, RESAMPLES, rows):
        drawn = [
            np.bincount(rng.integers(count, size=count), minlength=count)
            for _ in range(start, min(start + rows, RESAMPLES))
        ]
        values.append(statistic(torch.from_numpy(np.stack(drawn)).double()))
    tail = (1 - LEVEL) / 2
    ends = torch.cat(values).double().nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return ends[0], ends[1]


def means(
    scores: dict[str, Tensor],  # by metric, [n] one number for each sample
    chance: dict[str, float] | None = None,  # by metric
    groups: Tensor
    | None = None,  # int64 [n], from 0: samples of a group are drawn together, such as an image's captions
) -> dict[str, float | Estimate]:
    """The mean of each metric over samples, with its interval, count and, where it is known, chance level."""
    if not scores:
        return {}
    table = torch.stack([values.double() for values in scores.values()], dim=1)  # [n, metrics]
    count = len(table)
    sums, sizes = table, torch.ones(count, dtype=torch.float64)
    if groups is not None:
        num_groups = int(groups.max()) + 1
        sums = torch.zeros(num_groups, table.shape[1], dtype=torch.float64).index_add(0, groups, table)
        sizes = torch.bincount(groups, minlength=num_groups).double()
    low, high = bootstrap(lambda drawn: drawn @ sums / (drawn @ sizes)[:, None], len(sums))
    known = chance or {}
    return {
        name: Estimate(value, *ends, chance=known.get(name), count=count)
        for name, value, *ends in zip(scores, table.mean(dim=0).tolist(), low.tolist(), high.tolist(), strict=True)
    }

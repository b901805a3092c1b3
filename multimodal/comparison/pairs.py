"""Which groups are tested against which, in which metrics."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from multimodal.comparison.groups import Compared, Group
from multimodal.comparison.statistics import Kind, Paired, holm, paired
from multimodal.report.overview import main_metrics
from multimodal.resolve import did_you_mean


@dataclass(frozen=True)
class Tested:
    """Two groups in a metric."""

    key: str
    first: Group
    second: Group
    found: Paired
    corrected: float | None = None
    """p for as many tests as there are."""


def chosen(compared: Compared, patterns: Sequence[str]) -> list[str]:
    """The metrics that patterns stand for, or the main ones of each evaluation; ValueError for one that finds none."""
    if not patterns:
        main = main_metrics([run for group in compared.groups for run in group.runs])
        main = [key for key in main if key in compared.keys]
        return main or [key for key in compared.keys if key == "train/loss"]
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = fnmatch.filter(compared.keys, pattern)
        if not matches:
            raise ValueError(f"no run has a metric '{pattern}'.{did_you_mean(pattern, compared.keys)}")
        found |= dict.fromkeys(matches)
    return list(found)


def performed(tests: Sequence[Tested]) -> list[Tested]:
    """Those of which something can be said; it is their number that each p is corrected for."""
    return [test for test in tests if test.found.p is not None]


def all_pairs(compared: Compared, keys: Sequence[str], kind: Kind = "t", baseline: Group | None = None) -> list[Tested]:
    """Every two groups, or each against the baseline, that share a seed; corrected for all tests together (Holm)."""
    groups = [group for group in compared.groups if group.settings]  # others have no seed
    if baseline is None:
        pairs = list(combinations(groups, 2))
    else:
        pairs = [(baseline, group) for group in groups if group is not baseline]
    made = [
        Tested(key, first, second, found)
        for key in keys
        for first, second in pairs
        if (found := paired(first.values(key), second.values(key), kind)) is not None
    ]
    ps = iter(holm([test.found.p for test in made if test.found.p is not None]))
    return [test if test.found.p is None else replace(test, corrected=next(ps)) for test in made]

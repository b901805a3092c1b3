"""Tables of results: for each evaluation a row for each metric, a column for each run."""

from collections.abc import Sequence
from dataclasses import dataclass

from multimodal.report.folders import Run, Value, split
from multimodal.report.numbers import amount, better, chance, interval, is_share, plain

CHANCE = "chance"
"""A metric of older zero-shot evaluations: what guessing gives of these."""
OF_CHANCE = ("top1", "mean_per_class")


@dataclass(frozen=True)
class Cell:
    """A run's value of a metric."""

    text: str
    interval: str
    sort: float | None
    mark: str
    """best where no other interval reaches it; tied where the best one's does; else empty."""
    other_step: int | None
    """Where it is not of the run's last step."""


@dataclass(frozen=True)
class Line:
    """A metric over all runs."""

    metric: str
    unit: str
    cells: list[Cell | None]
    """None where a run has not been evaluated so."""
    chance: str
    count: str
    chance_sort: float | None
    count_sort: float | None
    same: bool
    """Whether all runs had as many samples and the same chance; else they were measured on other data."""


@dataclass(frozen=True)
class Table:
    """An evaluation of those runs that have it."""

    evaluation: str
    runs: list[int]
    lines: list[Line]


def title(evaluation: str) -> str:
    """How an evaluation is called on the page."""
    kind, _, name = evaluation.partition("/")
    return f"{name}, running mean of the weights" if kind == "eval_ema" else name or "Other pictures"


def tables(runs: Sequence[Run]) -> list[Table]:
    """All evaluations that at least one run has."""
    metrics: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.values):
        evaluation, metric = split(key)
        metrics.setdefault(evaluation, []).append(metric)
    ordered = sorted(metrics, key=lambda name: name.startswith("eval_ema/"))
    return [_table(name, _shown(metrics[name]), runs) for name in ordered]


def _table(evaluation: str, metrics: list[str], runs: Sequence[Run]) -> Table:
    having = [i for i, run in enumerate(runs) if any(f"{evaluation}/{metric}" in run.values for metric in metrics)]
    return Table(evaluation, having, [_line(evaluation, metric, [runs[i] for i in having]) for metric in metrics])


def _shown(metrics: list[str]) -> list[str]:
    return [metric for metric in metrics if metric != CHANCE or len(metrics) == 1]


def _line(evaluation: str, metric: str, runs: Sequence[Run]) -> Line:
    values = [run.values.get(f"{evaluation}/{metric}") for run in runs]
    known = [value for value in values if value is not None]
    share = is_share(metric, known)
    chances = [value.chance for value in known if value.chance is not None]
    if not chances and metric in OF_CHANCE:
        told = [run.values[f"{evaluation}/{CHANCE}"].value for run in runs if f"{evaluation}/{CHANCE}" in run.values]
        chances = [value for value in told if value is not None]
    counts = [value.count for value in known if value.count is not None]
    same = len(set(chances)) <= 1 and len(set(counts)) <= 1
    marks = _marks(values, better(metric, share)) if same else ["" for _ in values]
    return Line(
        metric,
        "%" if share else "",
        [
            None if value is None else _cell(value, share, mark, run)
            for value, mark, run in zip(values, marks, runs, strict=True)
        ],
        _list([chance(value, share) for value in chances]),
        _list([plain(value) for value in counts]),
        min(chances, default=None),
        min(counts, default=None),
        same,
    )


def _list(texts: list[str]) -> str:
    """One, where all runs agree."""
    return " / ".join(dict.fromkeys(texts)) or plain(None)


def last_step(run: Run) -> int | None:
    """The step that a run's newest value is of."""
    return max((value.step for value in run.values.values()), default=None)


def _cell(value: Value, share: bool, mark: str, run: Run) -> Cell:
    other = value.step if value.step != last_step(run) else None
    return Cell(amount(value.value, share), interval(value, share), value.value, mark, other)


def _marks(values: Sequence[Value | None], sign: int) -> list[str]:
    """Which value is the best, and which intervals reach into its; none where there is nothing to tell by."""
    spans = [_span(value, sign) for value in values]
    known = [span for span in spans if span is not None]
    if sign == 0 or len(known) < 2 or len(known) < sum(v is not None and v.value is not None for v in values):
        return ["" for _ in values]
    best = max(known)
    tied = [span is not None and span[2] >= best[1] for span in spans]
    if sum(tied) == 1:
        return ["best" if one else "" for one in tied]
    return ["tied" if one else "" for one in tied]


def _span(value: Value | None, sign: int) -> tuple[float, float, float] | None:
    """Value and bounds, turned so that more is better."""
    if value is None or value.value is None or value.low is None or value.high is None:
        return None
    low, high = sorted((sign * value.low, sign * value.high))
    return sign * value.value, low, high

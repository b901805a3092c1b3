"""Runs at a glance: how far each one is, its main numbers, and where their configurations differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from multimodal.report.folders import Run, number, split
from multimodal.report.numbers import NONE, amount, is_share, plain, short

MAIN = ("top1", "i2t_r1", "t2i_r1", "accuracy", "spearman", "recall")
"""Metrics that stand for an evaluation, as far as it has them; else its first one does."""
MOST = 6
"""Columns of main numbers."""
SAME = ("run.name", "paths")
"""Settings that say only what a run is called and where it was."""
TARGET = "_target_"
ABSENT = object()
LONGEST = 90


@dataclass(frozen=True)
class Fact:
    """A cell: what is shown, what it is sorted by, and the whole of it where it is shortened."""

    text: str
    sort: float | str | None = None
    whole: str = ""


@dataclass(frozen=True)
class Column:
    """A fact of all runs."""

    name: str
    unit: str
    facts: list[Fact]
    evaluation: str = ""


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in all runs."""

    path: str
    values: list[Fact]


def columns(runs: Sequence[Run]) -> list[Column]:
    """What is known of each run, then the main numbers of its evaluations."""
    facts: dict[str, list[Fact]] = {
        "status": [Fact(status(run), status(run)) for run in runs],
        "step": [_count(_progress(run, "step")) for run in runs],
        "samples": [_count(_progress(run, "samples"), brief=True) for run in runs],
        "parameters": [_count(run.parameters, brief=True) for run in runs],
        "samples/s": [_count(speed(run)) for run in runs],
    }
    known = [Column(name, "median" if name == "samples/s" else "", cells) for name, cells in facts.items()]
    return [column for column in known if any(fact.text != NONE for fact in column.facts)] + [
        _metric(key, runs) for key in main_metrics(runs)[:MOST]
    ]


def status(run: Run) -> str:
    """Running, finished, stopped early, stopped or failed, as the run said last."""
    told = run.summary.get("status")
    return told if isinstance(told, str) and told else "evaluated only" if not run.rows and not run.config else NONE


def speed(run: Run) -> float | None:
    """Samples a second, the median of all log entries."""
    speeds = [value for row in run.rows if (value := number(row.get("train/samples_per_s"))) is not None]
    return median(speeds) if speeds else None


def main_metrics(runs: Sequence[Run]) -> list[str]:
    """What runs judge their checkpoints by, then the keys that stand for each evaluation, those of most runs first.

    Those with the running mean of the weights only where that is all there is.
    """
    keys: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.values):
        keys.setdefault(split(key)[0], []).append(key)
    chosen = [key for run in runs if (key := _best(run)) in run.values]
    for evaluation, known in sorted(keys.items(), key=lambda item: -_having(item[0], runs)):
        if evaluation.startswith("eval_ema/") and evaluation.replace("eval_ema", "eval", 1) in keys:
            continue
        wanted = [f"{evaluation}/{metric}" for metric in MAIN]
        chosen += [key for key in wanted if key in known][:2] or known[:1]
    return list(dict.fromkeys(chosen))


def _best(run: Run) -> str:
    """The metric that the run judges its checkpoints by."""
    section = run.config.get("checkpoint")
    return str(section.get("best")) if isinstance(section, dict) else ""


def _having(evaluation: str, runs: Sequence[Run]) -> int:
    """How many runs have it."""
    return sum(any(split(key)[0] == evaluation for key in run.values) for run in runs)


def _progress(run: Run, name: str) -> float | None:
    last = run.rows[-1] if run.rows else {}
    return number(run.summary.get(name, last.get(name)))


def _count(value: float | None, brief: bool = False) -> Fact:
    return Fact(
        short(value) if brief else plain(None if value is None else round(value)), value, plain(value) if brief else ""
    )


def _metric(key: str, runs: Sequence[Run]) -> Column:
    values = [run.values.get(key) for run in runs]
    share = is_share(split(key)[1], [value for value in values if value is not None])
    numbers = [None if value is None else value.value for value in values]
    evaluation, metric = split(key)
    return Column(metric, "%" if share else "", [Fact(amount(value, share), value) for value in numbers], evaluation)


# --- configurations -------------------------------------------------------------------------------------------------


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The settings that differ between those configurations that say anything; one for a part that some do not have."""
    known = [bool(config) for config in configs]
    if sum(known) < 2:
        return []
    return [
        Difference(path, [_setting(value) if there else Fact(NONE) for value, there in zip(values, known, strict=True)])
        for path, values in _differing("", [config or ABSENT for config in configs], known)
        if not any(path == same or path.startswith(f"{same}.") for same in SAME)
    ]


def _differing(path: str, values: list[Any], counted: list[bool]) -> Iterator[tuple[str, list[Any]]]:
    known = [value for value, counts in zip(values, counted, strict=True) if counts]
    if all(value == known[0] and type(value) is type(known[0]) for value in known):
        return
    if not all(isinstance(value, Mapping) for value in known):
        yield path, values
        return
    targets = {repr(value.get(TARGET)) for value in known}
    if len(targets) > 1:
        yield path, values
    for key in dict.fromkeys(key for value in known for key in value if key != TARGET):
        if len(targets) > 1 and len({repr(value[key]) for value in known if key in value}) == 1:
            continue  # the other part has no such setting
        inner = [value.get(key, ABSENT) if isinstance(value, Mapping) else ABSENT for value in values]
        yield from _differing(f"{path}.{key}" if path else str(key), inner, counted)


def _setting(value: Any) -> Fact:
    if value is ABSENT:
        return Fact(NONE)
    if isinstance(value, Mapping):
        target = str(value.get(TARGET, "")).rpartition(".")[2]
        text = target or f"{len(value)} settings"
        return Fact(text, text, json.dumps(value, ensure_ascii=False, default=str))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    sort = number(value)
    if len(text) > LONGEST:
        return Fact(f"{text[:LONGEST]}…", text if sort is None else sort, text)
    return Fact(text, text if sort is None else sort)

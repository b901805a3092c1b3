"""What a run logs, known from its configuration, and what it has logged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multimodal.config import TrainConfig, metrics_of
from multimodal.search.config import Objective
from multimodal.tracker import METRICS, SUMMARY, Row

TRAINING = (
    "loss",
    "logit_scale",
    "grad_norm",
    "lr",
    "epoch",
    "samples_per_s",
    "data_wait",
    "duplicate_captions",
    "broken_samples",
    "truncated_captions",
)
"""Logged of every run, as train/..."""
NUM_PARAMETERS = "num_parameters/"
"""What the names of facts in a run's summary begin with that count its parameters."""


def logged(config: TrainConfig) -> list[str]:
    """The names of all metrics that a run logs, and of counts in its summary."""
    return [
        *metrics_of(config),
        *(f"train/{name}" for name in TRAINING),
        *(f"train/grad_norm/{tower}" for tower in config.towers),
        *(f"train/loss/{name}" for name in config.loss if len(config.loss) > 1),
        *(f"{NUM_PARAMETERS}{name}" for name in (*config.towers, "total")),
    ]


def rows_of(folder: Path) -> list[Row]:
    """All that a run has logged by now; a row that is being written is none yet."""
    try:
        lines = (folder / METRICS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run says of itself; nothing if it has not begun."""
    try:
        found = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def samples_of(folder: Path) -> tuple[int, int] | None:
    """How many samples a run has taken, and how many the whole run has; None if it has taken no step."""
    summary = summary_of(folder)  # of a run that was killed it is older than the log
    last = max([summary, *rows_of(folder)[-1:]], key=lambda row: row.get("samples", 0))
    if not last.get("samples") or "total_steps" not in summary:
        return None
    return last["samples"], last["samples"] * summary["total_steps"] // last["step"]


def values_of(folder: Path, objectives: Mapping[str, Objective]) -> dict[str, float | None]:
    """What a run that has ended reached, by metric; None where that is no number."""
    rows, summary = rows_of(folder), summary_of(folder)
    found: dict[str, float | None] = {}
    for metric, objective in objectives.items():
        values = [row[metric] for row in rows if metric in row] or [summary.get(metric)]
        if objective.value != "last":  # one that was not finite is null
            values = [value for value in values if value is not None]
        found[metric] = objective.of(values) if values and values[-1] is not None else None
    return found

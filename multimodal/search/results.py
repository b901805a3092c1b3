"""What a search has found: a table, and the best configuration as an experiment."""

import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from multimodal.results_table import aligned
from multimodal.search.overrides import experiment
from multimodal.search.study import ENDED, FAILURES, SAME_AS, Study

SHOWN = 10
"""So many trials are shown; the file has all."""
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}


def short(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows(study: Study) -> list[dict[str, Any]]:
    """Of each trial that has ended or runs: what it was, what it reached, and why it failed."""
    search = study.search
    return [
        {
            "trial": trial.number,
            "state": STATES.get(trial.state, "running"),
            **dict.fromkeys(search.objectives),
            **dict(zip(search.objectives, trial.values or (), strict=False)),
            **{key: trial.params.get(key) for key in search.space},
            "seconds": None if trial.duration is None else round(trial.duration.total_seconds()),
            "run": search.run_of(trial),
            "note": _note(trial),
        }
        for trial in study.trials
    ]


def _note(trial: FrozenTrial) -> str:
    if SAME_AS in trial.user_attrs:
        return f"the same as trial {trial.user_attrs[SAME_AS]}"
    return "; ".join(trial.user_attrs.get(FAILURES, ()))


def write_table(study: Study, path: Path) -> None:
    """All trials as CSV."""
    found = rows(study)
    columns = found[0] if found else {}
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(found)
    partial.replace(path)


def table(study: Study) -> str:
    """The best trials for people, the best first; of several objectives those that none beats in all."""
    front = {trial.number for trial in study.optuna.best_trials}
    chosen = [trial for trial in study.trials if trial.state in ENDED and trial.values]
    if len(study.search.objectives) > 1:
        chosen = [trial for trial in chosen if trial.number in front]
    sign = -1 if study.search.directions[0] == "maximize" else 1
    chosen.sort(key=lambda trial: (trial.state != TrialState.COMPLETE, sign * (trial.values or [0.0])[0]))
    numbers = [trial.number for trial in chosen[:SHOWN]]
    found = rows(study)
    columns = ["trial", "state", *study.search.objectives, *study.search.space]
    cells = [columns, *([_cell(found[number][column]) for column in columns] for number in numbers)]
    return aligned(cells)


def _cell(value: Any) -> str:
    return "-" if value is None else short(value)


def spread(study: Study) -> Iterator[str]:
    """Of trials that differ in their seed: mean and standard deviation of each objective."""
    done = [trial.values for trial in study.trials if trial.state == TrialState.COMPLETE]
    if not done:
        yield "none came to its end"
        return
    for metric, values in zip(study.search.objectives, zip(*done, strict=True), strict=True):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        yield f"{metric} {short(statistics.fmean(values))} ± {short(deviation)}"


def write_experiment(study: Study, groups: list[str], folder: Path) -> Path:
    """The best trial as a file that is launched with `--config-dir` and `experiment=`; its path."""
    best, search = study.best, study.search
    name = f"{search.name}_best"
    reached = ", ".join(f"{m} {short(v)}" for m, v in zip(search.objectives, best.values, strict=True))
    title = f"# {command(folder, name)}\n# Trial {best.number} of the search {search.name}: {reached}"
    path = folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(experiment(search.words(study.chosen(best)), groups, title))
    return partial.replace(path)


def command(folder: Path, name: str) -> str:
    """What launches an experiment of a study's folder."""
    return f"uv run train.py --config-dir={folder} experiment={name}"

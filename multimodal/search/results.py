"""What a search has found: a table, and the best configuration as an experiment."""

import csv
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from multimodal.files import write_json
from multimodal.results_table import aligned
from multimodal.search.overrides import experiment, override, typed
from multimodal.search.study import ENDED, FAILURES, SAME_AS, SAMPLES, Study

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
            **dict(zip(("samples", "whole_samples"), trial.user_attrs.get(SAMPLES, (None, None)), strict=True)),
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
    cells = [[*columns, "of a run"]]
    cells += [[*(_cell(found[number][column]) for column in columns), _share(found[number])] for number in numbers]
    return aligned(cells)


def _cell(value: Any) -> str:
    return "-" if value is None else short(value)


def _share(row: dict[str, Any]) -> str:
    return "-" if row["samples"] is None else f"{row['samples'] / row['whole_samples']:.0%}"


@dataclass(frozen=True)
class Saved:
    """What was not trained, of the samples that all trials would have taken had each run to its end."""

    trials: int
    """That ended, without those that repeat another one."""
    samples: int
    """That they took."""
    whole_samples: int
    pruning: float
    """Share of the whole that was saved by ending trials early."""
    early_stopping: float
    """By what runs do of themselves."""

    @classmethod
    def of(cls, study: Study) -> "Saved":
        """Trials that failed do not count."""
        counted = [t for t in study.trials if t.state in ENDED and SAMPLES in t.user_attrs]
        left: Counter[TrialState] = Counter()
        for trial in counted:
            samples, whole = trial.user_attrs[SAMPLES]
            left[trial.state] += whole - samples
        took, total = (sum(trial.user_attrs[SAMPLES][at] for trial in counted) for at in (0, 1))
        pruned, stopped = (left[state] / max(1, total) for state in (TrialState.PRUNED, TrialState.COMPLETE))
        return cls(len(counted), took, total, pruned, stopped)

    def __str__(self) -> str:
        of = f"of the samples of {self.trials} trials"
        if not self.pruning and self.early_stopping:
            return f"early stopping saved {self.early_stopping:.0%} {of}"
        early = f", early stopping {self.early_stopping:.0%}" if self.early_stopping else ""
        return f"pruning saved {self.pruning:.0%} {of}{early}"


def deviations(study: Study) -> dict[str, dict[str, float | None]]:
    """By objective, of trials that differ in their seed: mean and standard deviation (None of one trial)."""
    done = [trial.values for trial in study.trials if trial.state == TrialState.COMPLETE]
    if not done:
        return {}
    return {
        metric: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for metric, values in zip(study.search.objectives, zip(*done, strict=True), strict=True)
    }


def spread(study: Study) -> str:
    """The same as text."""
    found = deviations(study).items()
    deviation = {metric: "" if one["std"] is None else f" ± {short(one['std'])}" for metric, one in found}
    told = [f"{metric} {short(one['mean'])}{deviation[metric]}" for metric, one in found]
    return ", ".join(told) or "none came to its end"


def write_results(
    study: Study,
    seeds: Study | None,  # the best trial with other seeds
    launch: str,  # the command of the best
    path: Path,
) -> None:
    """What was found as JSON; each trial is in the table."""
    best, search = study.best, study.search
    states = Counter(STATES.get(trial.state, "running") for trial in study.trials)
    found = {
        "search": search.name,
        "trials": {**dict.fromkeys(STATES.values(), 0), **states},
        "best": {
            "trial": best.number,
            "run": search.run_of(best),
            "values": dict(zip(search.objectives, best.values, strict=True)),
            "parameters": study.chosen(best),
            "command": launch,
        },
        "replicates": None if seeds is None else deviations(seeds),
        "saved": asdict(Saved.of(study)),
    }
    write_json(path, found)


def write_experiment(study: Study, groups: list[str], launch: str, path: Path) -> None:
    """The best trial as a file that is launched with `--config-dir` and `experiment=`."""
    best, search = study.best, study.search
    reached = ", ".join(f"{m} {short(v)}" for m, v in zip(search.objectives, best.values, strict=True))
    title = f"# {launch}\n# Trial {best.number} of the search {search.name}: {reached}"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(experiment(search.words(study.chosen(best)), groups, title))
    partial.replace(path)


def command(
    path: Path,  # of an experiment in a study's folder
    paths: Mapping[str, str],  # of the search
    default: Mapping[str, str],  # that the experiment would have by itself
    options: Sequence[str],  # of the search's command line: --config-dir=FOLDER
) -> str:
    """What launches it where its trial was, as it is typed in a shell."""
    words = [f"--config-dir={path.parent.parent}", f"experiment={path.stem}"]
    words += [typed(f"paths.{name}", where) for name, where in paths.items() if where != default[name]]
    if options:  # Hydra takes one --config-dir
        words.append(override("hydra.searchpath", [f"file://{option.partition('=')[2]}" for option in options]))
    return shlex.join(["uv", "run", "train.py", *words])

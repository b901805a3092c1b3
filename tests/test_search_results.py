"""The laws of what a search writes and shows."""

import csv
import io
import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from optuna.trial import TrialState
from searches import CURVES, SPACE, Written, follow, go_on, search, study

from multimodal.cli import CONF, compose, register_plugins
from multimodal.config import RunError
from multimodal.search.metrics import samples_of
from multimodal.search.overrides import override, parsed, typed
from multimodal.search.plots import write_plots
from multimodal.search.progress import Progress
from multimodal.search.pruners import Median
from multimodal.search.results import (
    Saved,
    command,
    deviations,
    spread,
    table,
    write_experiment,
    write_results,
    write_table,
)
from multimodal.search.space import Parameter
from multimodal.search.study import FAILURES, Search

# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["it's", "1e-3", "true", "a,b", "", [0.9, "x"], {"a": [1]}, None, True, 1e-05, 7])
def test_a_value_arrives_in_a_trial_as_it_is(value: Any) -> None:
    assert parsed(override("key", value)) == ("key", False, value)


def test_the_best_trial_as_an_experiment_is_the_same_run(tmp_path: Path) -> None:
    space = {
        **SPACE,
        "tower@towers.image": Parameter(values=("vit_tiny",)),
        "evals": Parameter(values=(["shapes", "shapes_knn"],)),
    }
    what = search(space)
    what = Search(**{**vars(what), "overrides": ("experiment=cifar10_tiny", "schedule=wsd", "checkpoint.best=null")})
    found = study(what)
    go_on(found, 4)
    groups = compose("train", ["run.name=x", *what.overrides])[1]
    write_experiment(found, groups, "the command", tmp_path / "experiment" / "search_best.yaml")
    trial = compose("train", [*what.words(found.chosen(found.best)), "run.name=x"])[0]
    register_plugins()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        again = compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=search_best", "run.name=x"])[0]
    assert again == trial


def test_table_and_plots_are_of_all_trials(tmp_path: Path) -> None:
    found = study(search())
    go_on(found, 3)
    trial, _ = found.choose(found.create("me"))
    trial.set_user_attr(FAILURES, ["killed by SIGKILL"])
    found.optuna.tell(trial, state=TrialState.FAIL)
    write_table(found, tmp_path / "trials.csv")
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert len(lines) == 5
    assert "failed" in lines[-1]
    assert "killed by SIGKILL" in lines[-1]
    assert table(found).splitlines()[1].split()[0] == str(found.best.number)
    names = {path.stem for path in write_plots(found, tmp_path / "plots")}
    assert names == {"history", "importance", "parallel", "slices", "curves"}


def test_where_no_replicate_ended_that_is_told() -> None:
    assert spread(study(search())) == "none came to its end"


def test_one_replicate_has_no_deviation(tmp_path: Path) -> None:
    found = study(search())
    follow(found, tmp_path, CURVES[0])
    ((_, one),) = deviations(found).items()
    assert one["std"] is None
    assert "±" not in spread(found)


def test_the_samples_that_were_not_trained_are_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = study(search(pruner=Median(startup=1, warmup=20)))
    ended = [follow(found, tmp_path, curve) for curve in CURVES]
    monkeypatch.setattr(Written, "end", "stopped early")
    monkeypatch.setattr(Written, "more", 10)
    follow(found, tmp_path, [2.0] * 10)  # better than all
    again, _ = found.choose(found.create("me"))
    found.copy(again, ended[0])  # costs nothing, but was not pruned

    logs = [(tmp_path / f"run-{trial.number}" / "metrics.jsonl").read_text() for trial in ended]
    took = [10 * len(log.splitlines()) for log in logs]  # the step that it was told to end in, too
    whole = 6 * 100 + 200
    saved = Saved.of(found)
    assert any(samples < 100 for samples in took)
    assert (saved.trials, saved.samples, saved.whole_samples) == (7, sum(took) + 100, whole)
    assert saved.pruning == pytest.approx((600 - sum(took)) / whole)
    assert saved.early_stopping == pytest.approx(100 / whole)
    assert str(saved) == (
        f"pruning saved {saved.pruning:.0%} of the samples of 7 trials, early stopping {saved.early_stopping:.0%}"
    )
    assert str(replace(saved, pruning=0.0)).startswith("early stopping saved")
    assert str(replace(saved, pruning=0.0, early_stopping=0.0)).startswith("pruning saved 0%")
    write_results(found, None, "the command", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["saved"] == asdict(saved)
    assert results["trials"]["ended early"] == sum(samples < 100 for samples in took)
    assert results["best"]["command"] == "the command"
    write_table(found, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open() as file:
        assert [row["samples"] for row in csv.DictReader(file)] == [*map(str, took), "100", ""]
    shown = {line.split()[-1] for line in table(found).splitlines()[1:]}
    assert shown == {"50%", "-", *(f"{samples}%" for samples in took)}


def test_what_a_killed_run_took_is_in_its_log(tmp_path: Path) -> None:
    assert samples_of(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps({"status": "running", "total_steps": 8}))
    assert samples_of(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "samples": 64}) + "\n")
    assert samples_of(tmp_path) == (64, 256)


def test_the_command_of_the_best_says_where_its_trial_was() -> None:
    best = Path("my runs/search/experiment/search_best.yaml")
    default = {"runs": "runs", "datasets": "data"}
    assert command(Path("runs/search/experiment/x.yaml"), default, default, []) == (
        "uv run train.py --config-dir=runs/search experiment=x"
    )
    paths = {"runs": "my runs", "datasets": "/data,2/null"}
    words = shlex.split(command(best, paths, default, ["--config-dir=/conf,2"]))
    assert words[:4] == ["uv", "run", "train.py", "--config-dir=my runs/search"]
    found = {key: value for key, _, value in map(parsed, words[4:])}
    assert found == {
        "experiment": "search_best",
        "paths.runs": "my runs",
        "paths.datasets": "/data,2/null",
        "hydra.searchpath": ["file:///conf,2"],
    }
    assert "paths.runs=/a/b-c" in command(best, {**default, "runs": "/a/b-c"}, default, [])
    assert parsed(typed("paths.runs", "null"))[2] == "null"


# --- what is shown --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A place for a bar."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_with_the_time_left_and_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    found, terminal = study(search(trials=4)), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(found.search, found.trials) as progress:
        go_on(found, 2)
        found.create("me")
        progress.look(found.trials)
        shown = terminal.getvalue().split("\r")[-1]
    assert "2/4" in shown
    assert "running=1" in shown
    assert f"best={found.best.values[0]:.4g}" in shown
    assert re.search(r"<\d\d:\d\d", shown), shown


def test_a_log_has_few_lines_on_how_far_a_search_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = study(search(trials=80))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level("INFO", "multimodal.search.progress")
    with Progress(found.search, found.trials) as progress:
        for _ in range(80):
            go_on(found, 1)
            progress.look(found.trials)
            progress.look(found.trials)
    told = [record.getMessage() for record in caplog.records if record.name == "multimodal.search.progress"]
    assert len(told) == 19
    assert re.fullmatch(r"4 of 80 trials have ended, 0 running, time left \d\d:\d\d", told[0]), told[0]


def test_where_no_trial_ended_there_is_no_best() -> None:
    with pytest.raises(RunError, match="no trial of search"):
        _ = study(search()).best

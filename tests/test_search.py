"""The laws of a search: what is proposed, what is refused before the start, and what is made of a run's log."""

import copy
import csv
import io
import itertools
import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from multimodal import run_lock
from multimodal.cli import CONF, compose, register_plugins
from multimodal.config import ConfigError, RunError, TrainConfig, check
from multimodal.search import process, storage
from multimodal.search.checks import checked
from multimodal.search.config import Objective, SweepConfig
from multimodal.search.driver import Driver
from multimodal.search.locks import Locks
from multimodal.search.metrics import logged, samples_of, values_of
from multimodal.search.overrides import override, parsed, typed
from multimodal.search.plots import write_plots
from multimodal.search.process import LeftOver, Local
from multimodal.search.progress import Progress
from multimodal.search.pruners import Hyperband, Median, NoPruner, Pruner
from multimodal.search.results import Saved, command, spread, table, write_experiment, write_results, write_table
from multimodal.search.samplers import TPE, GaussianProcess, Grid, Random, Sampler
from multimodal.search.space import Parameter, Space, assignments, num_assignments
from multimodal.search.storage import open_storage
from multimodal.search.study import DRIVER, FAILURES, SAME_AS, Search, Study
from multimodal.search.trial import Followed

LR = Parameter(low=1e-4, high=1e-2, log=True)
SPACE: Space = {
    "optimizer.betas": Parameter(values=([0.9, 0.98], [0.9, 0.999]), when={"optimizer": "adamw"}),
    "optimizer": Parameter(values=("adamw", "lion")),
    "optimizer.lr": LR,
    "towers.text.layers": Parameter(low=1, high=3),
}
RANDOM, NO_PRUNER = Random(), NoPruner()
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


@pytest.fixture(scope="session")
def _raw() -> dict[str, Any]:
    return compose("sweep", ["sweep=shapes_tiny", "name=search"])[0]


@pytest.fixture
def raw(_raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The configuration of a search, to be damaged at will."""
    return {**copy.deepcopy(_raw), "paths": {**_raw["paths"], "runs": str(tmp_path)}}


def search(space: Space = SPACE, sampler: Sampler = RANDOM, pruner: Pruner = NO_PRUNER, trials: int = 8) -> Search:
    return Search(
        name="search",
        overrides=("experiment=shapes_tiny", "tracker=none"),
        space=space,
        objectives={"eval/shapes/top1": Objective(mode="max")},
        directions=["maximize"],
        sampler=sampler,
        pruner=pruner,
        seed=3,
        trials=trials,
    )


def study(what: Search, storage: InMemoryStorage | None = None) -> Study:
    return Study(storage or InMemoryStorage(), what)


def stored(raw: dict[str, Any], folder: Path, what: Search) -> Study:
    """The same on a disk."""
    return Study(open_storage(check({**raw, "paths": {**raw["paths"], "runs": str(folder)}}, SweepConfig)), what)


def problems(raw: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        checked(raw)
    return dict(caught.value.problems)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_search_that_is_shipped_is_one(sweep: str) -> None:
    config = checked(compose("sweep", [f"sweep={sweep}", "name=search"])[0])
    assert config.trials > 10


@pytest.mark.parametrize("group", ["sampler", "pruner"])
def test_samplers_and_pruners_say_every_knob_of_their_class(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        composed = compose("sweep", ["sweep=shapes_tiny", f"{group}={path.stem}", "name=search"])[0]
        part = getattr(check({**composed, "space": {"seed": {"values": [1, 2]}}, "replicates": 0}, SweepConfig), group)
        assert set(composed[group]) == {"_target_", *type(part).model_fields}


def test_every_mistake_is_told_at_once_with_its_path(raw: dict[str, Any]) -> None:
    raw |= {"trails": 3, "trials": "many"}
    raw["overrides"] += ["run.name=mine", "~loss"]
    raw["space"] |= {
        "optimizer.lr": {"low": 1e-2, "high": 1e-3},
        "optimizer.lrr": {"low": 0.1, "high": 0.2},
        "optimizer": {"values": ["adamw", "loin"]},
        "warmup": {"values": ["5%", "200%"]},
        "max_broken": {"low": 0.5, "high": 2.0},
        "max_grad_norm": {"low": "a", "high": 2.0, "hi": 2},
        "seed": {"values": [1, 2], "when": {"optimiser": "adamw"}},
    }
    raw["objectives"] = {"eval/shape/top1": "max", "train/loss": "less"}
    found = problems(raw)
    for path, told in {
        "trails": "Did you mean 'trials'?",
        "trials": "valid integer",
        "overrides.5": "'run.name=mine'",
        "overrides.6": "cannot take away",
        "space.optimizer.lr.high": "the range is empty",
        "space.optimizer.lrr": "Did you mean 'optimizer.lr'?",
        "space.optimizer.values": "'loin' is refused",
        "space.warmup.values": "'200%' is refused: warmup",
        "space.max_broken.high": "2.0 is refused: max_broken",
        "space.max_grad_norm.low": "should be a number",
        "space.max_grad_norm.hi": "Did you mean 'high'?",
        "space.seed.when.optimiser": "Did you mean 'optimizer'?",
        "objectives.eval/shape/top1": "Did you mean 'eval/shapes/top1'?",
        "objectives.train/loss.mode": "'max' or 'min'",
    }.items():
        assert told in found.pop(path), path
    assert not found


@pytest.mark.parametrize(
    ("change", "path", "told"),
    [
        ({"overrides": ["experimnt=x"]}, "overrides", "Did you mean 'experiment'?"),
        ({"overrides": ["seed=x"]}, "overrides", "seed: input should be a valid integer"),
        ({"replicates": 2, "space": {"seed": {"values": [1, 2]}}}, "replicates", "seed is swept"),
        ({"sampler": {"_target_": Grid.target()}, "replicates": 0}, "sampler", "optimizer.lr: give it a step"),
        ({"objectives": {"train/loss": "min", "train/lr": "max"}}, "pruner", "pruner=none"),
        ({"space": {}}, "space", "at least 1"),
        ({"space": [{"seed": 1}]}, "space", "dictionary"),
        ({"overrides": "seed=1"}, "overrides", "tuple"),
        ({"storage": "postgres//nowhere"}, None, "cannot be opened"),
    ],
)
def test_what_does_not_go_together_is_told(raw: dict[str, Any], change: dict[str, Any], path: str, told: str) -> None:
    if path is None:
        with pytest.raises(ConfigError, match=f"storage: .*{told}"):
            open_storage(checked({**raw, **change}))
    else:
        assert told in problems({**raw, **change})[path]


def refused(raw: dict[str, Any], storage: str) -> str:
    with pytest.raises(ConfigError) as caught:
        open_storage(checked({**raw, "storage": storage}))
    ((path, told),) = caught.value.problems
    assert path == "storage"
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("sqlite:////proc/nowhere/study.db", "unable to open"),
        ("sqlite:///:memory:", "in memory only"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/study", "Connection refused"),
        ("postgresql+psycopg://me:secret@nowhere.invalid/study", "nowhere.invalid"),
        ("postgresql+nothing://me:secret@nowhere.invalid/study", "nothing"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    raw: dict[str, Any], place: str, told: str
) -> None:
    found = refused(raw, place)
    assert place.replace("secret", "***") in found
    assert told in found.replace(place.replace("secret", "***"), "")


def test_a_driver_that_is_lacking_is_told_with_what_installs_it(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    found = refused(raw, "postgresql+psycopg://me@127.0.0.1/study")
    assert "psycopg" in found.partition("driver is not installed")[2]
    assert "uv sync --extra postgres" in found


@pytest.mark.timeout(20)
def test_a_server_that_never_answers_is_not_waited_for_without_end(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CONNECTING", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "timeout" in refused(raw, f"postgresql+psycopg://me@{address}/study")


@pytest.mark.parametrize(
    ("revision", "told"),
    [("v1.3.0.a", "optuna storage upgrade --storage sqlite:///"), ("v99.0.0.a", "a newer Optuna")],
)
def test_a_database_of_another_optuna_is_told_with_what_to_do(
    raw: dict[str, Any], tmp_path: Path, revision: str, told: str
) -> None:
    place = tmp_path / "study.db"
    open_storage(check({**raw, "storage": f"sqlite:///{place}"}, SweepConfig))
    with closing(sqlite3.connect(place)) as file, file:
        file.execute("UPDATE alembic_version SET version_num = ?", [revision])
    found = refused(raw, f"sqlite:///{place}")
    assert told in found
    assert str(place) in found


def test_a_metric_that_only_some_trials_log_is_told_with_the_value(raw: dict[str, Any]) -> None:
    raw["overrides"] = ["experiment=shapes_tiny", "checkpoint.best=null"]
    raw["space"] = {"evals": {"values": [["shapes"], ["shapes_retrieval"]]}}
    assert "where evals is ['shapes_retrieval']" in problems(raw)["objectives.eval/shapes/top1"]


@pytest.mark.parametrize(
    ("knobs", "path"),
    [
        ({"values": []}, "values"),
        ({"values": [1, 1]}, "values"),
        ({"values": [1], "low": 2}, "low"),
        ({"low": 2}, "high"),
        ({"low": 2, "high": 2}, "high"),
        ({"low": 0, "high": 2, "log": True}, "low"),
        ({"low": 1, "high": 2, "step": 3}, "step"),
        ({"low": 1, "high": 2, "step": 1, "log": True}, "step"),
        ({"low": 1, "high": 2, "step": True}, "step"),
    ],
)
def test_a_parameter_that_is_none_is_told_by_its_field(knobs: dict[str, Any], path: str) -> None:
    with pytest.raises(ValueError, match=path):
        Parameter.model_validate(knobs)


def test_conditions_in_a_circle_are_told(raw: dict[str, Any]) -> None:
    raw["space"] = {
        "seed": {"values": [1, 2], "when": {"workers": 1}},
        "workers": {"values": [1, 2], "when": {"seed": 2}},
    }
    assert any("depends on itself" in text for text in problems(raw).values())


# --- what is proposed -----------------------------------------------------------------------------------------------


def quality(params: dict[str, Any]) -> float:
    return -abs(params["optimizer.lr"] - 1e-3) + params["towers.text.layers"]


def go_on(study: Study, trials: int) -> None:
    """Propose and end so many more."""
    for _ in range(trials):
        trial, _ = study.choose(study.create("me"))
        study.optuna.tell(trial, quality(trial.params))


@pytest.mark.parametrize("sampler", [TPE(startup=2), GaussianProcess(startup=2), Random()])
@pytest.mark.parametrize("keys", range(5))
def test_a_search_that_was_interrupted_proposes_what_it_would_have(
    monkeypatch: pytest.MonkeyPatch, sampler: Sampler, keys: int
) -> None:
    whole, trials, storage = study(search(sampler=sampler)), 6, InMemoryStorage()
    go_on(whole, trials)
    for _ in range(trials):
        parted = study(search(sampler=sampler), storage)
        left = parted.create("gone")  # whose process was killed when it had chosen so many keys
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Parameter, "suggest", _killed_after(keys))
            parted.choose(left)
        again = study(search(sampler=sampler), storage)
        trial, _ = again.choose(again.trials[-1])
        again.optuna.tell(trial, quality(trial.params))
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]
    assert len({json.dumps(trial.params) for trial in whole.trials}) == trials


def _killed_after(keys: int) -> Callable[..., Any]:
    suggest, done = Parameter.suggest, itertools.count()

    def suggest_or_die(self: Parameter, trial: Any, key: str) -> Any:
        if next(done) == keys:
            raise KeyboardInterrupt
        return suggest(self, trial, key)

    return suggest_or_die


def test_a_grid_is_every_combination_once_and_none_that_conditions_exclude() -> None:
    space = {**SPACE, "optimizer.lr": Parameter(low=0.1, high=0.3, step=0.1)}
    sampler = Grid()
    assert sampler.size(space) == (2 + 1) * 3 * 3
    found = study(search(space, sampler))
    combinations = [found.choose(found.create("me"))[1] for _ in range(27)]
    assert len({json.dumps(one, sort_keys=True) for one in combinations}) == 27
    assert all(("optimizer.betas" in one) == (one["optimizer"] == "adamw") for one in combinations)
    assert sorted(map(str, combinations)) == sorted(map(str, assignments(space)))
    assert found.choose(found.create("another machine"))[1] in combinations  # which has made one too many


def test_a_grid_is_counted_without_making_its_combinations() -> None:
    steps = Parameter(low=0, high=10**12 - 1)
    whole = Parameter(low=0.0, high=1.0, step=0.1)
    choice = Parameter(values=("a", "b", "c"))
    second = Parameter(values=(1, 2), when={"choice": ["a", "b"]})
    third = Parameter(low=1, high=7, when={"second": 2, "choice": "b"})
    space = {"third": third, "second": second, "choice": choice, "whole": whole}
    assert Grid().size(space) == len(list(assignments(space))) == (2 + 8 + 1) * 11
    assert num_assignments({**space, "steps": steps}, 10**30) == 121 * 10**12


@pytest.mark.parametrize(
    "space",
    [
        {f"k{at}": Parameter(values=tuple(range(10))) for at in range(30)},
        {"k": Parameter(low=0, high=10**12)},
        {"k": Parameter(low=0.0, high=1.0, step=5e-324)},
        {f"k{at}": Parameter(values=tuple(range(10)), when={f"k{at - 1}": 1} if at % 2 else {}) for at in range(30)},
    ],
    ids=["many", "long", "fine", "conditional"],
)
def test_a_grid_that_is_too_large_is_refused_at_once(raw: dict[str, Any], space: Space) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than 1,000,000 combinations"):
        Grid().size(space)
    assert time.monotonic() - start < 1


def test_a_range_of_whole_numbers_gives_whole_numbers_and_values_come_as_they_are() -> None:
    found = study(search())
    for _ in range(5):
        frozen = found.create("me")
        _, chosen = found.choose(frozen)
        assert chosen["towers.text.layers"] in (1, 2, 3)
        assert chosen.get("optimizer.betas", [0.9, 0.98]) in ([0.9, 0.98], [0.9, 0.999])
        assert 1e-4 <= chosen["optimizer.lr"] <= 1e-2
        assert found.chosen(found.trials[-1]) == chosen


def test_a_study_that_searched_otherwise_is_not_continued(raw: dict[str, Any], tmp_path: Path) -> None:
    config = check(raw, SweepConfig)
    found = stored(raw, tmp_path, search())
    found.require_same(config)
    found = stored(raw, tmp_path, search())
    found.require_same(config.model_copy(update={"trials": 99, "workers": 7}))
    with pytest.raises(ConfigError, match="seed: 1 -> 5"):
        found.require_same(config.model_copy(update={"seed": 5}))


# --- what is made of a run ------------------------------------------------------------------------------------------


class Written:
    """A run that has ended, with a log that is given to it bit by bit."""

    end = "finished"
    more = 0  # steps that it would have gone on for

    def __init__(self, folder: Path, values: Sequence[float | None], each: int) -> None:
        self.folder, self.values, self.each, self.shown, self.stopped = folder, values, each, 0, False

    def poll(self) -> int | None:
        self.shown = min(self.shown + self.each, len(self.values))
        rows = [
            {"step": at, "samples": 10 * at, "eval/shapes/top1": value}
            for at, value in enumerate(self.values[: self.shown], start=1)
        ]
        self.folder.mkdir(exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        over = self.stopped or self.shown == len(self.values)
        facts = {"total_steps": len(self.values) + self.more, "status": self.end if over else "running"}
        (self.folder / "summary.json").write_text(json.dumps(facts))
        return 0 if over else None

    def stop(self) -> None:
        self.stopped = True


def follow(found: Study, folder: Path, values: Sequence[float | None], each: int = 1, retries: int = 0) -> FrozenTrial:
    locks = Locks(folder)
    trial, _ = found.choose(found.create(locks.driver))
    followed = Followed(found, trial, [], folder / f"run-{trial.number}", locks, 0, retries)
    try:
        for _ in range(100):
            ended = followed.tick(lambda *_: Written(followed.folder, values, each))
            if ended is not None:
                return ended
        raise AssertionError
    finally:
        locks.close(done=True)


CURVES = [[0.1 + 0.01 * at + 0.3 * number for at in range(10)] for number in (2, 1, 3, 0, 1, 2)]


@pytest.mark.parametrize("pruner", [Median(startup=1, warmup=20), Hyperband(shortest=10, reduction_factor=2)])
def test_who_ends_early_does_not_depend_on_when_a_run_is_looked_at(tmp_path: Path, pruner: Pruner) -> None:
    outcomes = []
    for each in (1, 3, 10):
        folder = tmp_path / str(each)
        found = study(search(pruner=pruner))
        ended = [follow(found, folder, curve, each) for curve in CURVES]
        outcomes.append([(trial.state, trial.values, trial.intermediate_values) for trial in ended])
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert {state for state, _, _ in outcomes[0]} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_trial_that_stopped_early_has_come_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Written, "end", "stopped early")
    ended = follow(study(search()), tmp_path, [0.5, 0.25])
    assert (ended.state, ended.values) == (TrialState.COMPLETE, [0.25])


def test_a_trial_whose_objective_is_no_number_is_tried_again_then_fails(tmp_path: Path) -> None:
    ended = follow(study(search()), tmp_path, [0.5, None], retries=2)
    assert ended.state == TrialState.FAIL
    assert ended.user_attrs[FAILURES] == ["eval/shapes/top1 is no number"] * 3


def test_what_a_run_logs_is_known_from_its_configuration(tiny_run: Path) -> None:
    config = check(yaml.safe_load((tiny_run / "config.yaml").read_text()), TrainConfig)
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((tiny_run / "summary.json").read_text())
    found = {key for row in rows for key in row if "/" in key} | {key for key in facts if "/" in key}
    assert found == set(logged(config))


@pytest.mark.parametrize(("value", "expected"), [("last", 3.0), ("best", 1.0), ("median", 2.5)])
def test_of_the_values_of_a_run_one_counts(tmp_path: Path, value: Any, expected: float) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"x": x}) + "\n" for x in (2.0, 1.0, 4.0, 3.0)))
    assert values_of(tmp_path, {"x": Objective(mode="min", value=value)}) == {"x": expected}


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
    assert re.fullmatch(r"4 of 80 trials have ended, 0 run, time left \d\d:\d\d", told[0]), told[0]


def test_where_no_trial_ended_there_is_no_best() -> None:
    with pytest.raises(RunError, match="no trial of search"):
        _ = study(search()).best


# --- who works ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from multimodal.search.locks import Locks
locks = Locks(Path(sys.argv[1]))
print(locks.driver, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_is_alive_until_it_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    driver = holder.stdout.readline().strip()
    locks = Locks(tmp_path)
    try:
        assert locks.is_alive(driver)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert not locks.is_alive(driver)
    assert locks.is_here(driver)
    assert not locks.is_here("elsewhere-1-aa")
    locks.close(done=True)


TRAINING = """
import fcntl, json, os, signal, socket, sys, time
told = lambda *_: print("told", flush=True)
signal.signal(signal.SIGTERM, told)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
print("trains", flush=True)
while True:
    time.sleep(0.01)
"""
"""Holds the lock of a run, and does not end when it is asked to."""


def test_a_left_over_run_is_asked_to_end_and_has_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path / run_lock.NAME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "trains\n"
            left = LeftOver(lambda: run.poll() is not None, tmp_path)
            left.stop()
            assert run.stdout.readline() == "told\n"
            left.stop()
            time.sleep(0.1)
            assert left.poll() is None
            monkeypatch.setattr(process, "GRACE", 0.0)
            left.stop()
            assert run.wait(10) == -signal.SIGKILL
        finally:
            run.kill()


def test_a_process_that_only_has_the_number_of_a_killed_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.0)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        try:
            (tmp_path / run_lock.NAME).write_text(json.dumps({"pid": other.pid, "host": socket.gethostname()}))
            left = LeftOver(lambda: False, tmp_path)
            for _ in range(3):
                left.stop()
                time.sleep(0.05)
            assert other.poll() is None
        finally:
            other.kill()


def test_replicates_have_locks_and_outputs_of_their_own(tmp_path: Path) -> None:
    locks = Locks(tmp_path)
    found, seeds = study(search()), study(replace(search(), name="search-0000-seeds"))
    held = [locks.trial(one.search.run_name(0)) for one in (found, seeds)]
    assert None not in held
    assert locks.trial("search-0000") is None
    outputs = {
        Followed(one, one.choose(one.create("me"))[0], [], tmp_path / one.search.run_name(0), locks, 0, 0).log
        for one in (found, seeds)
    }
    assert len(outputs) == 2
    for lock in held:
        os.close(lock or 0)
    locks.close(done=True)


def test_cores_and_gpus_are_dealt_out_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    start = Local(workers=2, threads=None)
    assert [start.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "5", "3"]
    assert int(start.environment(0)["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert Local(workers=2, threads=7).environment(0)["OMP_NUM_THREADS"] == "7"


def test_a_trial_that_repeats_another_is_not_run_again(tmp_path: Path) -> None:
    found = study(search({"optimizer": Parameter(values=("adamw",))}, trials=3))
    locks = Locks(tmp_path)
    started: list[str] = []

    def start(words: Sequence[str], log: Path, lock: int, slot: int) -> Written:
        started.append(words[-1])
        return Written(tmp_path / "search-0000", [0.5], 1)

    class Never:
        came = None

    assert Driver(found, locks, start, [], tmp_path, 1, 0).run(Never())  # type: ignore[arg-type]
    assert started == ["run.name='search-0000'"]
    assert [trial.user_attrs.get(SAME_AS) for trial in found.trials] == [None, 0, 0]
    assert [trial.values for trial in found.trials] == [[0.5]] * 3
    assert {trial.user_attrs[DRIVER] for trial in found.trials} == {locks.driver}
    locks.close(done=True)

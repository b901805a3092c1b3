"""The laws of a search: what is proposed, what is refused before the start, and what is made of a run's log."""

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from searches import CURVES, SPACE, Written, follow, go_on, quality, raw_search, search, stored, study

from multimodal.cli import CONF, compose
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.search.checks import checked
from multimodal.search.config import Objective, SweepConfig
from multimodal.search.metrics import logged, values_of
from multimodal.search.pruners import Hyperband, Median, Pruner
from multimodal.search.samplers import TPE, GaussianProcess, Grid, Random, Sampler
from multimodal.search.space import Parameter, Space, assignments, num_assignments
from multimodal.search.storage import open_storage
from multimodal.search.study import FAILURES

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return raw_search(tmp_path)


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
        ({"storage": "postgres//nowhere"}, None, "is no address of a database"),
    ],
)
def test_what_does_not_go_together_is_told(raw: dict[str, Any], change: dict[str, Any], path: str, told: str) -> None:
    if path is None:
        with pytest.raises(ConfigError, match=f"storage: .*{told}"):
            open_storage(checked({**raw, **change}))
    else:
        assert told in problems({**raw, **change})[path]


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
    with pytest.raises(ValueError, match="more than 1,000,000 combinations"):
        Grid().size(space)


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

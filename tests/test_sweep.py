"""The laws of a search of real processes, whatever is killed, and on one database or another."""

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState
from postgres import POSTGRES, database
from sweeps import LONGEST, OVERRIDES, Searching, outcome

from multimodal.cli import CONF
from multimodal.search.study import DRIVER, FAILURES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST)]

LR = {"low": 1e-4, "high": 1e-1, "log": True}
LOSS = {"train/loss": "min"}
SEEDED = {
    "space": {"optimizer.lr": LR, "warmup": {"values": ["0%", "50%"]}},
    "objectives": LOSS,
    "defaults": [{"override /pruner": "median"}],
    "sampler": {"startup": 1},
    "pruner": {"startup": 1, "warmup": 30},
    "trials": 3,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Searching:
    """A search that is left alone."""
    search = Searching(tmp_path_factory.mktemp("whole"), **SEEDED, replicates=1)
    search.begin()
    return search


def test_a_search_whose_driver_was_killed_twice_ends_as_one_that_was_left_alone(
    tmp_path: Path, whole: Searching
) -> None:
    search = Searching(tmp_path, **SEEDED)
    for number in (0, 1):  # while a trial's process trains, which goes on alone
        driver = search.begin()
        search.wait(driver, lambda number=number: search.rows(number))
        driver.kill()
        driver.wait()
    search.begin()
    search.finish()
    whole.finish()
    assert outcome(search.trials) == outcome(whole.trials)
    assert {trial.state for trial in whole.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert not any(FAILURES in trial.user_attrs for trial in search.trials)
    assert "another process trains" not in "".join(
        path.read_text() for path in search.study_folder.glob("trials/*.log")
    )


def test_the_best_is_an_experiment_that_launches_as_it_is_and_all_is_written_down(whole: Searching) -> None:
    whole.finish()
    folder = whole.study_folder
    with (folder / "trials.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert {path.stem for path in (folder / "plots").iterdir()} >= {"history", "parallel", "slices"}
    assert "with other seeds (1): train/loss" in whole.log.read_text()
    best = min((t for t in whole.trials if t.state == TrialState.COMPLETE), key=lambda trial: trial.values[0])
    results = json.loads((folder / "results.json").read_text())
    assert results["best"]["trial"] == best.number
    assert results["best"]["command"] in whole.log.read_text()
    assert f"pruning saved {results['saved']['pruning']:.0%} of the samples of 3 trials" in whole.log.read_text()
    assert 0 < results["saved"]["pruning"] < 1
    command = [sys.executable, *shlex.split(results["best"]["command"])[2:]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as its trial had
    done = subprocess.run(command, cwd=CONF.parent, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _last_loss(whole.runs / "search_best") == best.values[0]


def _last_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["train/loss"])


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    space = {"optimizer.lr": LR}
    search = Searching(tmp_path, space=space, objectives=LOSS, defaults=[{"override /sampler": "random"}], trials=4)
    search.begin()
    search.begin()
    search.finish()
    _assert_shared(search, workers=2)


def _assert_shared(search: Searching, workers: int) -> None:
    trials = search.trials
    assert [(trial.number, trial.state) for trial in trials] == [(at, TrialState.COMPLETE) for at in range(4)]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 4
    assert len({trial.user_attrs[DRIVER] for trial in trials}) == workers
    for trial in trials:
        assert [row["train/loss"] for row in search.rows(trial.number) if "train/loss" in row][-1] == trial.values[0]
        assert (search.study_folder / "trials" / f"search-{trial.number:04d}.log").read_text().count("$ ") == 1


def test_trials_that_are_not_finite_fail_or_are_killed_are_recorded_as_such(tmp_path: Path) -> None:
    space = {
        "init.weights": {"values": [None, "nowhere"]},
        "optimizer.lr": {"values": [1e-3, 1e38], "when": {"init.weights": None}},
    }
    overrides = [*OVERRIDES, "duration=200steps", "evals.shapes.every=50steps"]
    settings = {"defaults": [{"override /sampler": "grid"}], "trials": 9, "workers": 3, "overrides": overrides}
    search = Searching(tmp_path, space=space, objectives=LOSS, **settings)
    driver = search.begin()
    search.wait(driver, lambda: len(list(search.study_folder.glob("trials/*.log"))) == 3)
    killed = next(trial.number for trial in search.trials if trial.params.get("optimizer.lr") == 1e-3)
    search.kill_trial(driver, killed)
    search.finish()
    trials = {trial.params.get("optimizer.lr", "nowhere"): trial for trial in search.trials}
    assert trials[1e-3].state == TrialState.COMPLETE  # it was continued
    assert trials[1e-3].user_attrs[FAILURES] == ["killed by SIGKILL"]
    assert trials[1e38].state == trials["nowhere"].state == TrialState.FAIL
    not_finite, raised = (trials[key].user_attrs[FAILURES] for key in (1e38, "nowhere"))
    assert len(not_finite) == len(raised) == 2
    assert all(text.startswith("not finite: the loss or a gradient was not finite") for text in not_finite)
    assert all(text.startswith("exit status 1: ") and "nowhere" in text for text in raised)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a database of PostgreSQL."""
    with database() as url:
        yield url


@pytest.mark.skipif(not (os.environ.get("MULTIMODAL_POSTGRES") or POSTGRES), reason="needs Debian's package postgresql")
def test_a_database_of_postgresql_serves_three_processes(tmp_path: Path, server: str) -> None:
    space = {"optimizer.lr": LR}
    settings = {"defaults": [{"override /sampler": "random"}], "storage": server}
    search = Searching(tmp_path, space=space, objectives=LOSS, trials=4, **settings)
    for _ in range(3):
        search.begin()
    search.finish()
    _assert_shared(search, workers=3)

"""The laws of grids: checked before a run starts, one failure ends no other run, what is done is passed over."""

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, TinyConfig, composed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn

from multimodal.cli import CONF, literal, register_plugins
from multimodal.config import ConfigError, RunError, TrainConfig, check
from multimodal.grids import cluster
from multimodal.grids.cluster import Task
from multimodal.grids.grid import launch_grid
from multimodal.grids.here import Here
from multimodal.grids.jobs import INTERRUPTED, NOT_STARTED, OPEN, Job, Outcome, outcome, reason
from multimodal.run_folder import is_finished
from multimodal.run_names import MAX_NAME, run_name
from multimodal.trainer import Trainer
from multimodal.units import Duration

# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "overrides", "name"),
    [
        (["seed=1,2"], ["seed=1"], "x-seed=1"),
        (["seed=1,2", "tracker=none", "workers=0"], ["seed=1", "tracker=none", "workers=0"], "x-seed=1"),
        (["seed=1,2", "dry_run=true"], ["seed=1", "dry_run=True"], "x-seed=1"),  # as Hydra tells it
        (["loss=sigmoid", "seed=1,2"], ["loss=sigmoid", "seed=1"], "x-seed=1-loss=sigmoid"),
        (["duration=5steps,9steps"], ["duration=5steps"], "x-duration=5steps"),
        (["tower@towers.image=vit_tiny"], ["tower@towers.image=vit_tiny"], "x-tower_towers.image=vit_tiny"),
        (["dataset@evals.a.dataset=shapes"], ["dataset@evals.a.dataset=shapes"], "x"),
        (["run.name=x", "seed=1,2"], ["run.name=x", "seed=2"], "x-seed=2"),
        (["run.name=x,y"], ["run.name=x"], "x"),
        (["run.name=x_${seed}", "seed=1,2"], ["run.name=x_${seed}", "seed=2"], "x"),
        (["experiment=x,y"], ["experiment=x"], "x"),
        ([], ["optimizer.lr=0.0123"], "x-optimizer.lr=0.0123"),
    ],
)
def test_a_run_is_named_after_what_makes_it_another_run(typed: list[str], overrides: list[str], name: str) -> None:
    assert run_name("x", overrides, typed) == name


def test_long_names_are_cut_and_stay_distinct() -> None:
    static = [f"towers.image.{'a' * 40}{n}=1" for n in range(4)]
    names = {run_name("x", [*static, f"seed={seed}"], static) for seed in range(3)}
    assert len(names) == 3
    assert all(name.startswith("x-seed=") and len(name) < MAX_NAME + 10 for name in names)


# --- composing ------------------------------------------------------------------------------------------------------


def grid(runs: Path, static: Sequence[str], swept: Sequence[Sequence[str]], run: object) -> list[JobReturn]:
    """As a launcher does, from Hydra's configuration of the whole grid."""
    words = [f"paths.runs={runs}", *static]
    register_plugins()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ours = [f"hydra.sweep.dir={runs}/.multirun", "hydra.mode=MULTIRUN"]
        master = compose("train", [*words, *ours], return_hydra_config=True)
        try:
            loader = GlobalHydra.instance().config_loader()
            return launch_grid(loader, master, [[*words, *own] for own in swept], 0, 1, run)  # type: ignore[arg-type]
        finally:
            HydraConfig.instance().cfg = None


def never(jobs: Sequence[Job], logs: Path) -> list[Outcome]:
    raise AssertionError("a run was started")


STATIC = [word for word in TINY if not word.startswith("run.name=")]


def test_mistakes_in_any_run_are_told_before_one_starts_all_at_once(tmp_path: Path) -> None:
    swept = [["seed=1", "global_batch_size=many"], ["seed=-1", "global_batch_size=many"], ["seed=2"]]
    with pytest.raises(ConfigError) as caught:
        grid(tmp_path, STATIC, swept, never)
    told = dict(caught.value.problems)
    assert set(told) == {"global_batch_size", "seed"}
    assert "(in " in told["seed"]
    assert told["global_batch_size"].count("shapes_tiny-") == 2


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 runs of the grid would be"):
        grid(tmp_path, [*STATIC, "run.name=same"], [["run.name=same"], ["run.name=same"]], never)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_what_is_finished_is_passed_over_and_its_value_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def train(jobs: Sequence[Job], logs: Path) -> list[Outcome]:
        given.append([job.name for job in jobs])
        return [Outcome(job, "finished") for job in jobs]

    metric = ["evals=[shapes]", "evals.shapes.dataset.size=80", "checkpoint.best=eval/shapes/top1", "duration=1steps"]
    static = [*STATIC, *metric, f"paths.runs={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *static])
    grid(tmp_path, static, [["seed=1"], ["seed=2"]], train)
    first, second = given.pop()
    assert first.startswith("shapes_tiny-seed=1-")
    config = check(composed(*static, "seed=1", f"run.name={literal(first)}"), TrainConfig)
    summary = Trainer(config).run()
    returned = grid(tmp_path, static, [["seed=1"], ["seed=2"]], train)
    assert given == [[second]]
    assert [one.return_value for one in returned] == [summary["best/eval/shapes/top1"], None]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_finished_only_if_a_start_would_find_nothing_to_do(tiny_config: TinyConfig) -> None:
    config = tiny_config("duration=1steps")
    assert not is_finished(config)
    Trainer(config).run()
    assert is_finished(config)
    assert is_finished(config.model_copy(update={"workers": 1}))
    assert not is_finished(config.model_copy(update={"duration": Duration.parse("2steps")}))
    assert not is_finished(config.model_copy(update={"seed": 2}))
    assert not is_finished(config.model_copy(update={"run": config.run.model_copy(update={"fresh": True})}))
    summary = config.folder / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "status": "running"}))
    assert not is_finished(config)


def test_a_dry_run_judges_the_configuration_only_and_not_what_an_older_start_has_left(tmp_path: Path) -> None:
    for name in ("stopped", "done"):
        (tmp_path / name).mkdir()
        told = {"status": "stopped" if name == "stopped" else "finished", "best/eval/shapes/top1": 0.5}
        (tmp_path / name / "summary.json").write_text(json.dumps(told))

    def looked(jobs: Sequence[Job], logs: Path) -> list[Outcome]:
        return [outcome(one, int(one.name == "wrong"), "ValueError: it is") for one in jobs]

    words = [word for word in STATIC if not word.startswith(("evals=", "checkpoint.best"))]
    static = [*words, "dry_run=true", "evals=[shapes]", "checkpoint.best=eval/shapes/top1"]
    returned = grid(tmp_path, static, [[f"run.name={name}"] for name in ("stopped", "done", "new")], looked)
    assert [one.return_value for one in returned] == [None, None, None]
    with pytest.raises(RunError, match="1 of 2 runs are not finished:\n  wrong: ValueError: it is"):
        grid(tmp_path, static, [["run.name=stopped"], ["run.name=wrong"]], looked)[1].return_value  # noqa: B018


# --- running --------------------------------------------------------------------------------------------------------


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, folder / name, ("-c", code), None, False)


def test_one_failure_ends_no_other_run_and_all_failures_are_told(tmp_path: Path) -> None:
    codes = {
        "refused": "import sys; sys.exit('2 problems in the configuration:\\n  a: wrong\\n  b: wrong')",
        "raises": "raise ZeroDivisionError('by nothing')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "good": "print('fine')",
    }

    def run(jobs: Sequence[Job], logs: Path) -> list[Outcome]:
        started = [job(tmp_path, name, code) for name, code in codes.items()]
        ended = {one.job.name: one for one in Here(n_jobs=2, processes=1)(started, logs)}
        return [Outcome(mine, ended[name].status, ended[name].reason) for mine, name in zip(jobs, codes, strict=True)]

    returned = grid(tmp_path, STATIC, [["run.name=" + name] for name in codes], run)
    assert returned[3].return_value is None
    with pytest.raises(RunError) as caught:
        _ = returned[0].return_value
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 4 runs are not finished:"
    assert lines[1] == "  refused: 2 problems in the configuration: a: wrong b: wrong"
    assert lines[2] == "  raises: ZeroDivisionError: by nothing"
    assert lines[3].startswith("  killed: killed by SIGKILL")
    assert (tmp_path / ".multirun" / "good.log").read_text() == "fine\n"


def test_a_run_that_is_put_back_in_the_queue_deletes_nothing_of_its_own(tmp_path: Path) -> None:
    fresh = Job("a", tmp_path / "a", ("train.py", "run.fresh=true", "run.name=a"), None, False)
    assert fresh.continued().command()[1:] == ["train.py", "run.fresh=true", "run.name=a", "run.fresh=false"]
    raw = composed(*fresh.continued().words[1:])
    assert raw["run"]["fresh"] is False


def test_runs_at_once_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    Here(n_jobs=2, processes=1)([job(tmp_path, name, code) for name in "ab"], tmp_path)
    assert {(tmp_path / f"{name}.log").read_text() for name in "ab"} == {"3 4\n", "3 5\n"}


def test_a_stop_signal_is_passed_on_and_no_other_run_starts(tmp_path: Path) -> None:
    heeds = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); print('up', flush=True)"
    first = job(tmp_path, "first", f"{heeds}; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    second = job(tmp_path, "second", "print('started')")
    ended = Here(n_jobs=1, processes=1)([first, second], tmp_path)
    assert [one.status for one in ended] == [INTERRUPTED, NOT_STARTED]
    assert (tmp_path / "first.log").read_text() == "up\n"
    assert not (tmp_path / "second.log").exists()


def test_a_run_of_several_processes_that_was_stopped_is_no_failure_whatever_its_launcher_ends_with(
    tmp_path: Path,
) -> None:
    summary = tmp_path / "first" / "summary.json"
    summary.parent.mkdir()
    ends = f"pathlib.Path({str(summary)!r}).write_text(json.dumps(dict(status='stopped'))), os._exit(1)"
    heeds = f"import json, os, pathlib, signal, time; signal.signal(signal.SIGTERM, lambda *_: ({ends}))"
    first = job(tmp_path, "first", f"{heeds}; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    failing = job(tmp_path, "failing", "import sys; sys.exit(1)")
    assert [one.status for one in Here(n_jobs=1, processes=1)([first], tmp_path)] == [INTERRUPTED]
    assert [one.status for one in Here(n_jobs=1, processes=1)([failing], tmp_path)] == ["failed"]


@pytest.mark.parametrize(("restarts", "fresh"), [(None, True), ("0", True), ("1", False)])
def test_a_job_that_slurm_has_put_back_in_the_queue_does_not_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str | None, fresh: bool
) -> None:
    import submitit

    told = tmp_path / "told"
    code = f"import sys; open({str(told)!r}, 'w').write(' '.join(sys.argv[1:]))"
    one = Job("a", tmp_path / "a", ("-c", code, "run.fresh=true"), None, False)
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: SimpleNamespace(num_tasks=1))
    monkeypatch.setattr(cluster, "PATIENCE", 0.01)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    task = Task(one, 1)
    assert task() == 0
    assert told.read_text() == ("run.fresh=true" if fresh else "run.fresh=true run.fresh=false")
    assert task.checkpoint().function.job.words[-1] == "run.fresh=false"


class Terminal(io.StringIO):
    """What is written to it is kept."""

    def isatty(self) -> bool:
        return True


def test_a_bar_in_a_terminal_says_what_is_done_what_has_failed_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, name, code) for name, code in {"a": "print('up')", "b": "1 / 0", "c": "0"}.items()]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    Here(n_jobs=1, processes=1)(jobs, tmp_path)
    states = terminal.getvalue().split("\r")
    assert any(re.search(r"grid: +67%.* 2/3 \[\d+:\d+<\d+:\d+, .*failed=1\]", state) for state in states), states
    assert any(re.search(r"3/3 .*failed=1", state) for state in states)
    assert "up\n" in capsys.readouterr().out


def test_without_a_terminal_there_is_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with caplog.at_level("INFO"):
        Here(n_jobs=1, processes=1)([job(tmp_path, "a", "0")], tmp_path)
    assert written.getvalue() == ""
    assert "1 of 1: a finished" in caplog.messages


@pytest.mark.parametrize("status", OPEN)
def test_a_grid_that_was_stopped_and_in_which_nothing_failed_ends_well(status: str, tmp_path: Path) -> None:
    def stopped(jobs: Sequence[Job], logs: Path) -> list[Outcome]:
        return [Outcome(one, status) for one in jobs]

    with pytest.raises(SystemExit) as caught:
        grid(tmp_path, STATIC, [["seed=1"]], stopped)
    assert caught.value.code == 0


def test_a_reason_is_one_line() -> None:
    assert reason(1, "a\n\nTraceback:\n  x\nValueError: y\n") == "ValueError: y"
    assert reason(1, "") == ""
    assert len(reason(1, "a" * 1000)) < 400

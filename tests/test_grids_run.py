"""Grids in real processes: one machine, and submitit without a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import REPOSITORY, VIT, computed, environment, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORDS = [
    *VIT,
    "towers.text.width=32",
    "towers.text.layers=1",
    "towers.text.heads=2",
    "model.embed_dim=16",
    "dataset.image_size=32",
    "dataset.size=64",
    "global_batch_size=16",
    "evals=[]",
    "checkpoint.best=null",
    "checkpoint.every=never",
    "log.every=1steps",
    "tracker=none",
    "workers=0",
    "precision=fp32",
]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.jobs_at_once=2"],
}


def start(runs: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", "-m", f"paths.runs={runs}", *WORDS, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    free = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=free, **pipes)  # type: ignore[call-overload, no-any-return]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failure_ends_no_other_run_and_the_same_command_finishes_what_is_missing(
    tmp_path: Path, launcher: str
) -> None:
    words = [*LAUNCHERS[launcher], "run.name=a,b,c", "duration=2steps"]
    (tmp_path / "b").write_text("in the way")
    code, output = finish(start(tmp_path, *words))
    assert code == 1, output
    assert "1 of 3 runs are not finished:" in output
    assert "  b: 1 problem in the configuration: paths.runs:" in output
    assert [json.loads((tmp_path / name / "summary.json").read_text())["status"] for name in "ac"] == ["finished"] * 2
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [json.loads((tmp_path / name / "environment.json").read_text())[0]["threads"] for name in "ac"] == [
        cores
    ] * 2

    (tmp_path / "b").unlink()
    code, output = finish(start(tmp_path, *words))
    assert code == 0, output
    assert "3 runs, 2 of them finished already: a, c" in output
    assert len(json.loads((tmp_path / "a" / "environment.json").read_text())) == 1
    assert len(rows_of(tmp_path, "b")) == 2


def rows_of(runs: Path, name: str) -> list[dict[str, float]]:
    return computed(rows(runs, name))


def wait_for_row(runs: Path, name: str, process: subprocess.Popen[str]) -> None:
    for _ in range(4000):
        if (log := runs / name / "metrics.jsonl").exists() and log.read_text().count("\n") >= 2:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("it did not begin")


def test_a_job_that_is_preempted_saves_comes_back_and_computes_what_it_would_have(tmp_path: Path) -> None:
    ranks = ["hydra/launcher=submitit_local", "hydra.launcher.processes_per_node=2", "duration=40steps"]
    code, output = finish(start(tmp_path, *ranks, "run.name=whole,other"))
    assert code == 0, output
    process = start(tmp_path, *ranks, "hydra.launcher.jobs_at_once=1", "run.name=preempted,next")
    wait_for_row(tmp_path, "preempted", process)
    for task in tasks_of(tmp_path):  # as Slurm does, to all of a job's processes
        os.kill(task, signal.SIGUSR2)
    code, output = finish(process)
    assert code == 0, output
    assert len(json.loads((tmp_path / "preempted" / "environment.json").read_text())) == 2
    assert rows_of(tmp_path, "preempted") == rows_of(tmp_path, "whole")


def tasks_of(folder: Path) -> list[int]:
    """Processes of jobs whose files are below this folder: what submitit started, and the runs below it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        is_task = b"submitit.core._submit" in command or b"train.py" in command
        if is_task and b"SUBMITIT_LOCAL_LOCALID" in inside and str(folder).encode() in inside + command:
            found.append(int(process.name))
    assert len(found) == 4
    return found


def test_a_stop_signal_to_a_grid_stops_its_runs_at_a_checkpoint(tmp_path: Path) -> None:
    words = [*LAUNCHERS["joblib"], "run.name=a,b", "duration=400steps"]
    process = start(tmp_path, *words)
    wait_for_row(tmp_path, "a", process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    assert "stopped by a signal; the same command goes on" in output
    stopped = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert stopped["status"] == "stopped"


def test_a_stop_signal_reaches_all_processes_of_a_run_and_none_is_a_failure(tmp_path: Path) -> None:
    process = start(tmp_path, "hydra.launcher.processes=2", "run.name=a,b", "duration=4000steps")
    wait_for_row(tmp_path, "a", process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    assert output.count("stopped by a signal; the same command goes on") == 1
    assert output.count("stopped by a signal after step") == 1
    assert "are not finished" not in output
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "b").exists()
    steps = [row["step"] for row in rows_of(tmp_path, "a")]
    assert len(list((tmp_path / "a" / "checkpoints").glob(f"step-{steps[-1]:08d}"))) == 1


def test_a_dry_run_of_a_grid_looks_at_configurations_and_not_at_runs_that_were_stopped(tmp_path: Path) -> None:
    words = ["run.name=a,b", "duration=2steps", "dry_run=true"]
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text('{"status": "stopped"}')
    code, output = finish(start(tmp_path, *words))
    assert code == 0, output
    assert "not finished" not in output

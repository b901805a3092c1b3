"""What clusters do to a run: each fault ends it in words, with the right status, and nothing saved is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_processes import STEPS, command, computed, kill, rows, run, start, wait_for_step, weights

from multimodal import checkpoint
from multimodal.data.workers import STOP_SIGNALS

pytestmark = pytest.mark.slow

NO_EVALUATION = "evals.shapes.every=1000000steps"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Whether a process runs, or is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def rank_of(pid: int) -> int:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(word for word in words if word.startswith(b"RANK=")).removeprefix(b"RANK="))


def wait_for_checkpoint(runs: Path, name: str, process: subprocess.Popen[str]) -> int:
    """The newest step that is on the disk, once there is one."""
    for _ in range(2000):
        if saved := checkpoint.steps(runs / name):
            return saved[-1]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("nothing was saved")


def end(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """What a program says that ends by itself, with a status that is not zero."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode != 0, output
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0], output
    return output


def assert_sound(runs: Path, name: str, since: int) -> None:
    """All checkpoints are whole, and those that were there are."""
    saved = checkpoint.steps(runs / name)
    for step in saved:
        checkpoint.verify(checkpoint.step_folder(runs / name, step))
    assert saved[-1] >= since


def wait_for_more(runs: Path, name: str, step: int, process: subprocess.Popen[str], since: float) -> None:
    """Until a run that was started again, at a time, has logged more than `step`."""
    log = runs / name / "metrics.jsonl"
    for _ in range(2000):
        if log.stat().st_mtime > since and (logged := rows(runs, name)) and logged[-1]["step"] > step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"nothing was logged after step {step}")


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "victim", "timeout"),
    [(signal.SIGKILL, 0, "10minutes"), (signal.SIGKILL, 1, "10minutes"), (signal.SIGSTOP, 1, "30seconds")],
)
def test_a_rank_that_is_killed_or_hangs_ends_all_and_is_named(
    tmp_path: Path, number: int, victim: int, timeout: str
) -> None:
    words = ["workers=1", f"timeout={timeout}", "checkpoint.every=2steps", "duration=30000steps", NO_EVALUATION]
    process = start(command(tmp_path, "two", *words, ranks=2))
    wait_for_step(tmp_path, "two", 3, process)
    ranks = {rank_of(pid): pid for pid in children(process.pid)}
    family = descendants(process.pid)
    assert len(family) == 8  # of each rank: itself, the server that starts its data worker, this, and Python's tracker
    saved = wait_for_checkpoint(tmp_path, "two", process)
    os.kill(ranks[victim], number)
    output = end(process)
    assert f"rank {victim} was killed or hangs" in output
    assert f"rank {1 - victim} was killed" not in output
    for _ in range(100):
        if not any(map(is_alive, family)):
            break
        time.sleep(0.1)  # a worker looks every few seconds whether its rank is there
    assert [pid for pid in family if is_alive(pid)] == []
    assert_sound(tmp_path, "two", saved)


def test_a_data_worker_of_a_rank_that_is_killed_ends_all_in_words_and_a_stop_signal_to_its_servers_does_not(
    tmp_path: Path,
) -> None:
    words = ["workers=2", "duration=30000steps", NO_EVALUATION]
    process = start(command(tmp_path, "two", *words, ranks=2))
    wait_for_step(tmp_path, "two", 3, process)
    ranks = {rank_of(pid): pid for pid in children(process.pid)}
    servers = children(ranks[1])
    (server,) = [pid for pid in servers if children(pid)]
    assert len(servers) == 2
    for number in STOP_SIGNALS:  # as Slurm sends them, to all processes
        for pid in servers:
            os.kill(pid, number)
    workers = children(server)
    assert len(workers) == 2
    wait_for_step(tmp_path, "two", len(rows(tmp_path, "two")) + 30, process)
    assert children(ranks[1]) == servers
    assert children(server) == workers
    os.kill(workers[0], signal.SIGKILL)
    output = end(process, 60)
    assert f"rank 1: a process that reads data (pid {workers[0]}) exited" in output
    assert_sound(tmp_path, "two", 8)


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str, *options: str) -> Iterator[None]:
    """A file system of its own in a folder."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_same_run(runs: Path, one: str, other: str) -> None:
    """Weights, optimizer and log are equal, but for what the clock says."""
    for file in ("model", "optimizer"):
        ours, others = weights(runs, one, file), weights(runs, other, file)
        assert ours.keys() == others.keys()
        assert all(torch.equal(ours[name], others[name]) for name in ours)
    assert computed(rows(runs, one)) == computed(rows(runs, other))


def test_where_files_cannot_grow_a_run_ends_in_words_and_goes_on_where_they_can(tmp_path: Path) -> None:
    run(command(tmp_path, "whole", "workers=0"))
    process = start(command(tmp_path, "limited", "workers=0"))
    wait_for_checkpoint(tmp_path, "limited", process)
    kill(process)
    saved = checkpoint.steps(tmp_path / "limited")[-1]
    sizes = [
        (checkpoint.step_folder(tmp_path / "limited", saved) / f"{name}.safetensors").stat().st_size
        for name in ("model", "optimizer")
    ]
    limit = sum(sizes) // 2
    assert sizes[0] < limit < sizes[1]

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        process = start(command(tmp_path, "limited", "workers=0"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    output = end(process)
    assert process.returncode == 1
    assert f"the checkpoint of step {saved + 4} cannot be written to {tmp_path / 'limited'}" in output
    assert "File too large" in output
    assert_sound(tmp_path, "limited", saved)
    assert not list((tmp_path / "limited" / "checkpoints").glob(".*"))
    assert json.loads((tmp_path / "limited" / "summary.json").read_text())["status"] == "failed"

    assert f"continues after step {saved}" in run(command(tmp_path, "limited", "workers=0"))
    assert_same_run(tmp_path, "limited", "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_a_run_in_words_and_checkpoints_that_were_saved_stay(tmp_path: Path, ranks: int) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "4m"):
        words = ["workers=0", "checkpoint.every=1steps", "checkpoint.keep=99", "duration=1000steps"]
        process = start(command(disk, "full", *words, ranks=ranks))
        output = end(process)
        assert process.returncode == 1
        assert f"cannot be written to {disk / 'full'}" in output
        assert "No space left on device" in output
        assert_sound(disk, "full", len(checkpoint.steps(disk / "full")))
        assert len(checkpoint.steps(disk / "full")) > 1
        assert not list((disk / "full" / "checkpoints").glob(".*"))


def test_a_folder_that_is_only_to_be_read_is_told_before_anything_is_built(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "4m", "ro"):
        output = end(start(command(disk, "never", "dataset.size=1")))  # which would be told, were it opened
    assert f"paths.runs: {disk / 'never'} cannot be written: Read-only file system" in output


# --- other processes --------------------------------------------------------------------------------------------------


def test_a_second_process_on_the_same_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    words = ["workers=1", "duration=300000steps", "checkpoint.every=never"]  # not over before the others have started
    first = start(command(tmp_path, "one", *words))
    wait_for_step(tmp_path, "one", 2, first)
    output = end(start(command(tmp_path, "one", *words, ranks=2)))
    assert f"another process trains the run {tmp_path / 'one'}" in output
    assert f'"pid": {first.pid}' in output
    assert first.poll() is None
    kill(first)
    since, saved = time.time(), max(checkpoint.steps(tmp_path / "one"), default=0)
    second = start(command(tmp_path, "one", *words))  # at once, and what was killed has left no lock
    wait_for_more(tmp_path, "one", saved, second, since)
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
    assert not (tmp_path / "one" / ".lock").exists()


def test_a_data_worker_that_is_killed_ends_the_run_in_words_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = ["workers=2", "duration=3000steps"]
    process = start(command(tmp_path, "one", *words))
    wait_for_step(tmp_path, "one", 10, process)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    output = end(process, 60)
    assert process.returncode == 1
    assert f"a process that reads data (pid {workers[0]}) is killed by signal: Killed" in output
    assert not any(map(is_alive, workers))
    saved = checkpoint.steps(tmp_path / "one")[-1]
    assert_sound(tmp_path, "one", 8)
    since = time.time()
    process = start(command(tmp_path, "one", *words))
    wait_for_more(tmp_path, "one", saved, process, since)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert f"continues after step {saved}" in output
    assert process.returncode == 0, output


def test_where_wandb_dies_training_goes_on_and_the_log_is_complete(tmp_path: Path) -> None:
    arguments = [word for word in command(tmp_path, "one", "workers=0") if word != "tracker=none"]
    process = start([*arguments, "tracker=wandb", "tracker.mode=offline"])
    wait_for_step(tmp_path, "one", 2, process)
    services = [pid for pid in children(process.pid) if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [row["step"] for row in rows(tmp_path, "one") if "train/loss" in row] == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["status"] == "finished"


# --- any moment -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_killed_at_any_moment_also_inside_a_write_a_run_computes_what_it_would_have(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "kills.py"), "--kills", "8"]
    found = json.loads(run(program, seconds=850).splitlines()[-1])
    assert found["kills"] == 8
    assert found["inside a write"] > 0

"""One process trains a run, and a lock outlives nobody."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from multimodal.config import ConfigError, RunError
from multimodal.run_lock import NAME, RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from multimodal.run_lock import RunLock
RunLock(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that has locked `tmp_path`, when its data worker has been started too."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_is_refused_while_another_process_has_it_and_free_when_that_was_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(RunError, match=rf'another process trains the run {tmp_path} .*"pid": {holder.pid},'):
                RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(worker, 0)  # it is still there
        RunLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "name"
    lock = RunLock(folder)
    assert [path.name for path in folder.iterdir()] == [NAME]
    lock.release()
    assert not folder.exists()
    lock = RunLock(folder)
    (folder / "metrics.jsonl").touch()
    lock.release()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks, lockf = [], fcntl.lockf

    def lock_late(descriptor: int, how: int) -> None:
        if not locks:
            (tmp_path / NAME).unlink()
        locks.append(descriptor)
        lockf(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", lock_late)
    lock = RunLock(tmp_path)
    assert len(locks) == 2
    assert os.path.samestat(os.fstat(lock.descriptor), (tmp_path / NAME).stat())
    lock.release()


def test_where_nothing_can_be_locked_the_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    RunLock(tmp_path).release()
    assert "a second process would not be noticed" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"paths\.runs: .*file/run cannot be written: Not a directory"):
        RunLock(tmp_path / "file" / "run")


def test_a_full_disk_is_told_with_the_folder_and_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(ConfigError, match=rf"{tmp_path}/run cannot be written: No space left on device"):
            RunLock(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_while_a_write_is_under_way_a_lock_is_not_released(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.write = Future()
    lock.release()
    assert os.path.samestat(os.fstat(lock.descriptor), (tmp_path / NAME).stat())
    lock.write.set_result(None)
    lock.release()
    assert not tmp_path.exists()

"""The laws of the processes of a search: who has a trial, and who may end it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from searches import Written, search, study

from multimodal import run_lock
from multimodal.search import process
from multimodal.search.driver import Driver
from multimodal.search.locks import Locks
from multimodal.search.process import LeftOver, Local
from multimodal.search.space import Parameter
from multimodal.search.study import DRIVER, SAME_AS
from multimodal.search.trial import Followed

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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
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
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    start = Local(workers=2, threads=None)
    assert [start.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "5", "3"]
    assert int(start.environment(0)["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert Local(workers=2, threads=7).environment(0)["OMP_NUM_THREADS"] == "7"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Local(workers=1, threads=None).environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    assert Local(workers=1, threads=None).environment(0)["OMP_NUM_THREADS"] == "1"


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

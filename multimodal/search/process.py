"""A trial's process: started here, or left over from a driver that was killed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from multimodal import run_lock
from multimodal.cli import CONF

GRACE = 120.0
"""Seconds that a run has for its last checkpoint after it was told to stop."""


class Process(Protocol):
    """Something that trains a run, wherever it is."""

    def poll(self) -> int | None:
        """None while it runs, then its exit status, negative for a signal."""

    def stop(self) -> None:
        """Ask it to save and end; to be called again until it has."""


Start = Callable[[Sequence[str], Path, int, int], Process]
"""Starts `train.py`: with these overrides, output to this file, a lock to inherit, and the worker's place (0, 1, ...).

What a cluster needs is another of these.
"""


class Local:
    """Starts processes on this machine."""

    def __init__(
        self,
        workers: int,
        threads: int | None,  # of each process; if not given, cores by workers, and no more than OMP_NUM_THREADS
        options: Sequence[str] = (),  # of the command line, before overrides
    ) -> None:
        self.command = [sys.executable, str(CONF.parent / "train.py"), *options]
        cores = len(os.sched_getaffinity(0))
        told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # by level of nesting
        share = min(cores // workers, int(told) if told.isdecimal() else cores)
        self.threads = threads or max(1, share)
        self.devices = _devices()

    def __call__(self, overrides: Sequence[str], log: Path, lock: int, slot: int) -> Process:
        command = [*self.command, *overrides]
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            return Child(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.environment(slot),
                    pass_fds=[lock],
                    start_new_session=True,  # Ctrl-C is for the driver, which tells its trials
                )
            )

    def environment(self, slot: int) -> dict[str, str]:
        """Of the trial in a worker's place: threads, and one of the GPUs."""
        words = {"OMP_NUM_THREADS": str(self.threads)}
        if self.devices:
            words["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        return {**os.environ, **words}


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class Stoppable(ABC):
    """A process that is asked to save and end, and made to when it has had `GRACE`."""

    told: float | None = None
    """When it was asked."""

    def stop(self) -> None:
        if self.told is None:
            self.told = time.monotonic() if self.send(signal.SIGTERM) else None
        elif time.monotonic() - self.told > GRACE:
            self.send(signal.SIGKILL)

    @abstractmethod
    def send(self, number: signal.Signals) -> bool:
        """Whether it could be given the signal."""


class Child(Stoppable):
    """A process of this driver."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def send(self, number: signal.Signals) -> bool:
        if number == signal.SIGKILL:  # its data workers too
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return True


class LeftOver(Stoppable):
    """A process whose driver was killed: known by the lock that it holds, and by who holds that of its run.

    One that has let go of its run before it is asked to end is waited for.
    """

    pid: int | None = None
    """Of the one that was asked."""

    def __init__(self, is_over: Callable[[], bool], folder: Path) -> None:
        self.is_over, self.folder = is_over, folder

    def poll(self) -> int | None:
        return 0 if self.is_over() else None

    def send(self, number: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            if self.pid is not None:  # its group, with its data workers, is there as long as one of them holds the lock
                os.killpg(self.pid, number)
            elif (holder := run_lock.holder(self.folder)) is not None:
                os.kill(holder, number)
                self.pid = holder
        return self.pid is not None

"""Who works on a study: locks of the kernel on files in its folder, gone with the process that holds them.

Nothing here goes by the clock, so that a machine that sleeps, or a disk that is slow, is not taken for a dead one.
"""

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multimodal.config import ConfigError


def take(file: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock on a file, which children may inherit; None if another process has it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
    except OSError as error:
        raise ConfigError([("paths.runs", f"{file} cannot be locked: {error.strerror}")]) from None
    return descriptor


class Locks:
    """The locks of one process that works on a study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        """The name of this process in the study."""
        self.own = take(self._driver(self.driver))

    def _driver(self, name: str) -> Path:
        return self.folder / "drivers" / name

    def close(self, done: bool) -> None:
        """Leave the study to others; unless all is done the file stays, for trials of this process to be taken up."""
        assert self.own is not None
        if done:
            self._driver(self.driver).unlink(missing_ok=True)
        os.close(self.own)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this folder looks at the study or changes it meanwhile."""
        descriptor = take(self.folder / "study.lock", wait=True)
        assert descriptor is not None
        try:
            yield
        finally:
            os.close(descriptor)

    def is_here(self, driver: str) -> bool:
        """Whether a process worked in this folder, and not on another machine's."""
        return self._driver(driver).exists()

    def is_alive(self, driver: str) -> bool:
        """Whether a process that worked in this folder still does."""
        if driver == self.driver:
            return True
        descriptor = take(self._driver(driver))
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def output(self, run: str) -> Path:
        """The file for what a trial's process prints, by the name of its run."""
        return self.folder / "trials" / f"{run}.log"

    def trial(self, run: str) -> int | None:
        """The lock for a trial's process to inherit; None while one runs, though its driver may be gone."""
        return take(self.output(run).with_suffix(".lock"))

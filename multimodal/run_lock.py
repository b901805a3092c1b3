"""One process trains a run: a lock on its folder, which the kernel releases when the process ends, however it ends."""

import errno
import fcntl
import json
import logging
import os
import socket
import struct
import sys
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from multimodal.config import ConfigError, RunError

logger = logging.getLogger(__name__)

NAME = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
"""What file systems say that keep none, as Lustre may."""

FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi"
"""The system's struct flock: the kind of lock is its first short."""


def is_held(folder: Path) -> bool:
    """Whether another process trains the run; asked without taking the lock, so that nobody who starts is hindered.

    Not for the process that holds it itself, which would lose it when the file is closed here.
    Where the file system keeps no locks, a lock's file that is there counts as held.
    """
    if not os.access(folder / NAME, os.R_OK):
        return False
    try:
        return _asked(folder) is not None
    except FileNotFoundError:
        return False
    except OSError:
        return True


def holder(folder: Path) -> int | None:
    """The process of this machine that trains the run; None if there is none, or it cannot be told for sure.

    That a lock's file names a process is not enough: it stays when the process is killed, and numbers come again.
    """
    try:
        pid = _asked(folder)
        told = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return None
    return pid if told == {"pid": pid, "host": socket.gethostname()} else None


def _asked(folder: Path) -> int | None:
    """The process that holds the lock, by the kernel; None if nobody does."""
    descriptor = os.open(folder / NAME, os.O_RDONLY)
    kind, pid = FLOCK.index("h"), FLOCK.index("i")
    asked = struct.pack(FLOCK, *(fcntl.F_RDLCK if place == kind else 0 for place in range(len(FLOCK))))
    try:
        answer = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    finally:
        os.close(descriptor)
    return None if answer[kind] == fcntl.F_UNLCK else int(answer[pid])


class RunLock:
    """Held from when it is made until `release`.

    It is the process's own (`lockf`): workers that outlive a killed run for some seconds do not hold it, and it works
    between the machines of a network file system.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.write: Future[None] | None = None  # to the folder, that was begun last
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = self._open()
            try:
                self._sign()
            except OSError:
                self.release()
                raise
        except OSError as error:
            raise ConfigError([("paths.runs", f"{folder} cannot be written: {error.strerror}")]) from None

    def _sign(self) -> None:
        os.truncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def _open(self) -> int:
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place(descriptor):
                    return descriptor
            except (BlockingIOError, PermissionError):  # what a lock that is held raises depends on the system
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "which has just started"
                os.close(descriptor)
                raise RunError(
                    f"another process trains the run {self.file.parent} ({holder}): wait for it or stop it, or give "
                    "this run another run.name"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning("%s cannot be locked (%s): a second process would not be noticed", self.file, error)
                return descriptor
            os.close(descriptor)

    def _is_in_place(self, descriptor: int) -> bool:
        """Whether this is the file that others lock, and not one that its holder has removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have the run, unless a write is under way: then the kernel does, when the process has ended.

        A folder with nothing else in it goes too.
        """
        if self.write is not None and not self.write.done():
            return
        self.file.unlink(missing_ok=True)
        os.close(self.descriptor)
        with suppress(OSError):
            self.file.parent.rmdir()

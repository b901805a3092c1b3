"""Processes that read data: how they are started, how they end, and what is said of one that is lost."""

import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from functools import cached_property
from itertools import accumulate
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multimodal import distributed
from multimodal.resolve import allowed_packages

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""What ends a run after its step: from a user, a machine that goes down, or Slurm by way of submitit."""

POLL = 5.0
"""Seconds after which a batch that has not come is asked after: is the worker alive that should send it?"""

LIBRARIES = ("open_clip", "timm", "torchvision", "transformers")
"""Parts import them when they are made, or first used, and that takes seconds."""

ALIGNMENT = 64
"""Bytes that an array in shared memory begins at a multiple of."""

T = TypeVar("T")
Row = TypeVar("Row")


def read(
    dataset: Dataset[Row],
    workers: int,
    timeout: float = 0,  # seconds that a batch may take to come from the workers; 0 for any
    **options: Any,
) -> Generator[Any, None, None]:
    """What torch's DataLoader gives with these options, read by so many processes, or by this one.

    To be closed, so that they end.
    """
    context = _server() if workers and distributed.started() else None
    loader: DataLoader[Any] = DataLoader(
        dataset if context is None else _Sent(dataset),
        num_workers=workers,
        worker_init_fn=_be_quiet if context is None else _be_quiet_and_end_with_the_rank,
        multiprocessing_context=context,
        timeout=min(timeout, POLL) if workers else 0,
        generator=torch.Generator(),  # not the global one, whose state belongs to the step
        **options,
    )
    return _batches_of(loader, timeout)


def _be_quiet(_: int) -> None:
    """Leave stop signals to the main process, which still wants this worker's batches while it saves."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _batches_of(loader: DataLoader[T], timeout: float) -> Generator[T, None, None]:
    """What a loader gives; its workers have ended when this has, also by an exception or by `close`.

    They do not heed stop signals, so a process could not end before them. Torch ends them when the loader's iterator
    is deleted, and the frames that an exception's traceback holds would put that off. A worker that hangs is killed.
    """
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    try:
        yield from _patient(batches, timeout)
    except BaseException as error:
        for one in (error, error.__cause__):
            if loader.num_workers and one is not None:
                traceback.clear_frames(one.__traceback__)
        raise
    finally:
        del batches
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def _patient(batches: Iterator[T], timeout: float) -> Iterator[T]:
    """What comes, within so many seconds each; torch looks at the end of its own timeout whether a worker has died."""
    since = time.monotonic()
    while True:
        try:
            yield next(batches)
            since = time.monotonic()
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if time.monotonic() - since >= timeout:
                raise RuntimeError(f"DataLoader timed out after {timeout:g} seconds") from error


def lost_worker(error: Exception) -> str | None:
    """What an exception of torch's, raised anywhere, says of a process that reads data and was killed, or hangs."""
    if match := re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*?)[. ]*$", str(error)):
        return f"a process that reads data (pid {match[1]}) {match[2]}; perhaps there was too little memory for it"
    if match := re.match(r"DataLoader timed out after (.*) seconds", str(error)):
        return f"the processes that read data gave none for {match[1]} seconds"
    if "unable to allocate shared memory" in str(error):
        return "there is too little shared memory (/dev/shm) for what processes read"
    return None


# --- beside other ranks ---------------------------------------------------------------------------------------------


def _server() -> BaseContext:
    """What starts workers in the place of this process: one without a process group, and with what is slow to import.

    Threads of a process group enter the interpreter when a collective ends, and a child that CPython 3.11 forks in
    that moment waits without end. (Python 3.14 starts all processes like this.)
    """
    ours = tuple(f"{package}." for package in allowed_packages())
    names = [name for name in sys.modules if f"{name}.".startswith(ours) or name in LIBRARIES]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(names)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit it, and live on like workers
    try:
        resource_tracker.ensure_running()  # which lets some through again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _be_quiet_and_end_with_the_rank(number: int) -> None:
    """Torch ends a worker whose parent has gone; but a server without its rank stays as long as it has a worker."""

    def watch() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        rank.join()
        os._exit(1)

    _be_quiet(number)
    threading.Thread(target=watch, daemon=True).start()


class _Sent(Dataset[Row], Generic[Row]):
    """A data set whose arrays are sent to workers once for all of them, in memory that they share."""

    def __init__(self, dataset: Dataset[Row]) -> None:
        """TypeError if it cannot be sent."""
        buffers: list[pickle.PickleBuffer] = []
        try:
            self.pickled = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            told = f"beside other ranks what processes read is pickled for them, and it cannot be: {error}"
            raise TypeError(f"{told}; workers=0 needs no processes") from error
        arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        starts = [0, *accumulate(math.ceil(len(array) / ALIGNMENT) * ALIGNMENT for array in arrays)]
        self.places = [slice(start, start + len(array)) for start, array in zip(starts, arrays, strict=False)]
        self.shared: Tensor = torch.empty(starts[-1], dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        for place, array in zip(self.places, arrays, strict=True):
            self.shared.numpy()[place] = array
        self.dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "dataset"}

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Row:
        return self.dataset[index]

    @cached_property
    def dataset(self) -> Dataset[Row]:
        """Made in a worker when it first reads, so that the rank is told what goes wrong."""
        made: Dataset[Row] = pickle.loads(self.pickled, buffers=[self.shared.numpy()[place] for place in self.places])
        return made

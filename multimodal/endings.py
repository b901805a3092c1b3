"""What ends a run before its last step: a stop signal, a lost process, broken samples, wrong gradients."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor

from multimodal import distributed
from multimodal.config import RunError
from multimodal.data.workers import STOP_SIGNALS, lost_worker
from multimodal.units import Timeout

FIRST_BROKEN = 100
"""Before so many samples were seen, a share of broken ones says nothing."""
PATIENCE = 2.0
"""Seconds after a stop signal from which on a second one is obeyed at once."""


class StopSignal:
    """One of `STOP_SIGNALS`, which is noted; a second one is a KeyboardInterrupt."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.came: float | None = None  # when
        self.then = then

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Signals that come inside are noted."""

        def note(number: int, _: FrameType | None) -> None:
            now = time.monotonic()
            if self.came is not None and now - self.came > PATIENCE:
                raise KeyboardInterrupt
            self.came = self.came or now
            self.then()

        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def losses_are_explained(timeout: Timeout) -> Iterator[None]:
    """Turn what torch says of a lost rank or data worker into a RunError that names it, and tell other ranks."""
    try:
        yield
    except Exception as error:
        told = lost_worker(error)
        lost = distributed.lost_ranks(error if told is None else RunError(told))
        if lost is not None:
            told = f"{lost}; ranks wait for each other as long as timeout={timeout} says"
        if told is None:
            raise
        raise RunError(f"{told}. The same command continues from the last checkpoint") from error


def require_replayed(
    error: Tensor,  # [] the largest "replay_error" of a step so far
    tolerance: float,
) -> None:
    """RunError if a tower's second pass over a batch was not its first."""
    if error > tolerance:
        raise RunError(
            "micro_batch_size: a tower gave other features in the second pass over a batch than in the first, so "
            "its gradients would be wrong; the last checkpoint is from before. Random numbers of a tower should "
            "come from torch's generators; or micro_batch_size=null"
        )


def require_few_broken(
    broken: int,  # of the samples
    samples: int,  # seen so far, over all ranks
    max_broken: float,  # a share
) -> None:
    """RunError if more than that were broken."""
    seen = max(FIRST_BROKEN, samples)
    if broken > max_broken * seen:
        told = f"{broken} of {seen} samples were broken, more than max_broken={max_broken}"
        raise RunError(f"{told}; the log names each of them")

"""Where the wall time of training goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """The wall time of training since the last log entry, without evaluating and saving."""

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    """Seconds of it that were spent waiting for data."""
    steps: int = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count."""
        started = time.monotonic()
        yield
        self.started += time.monotonic() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside counts as waiting for data."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

"""How far a grid is: a line for each run that has ended, and in a terminal a bar with the time left."""

import logging
from types import TracebackType

from tqdm import tqdm

from multimodal.grids.jobs import OPEN, Outcome, is_well

logger = logging.getLogger(__name__)


class Tally:
    """Of the runs that a grid starts, those that have ended, in the order in which they did."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.failed = jobs, 0
        self.ended: list[Outcome] = []
        self.bar = tqdm(
            total=jobs, desc="grid", unit="run", mininterval=0, smoothing=0, disable=None
        )  # None: in a terminal only

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def add(self, one: Outcome) -> None:
        """A run has ended."""
        self.ended.append(one)
        self.failed += not is_well(one)
        self.bar.set_postfix(failed=self.failed, refresh=False)
        self.bar.update(one.status not in OPEN)
        told = f": {one.reason}" if one.reason else ""
        logger.info("%d of %d: %s %s%s", len(self.ended), self.jobs, one.job.name, one.status, told)

"""How far a search is: a bar in a terminal, lines elsewhere."""

import logging
import time
from collections.abc import Sequence
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from multimodal.progress import LINES
from multimodal.search.results import short
from multimodal.search.study import Search

logger = logging.getLogger(__name__)


class Progress:
    """Counts trials on their way to the last one."""

    def __init__(self, search: Search, trials: Sequence[FrozenTrial]) -> None:
        self.search, self.began = search, time.monotonic()
        self.before = self.told = self.ended = _ended(trials)
        # trials may be hours apart: time left goes by all of them
        self.bar = tqdm(
            total=search.trials, initial=self.ended, desc=search.name, unit="trial", smoothing=0, disable=None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def look(self, trials: Sequence[FrozenTrial]) -> None:
        """Show what there is now; to be called often, so that the clock of a bar goes on."""
        done = _ended(trials) - self.ended
        self.ended += done
        if self.bar.disable:
            self._tell(len(trials) - self.ended)
            return
        self.bar.set_postfix({"running": len(trials) - self.ended, **self._best(trials)}, refresh=False)
        self.bar.update(done)
        self.bar.refresh()

    def _tell(self, running: int) -> None:
        total = self.search.trials
        line = max(1, total // LINES)
        if self.ended // line > self.told // line and self.ended < total:
            left = (time.monotonic() - self.began) / (self.ended - self.before) * (total - self.ended)
            about = tqdm.format_interval(left)
            logger.info("%d of %d trials have ended, %d running, time left %s", self.ended, total, running, about)
            self.told = self.ended

    def _best(self, trials: Sequence[FrozenTrial]) -> dict[str, str]:
        values = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE and trial.values]
        if len(self.search.objectives) > 1 or not values:
            return {}
        return {"best": short((max if self.search.directions == ["maximize"] else min)(values))}


def _ended(trials: Sequence[FrozenTrial]) -> int:
    return sum(trial.state.is_finished() for trial in trials)

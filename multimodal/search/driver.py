"""The loop of a search: choose, start, watch and end trials, beside other processes that do the same."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from multimodal.endings import StopSignal
from multimodal.search.locks import Locks
from multimodal.search.overrides import override
from multimodal.search.process import Start
from multimodal.search.progress import Progress
from multimodal.search.results import short
from multimodal.search.study import DRIVER, ENDED, Study
from multimodal.search.trial import Followed

logger = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds between two looks at the trials."""


class Driver:
    """Works on a study until it has all its trials, or a stop signal came."""

    def __init__(
        self,
        study: Study,
        locks: Locks,
        start: Start,
        words: Sequence[str],  # what trials are told besides: where they are
        runs: Path,
        workers: int,
        retries: int,
    ) -> None:
        self.study, self.locks, self.start, self.words = study, locks, start, words
        self.runs, self.workers, self.retries = runs, workers, retries
        self.followed: dict[int, Followed] = {}  # by the worker's place

    def run(self, signal: StopSignal) -> bool:
        """Whether all trials of this folder have ended."""
        with self.locks.alone():
            trials = self.study.trials
        with Progress(self.study.search, trials) as progress:
            while signal.came is None:
                with self.locks.alone():
                    self._look()
                    self._fill()
                    trials = self.study.trials
                progress.look(trials)
                if not self.followed and not any(self._is_awaited(trial) for trial in trials):
                    return True
                time.sleep(PAUSE)
        if self.followed:
            logger.info("stopping: trials save where they are")
        while [followed for followed in self.followed.values() if not followed.stop()]:
            time.sleep(PAUSE)
        return False

    def _look(self) -> None:
        for slot, followed in list(self.followed.items()):
            ended = followed.tick(self.start)
            if ended is not None:
                del self.followed[slot]
                self._tell(ended)

    def _fill(self) -> None:
        """Give every free worker a trial: one that nobody works on any more, or a new one."""
        for slot in sorted(set(range(self.workers)) - set(self.followed)):
            while slot not in self.followed and (frozen := self._next()) is not None:
                self._begin(slot, frozen)

    def _next(self) -> FrozenTrial | None:
        trials = self.study.trials
        for trial in trials:
            if self._is_awaited(trial) and not self.locks.is_alive(trial.user_attrs.get(DRIVER, "unknown")):
                self.study.take(trial, self.locks.driver)
                return trial
        return self.study.create(self.locks.driver) if len(trials) < self.study.search.trials else None

    def _is_awaited(self, trial: FrozenTrial) -> bool:
        """Whether it is still to end, and not on another machine's folder."""
        return trial.state == TrialState.RUNNING and self.locks.is_here(trial.user_attrs.get(DRIVER, "unknown"))

    def _begin(self, slot: int, frozen: FrozenTrial) -> None:
        trial, chosen = self.study.choose(frozen)
        search = self.study.search
        folder = self.runs / search.run_name(trial.number)
        twin = None if folder.exists() else self.study.twin(trial)
        if twin is not None:
            self.study.copy(trial, twin)
            logger.info("trial %d is trial %d again", trial.number, twin.number)
            return
        words = [*search.words(chosen), *self.words, override("run.name", folder.name)]
        self.followed[slot] = Followed(self.study, trial, words, folder, self.locks, slot, self.retries)

    def _tell(self, trial: FrozenTrial) -> None:
        search = self.study.search
        values = dict(zip(search.objectives, trial.values or (), strict=False))
        told = ", ".join(f"{metric} {short(value)}" for metric, value in values.items())
        chosen = ", ".join(f"{key} {short(value)}" for key, value in trial.params.items())
        if trial.state == TrialState.PRUNED:
            told = f"ended early at {trial.last_step}%: {told}"
        elif trial.state not in ENDED:
            told = "failed"
        logger.info("%s, trial %d of %d: %s (%s)", search.name, trial.number, search.trials, told, chosen)

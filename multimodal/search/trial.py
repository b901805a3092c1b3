"""One trial, from its first process to what the study remembers of it."""

import logging
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from multimodal.not_finite import FILE as NOT_FINITE
from multimodal.run_folder import FINISHED
from multimodal.search.locks import Locks
from multimodal.search.metrics import rows_of, samples_of, summary_of, values_of
from multimodal.search.process import LeftOver, Process, Start
from multimodal.search.study import FAILURES, REFUSED, SAMPLES, Study, is_number
from multimodal.tracker import METRICS

logger = logging.getLogger(__name__)


class Followed:
    """A trial that this process works on: its run is started, watched, ended early or started again.

    The study is told values by the share of the run that they were found at, in the order of the run's log and one at a
    time, so that what is decided does not depend on when this looked.
    """

    def __init__(
        self,
        study: Study,
        trial: optuna.Trial,
        overrides: Sequence[str],
        folder: Path,  # of the run
        locks: Locks,
        slot: int,  # the worker's place
        retries: int,
    ) -> None:
        self.study, self.trial, self.overrides, self.folder = study, trial, overrides, folder
        self.locks, self.slot, self.retries = locks, slot, retries
        self.log = locks.output(folder.name)
        self.process: Process | None = None
        self.seen = -1  # bytes of the run's log when it was read
        self.pruned = REFUSED in trial.user_attrs or (bool(self._reported()) and self._is_refused())

    def tick(self, start: Start) -> FrozenTrial | None:
        """Look at the run once; the trial as it has ended, once it has."""
        if self.pruned and self.process is None:
            self.process = self._left_over()
            if self.process is None:
                return self._end(TrialState.PRUNED)
        if self.process is None:
            self.process = self._left_over() or self._start(start)
        status = self.process.poll()  # before the log is read: what is in it then is all there will be
        self._judge()
        if self.pruned and status is None:
            self.process.stop()
        if status is None:
            return None
        left_over, self.process = isinstance(self.process, LeftOver), None
        if self.pruned:
            return self._end(TrialState.PRUNED)
        return self._settle(status, left_over)

    def stop(self) -> bool:
        """Ask the run to save and end; whether it has."""
        if self.process is None or self.process.poll() is not None:
            return True
        self.process.stop()
        return False

    def _left_over(self) -> LeftOver | None:
        lock = self.locks.trial(self.folder.name)
        if lock is None:
            return LeftOver(self._is_free, self.folder)
        os.close(lock)
        return None

    def _is_free(self) -> bool:
        lock = self.locks.trial(self.folder.name)
        if lock is not None:
            os.close(lock)
        return lock is not None

    def _start(self, start: Start) -> Process:
        lock = self.locks.trial(self.folder.name)
        assert lock is not None
        (self.folder / NOT_FINITE).unlink(missing_ok=True)  # of an attempt before
        try:
            return start(self.overrides, self.log, lock, self.slot)
        finally:
            os.close(lock)  # it is the process's now

    # --- while it runs ----------------------------------------------------------------------------------------------

    def _reported(self) -> dict[int, float]:
        return self.study.storage.get_trial(self.trial._trial_id).intermediate_values

    def _judge(self) -> None:
        """Tell the study what the run has logged of its only objective since, up to where it is to end early."""
        if self.pruned or len(self.study.search.objectives) > 1:
            return
        metrics = self.folder / METRICS
        size = metrics.stat().st_size if metrics.exists() else -1
        total = summary_of(self.folder).get("total_steps")
        if size == self.seen or not total:
            return
        (metric,) = self.study.search.objectives
        last = max(self._reported(), default=-1)
        for row in rows_of(self.folder):
            share = 100 * row["step"] // total
            if metric in row and share > last:
                last = share
                self.trial.report(math.nan if row[metric] is None else row[metric], share)
                if self._is_refused():
                    self.trial.set_user_attr(REFUSED, share)  # before the run ends, which takes a while
                    self.pruned = True
                    return
        self.seen = size

    def _is_refused(self) -> bool:
        """Whether the trial is to end early, by what was reported last; at its end it is too late."""
        return self.study.can_prune and max(self._reported()) < 100 and self.trial.should_prune()

    # --- when it has ended ------------------------------------------------------------------------------------------

    def _settle(self, status: int, left_over: bool) -> FrozenTrial | None:
        """Of a process that has ended: tell the study, or let it be started again."""
        said = summary_of(self.folder).get("status")
        if said in FINISHED and status == 0:
            values = values_of(self.folder, self.study.search.objectives)
            wrong = [f"{metric} is no number" for metric, value in values.items() if not is_number(value)]
            if not wrong:
                return self._end(TrialState.COMPLETE, [value for value in values.values() if value is not None])
            return self._fail(", ".join(wrong))
        if left_over and said != "failed":
            return None  # nobody knows; it is started again
        return self._fail(self._reason(status))

    def _reason(self, status: int) -> str:
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        kind = "not finite" if (self.folder / NOT_FINITE).exists() else f"exit status {status}"
        return f"{kind}: {lines[-1][:500]}" if lines else kind

    def _fail(self, reason: str) -> FrozenTrial | None:
        failures = [*self.trial.user_attrs.get(FAILURES, []), reason]
        self.trial.set_user_attr(FAILURES, failures)
        again = len(failures) <= self.retries
        logger.warning("trial %d: %s%s", self.trial.number, reason, "; it is started again" if again else "")
        return None if again else self._end(TrialState.FAIL)

    def _end(self, state: TrialState, values: list[float] | None = None) -> FrozenTrial:
        if samples := samples_of(self.folder):
            self.trial.set_user_attr(SAMPLES, samples)
        return self.study.optuna.tell(self.trial, values, state=state)

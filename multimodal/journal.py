"""What a run tells of itself: rows, figures and a summary in its folder, lines in the terminal."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from multimodal import checkpoint, run_folder
from multimodal.checkpoint import TrainerState
from multimodal.config import TrainConfig
from multimodal.evals import figures
from multimodal.files import write_json
from multimodal.interop.weights import Report as Initialised
from multimodal.parts import Report, RunInfo
from multimodal.results import FIGURES, TRAINING_CURVES, estimates, folder_of, write_figures, write_numbers
from multimodal.tracker import METRICS, SUMMARY, RunLog

logger = logging.getLogger(__name__)


class Journal:
    """Written by the first rank; on others it is never opened, and what is told it goes nowhere."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.folder = config, config.folder
        self.log: RunLog | None = None
        self.num_parameters: Mapping[str, int] = {}

    def open(
        self,
        state: TrainerState,
        num_parameters: Mapping[str, int],
        where: str,  # it trains, for the terminal
        facts: Mapping[str, Any],  # of this start
        initialised: Initialised | None,  # what became of init.weights, in a new run
    ) -> None:
        """Make the folder ready, and continue its log where the checkpoint left it."""
        self.num_parameters = num_parameters
        environment = run_folder.prepare(self.config, state.step, facts)
        self._mark_best(state)
        self.log = RunLog(self.folder, state.log_bytes)
        self.log.summarise(self._facts(state, "running"), None, "max")
        stored = {**self.config.model_dump(mode="json"), "environment": environment}
        info = RunInfo(self.config.run.name, state.run_id, self.folder, stored, self.log.rows)
        self.log.start(self.config.tracker, info)
        parameters = ", ".join(f"{name} {count:,}" for name, count in num_parameters.items())
        logger.info("run %s on %s; parameters: %s", self.folder, where, parameters)
        if initialised is not None:
            write_json(self.folder / "init.json", initialised.as_dict())
            logger.info("%s", initialised)
        if state.step:
            logger.info("continues after step %d of %d", state.step, state.total_steps)

    @property
    def length(self) -> int:
        """Bytes of all rows so far."""
        return 0 if self.log is None else self.log.length

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A row of the log."""
        if self.log is not None:
            self.log.write(step, step * self.config.global_batch_size, values)

    def evaluated(self, step: int, reports: Mapping[str, Report]) -> dict[str, float]:
        """Write down what evaluations found; their numbers."""
        values = {key: found.value for key, found in estimates(reports).items()}
        self.write(step, values)
        logger.info("step %d: %s", step, ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        if self.log is not None:
            with _may_fail(f"intervals and settings of step {step}, whose values are in {METRICS},"):
                write_numbers(reports, folder_of(self.folder, step))
            with _may_fail(f"a figure of step {step}"):
                for name, path in write_figures(reports, self.folder / FIGURES):
                    self.log.figure(step, name, path)
        return values

    def summarise(self, state: TrainerState, status: str) -> dict[str, Any]:
        """The summary, and curves of all rows."""
        assert self.log is not None
        settings = self.config.checkpoint
        step = state.step  # the last row may be from before
        facts = {**self._facts(state, status), "step": step, "samples": step * self.config.global_batch_size}
        summary = self.log.summarise(facts, settings.best, settings.mode)
        if rows := self.log.rows:
            path = self.folder / FIGURES / f"{TRAINING_CURVES}.png"
            with _may_fail(f"a figure of step {step}"):
                path.parent.mkdir(exist_ok=True)
                figures.curves(rows).savefig(path, dpi=120)
                self.log.figure(step, TRAINING_CURVES, path)
        logger.info("%s at step %d: %s", status, step, self.folder / METRICS)
        return summary

    def already_over(self, state: TrainerState, num_parameters: Mapping[str, int]) -> dict[str, Any]:
        """The summary of a run that has nothing left to do."""
        self.num_parameters = num_parameters
        self._mark_best(state)
        early = ", stopped early" if state.stopped_early else ""
        logger.info("run %s is finished%s, at step %d; run.fresh=true starts it over", self.folder, early, state.step)
        stored = self.folder / SUMMARY
        summary: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
        if summary.get("status") != state.status:  # killed after its last checkpoint
            self.log = RunLog(self.folder, state.log_bytes)
            summary = self.summarise(state, state.status)
            self.close(exit_code=0)
        return summary

    def failed(self, state: TrainerState) -> None:
        """Say so in the summary, if that can be."""
        if self.log is not None:
            try:
                self.summarise(state, "failed")
            except Exception as error:  # a full disk, a library in the middle of its import: why it ended matters more
                logger.warning("%s cannot be written: %s", self.folder / SUMMARY, error)

    def close(self, exit_code: int) -> None:
        """Finish the log, and what mirrors it."""
        if self.log is not None:
            self.log.close(exit_code)

    def _mark_best(self, state: TrainerState) -> None:
        """Again: a kill, or a full disk, may have come before it."""
        if state.best_step is not None and state.best_step in checkpoint.steps(self.folder):
            checkpoint.mark_best(self.folder, state.best_step)

    def _facts(self, state: TrainerState, status: str) -> dict[str, Any]:
        counts = {f"num_parameters/{name}": count for name, count in self.num_parameters.items()}
        return {"id": state.run_id, "status": status, "total_steps": state.total_steps, **counts}


@contextmanager
def _may_fail(what: str) -> Iterator[None]:
    """A full disk costs it only."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written: %s", what, error)

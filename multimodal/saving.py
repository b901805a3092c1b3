"""Checkpoints are written while training goes on, by a thread of the first rank, one at a time."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from multimodal import checkpoint, distributed, run_folder
from multimodal.checkpoint import TrainerState
from multimodal.config import RunError, TrainConfig
from multimodal.data.loader import Reader
from multimodal.ema import Ema
from multimodal.run_lock import RunLock
from multimodal.tracker import RunLog

logger = logging.getLogger(__name__)

Files = Mapping[str, Mapping[str, Tensor]]


class Saver:
    """Writes what stood when it was asked to. To be closed before the run's folder is let go."""

    def __init__(
        self,
        config: TrainConfig,
        readers: Mapping[str, Reader],
        lock: RunLock | None,  # the first rank's, on the folder
    ) -> None:
        self.folder, self.settings = config.folder, config.checkpoint
        self.config_text, self.readers, self.lock = run_folder.config_text(config), readers, lock
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.last = time.monotonic()  # that one was begun
        self.pending: Future[None] | None = None  # that is under way, or ended and nobody has asked how

    def save(
        self,
        state: TrainerState,
        ema: Ema,
        optimizer: torch.optim.Optimizer,
        log: RunLog | None,  # the first rank's
        best: bool,  # of those so far
    ) -> None:
        """Begin to write a checkpoint; of all ranks, once the one before is written."""
        self.wait()
        files = checkpoint.whole_tensors(ema, optimizer, copy=self.settings.background)
        if log is not None:
            self._start(state, files, log, best)
        if not self.settings.background:
            self.wait()
        self.last = time.monotonic()

    def save_alone(self, state: TrainerState, ema: Ema, optimizer: torch.optim.Optimizer, log: RunLog) -> None:
        """The same where other ranks may not be there, as the run ends for another reason; nothing may be sharded."""
        self._settle()
        self._start(state, checkpoint.whole_tensors(ema, optimizer), log, best=False)

    @property
    def late(self) -> bool:
        """Whether as many minutes have passed since the last one as should be between two."""
        every = self.settings.every
        return every.unit == "minutes" and time.monotonic() - self.last >= 60 * every.value

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, which `wait` tells all ranks."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Until what was begun is on the disk; RunError on all ranks if it cannot be written."""
        distributed.on_first_rank(self._wait)

    def close(self) -> None:
        """Let the thread end; where a run ends for another reason, that a checkpoint failed goes to the log only."""
        self._settle()
        self.thread.shutdown()

    def _settle(self) -> None:
        try:
            self._wait()
        except Exception as error:
            logger.error("%s", error)

    def _wait(self) -> None:
        if self.pending is not None:
            wait([self.pending])
            ended, self.pending = self.pending, None
            ended.result()

    def _start(self, state: TrainerState, files: Files, log: RunLog, best: bool) -> None:
        assert self.pending is None
        self.pending = self.thread.submit(self._write, state, files, log, best)
        if self.lock is not None:
            self.lock.write = self.pending

    def _write(self, state: TrainerState, files: Files, log: RunLog, best: bool) -> None:
        try:
            log.flush()
            checkpoint.save(self.folder, state, files, self.readers, self.config_text)
        except Exception as error:  # preprocessors, which may be anybody's, raise anything
            checkpoint.discard(self.folder, state.step)
            reason = f"{type(error).__name__}: {error}"
            told = f"the checkpoint of step {state.step} cannot be written to {self.folder}: {reason}"
            raise RunError(f"{told}. Those from before stay as they are, and the same command continues") from error
        if best:
            self._mark_best(state.step)
        checkpoint.prune(self.folder, self.settings.keep)

    def _mark_best(self, step: int) -> None:
        try:
            checkpoint.mark_best(self.folder, step)
        except OSError as error:
            told = (
                f"the checkpoint of step {step} in {self.folder} is written, but cannot be marked as the best: {error}"
            )
            raise RunError(f"{told}. The same command marks it and continues") from error

"""A grid on this machine: some runs at a time, each in processes of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import joblib
import torch
from pydantic import Field
from tqdm import tqdm

from multimodal.config import Config
from multimodal.endings import StopSignal
from multimodal.grids.jobs import INTERRUPTED, NOT_STARTED, Job, Outcome, environment, outcome
from multimodal.grids.tally import Tally

logger = logging.getLogger(__name__)


class Here(Config):
    """How the runs of a grid share this machine."""

    n_jobs: int = Field(gt=0)
    """Runs at a time; each has its share of the cores, and the next GPUs."""
    processes: int = Field(gt=0)
    """Of each run, as torchrun starts them."""

    def __call__(self, jobs: Sequence[Job], logs: Path) -> list[Outcome]:
        """Run them; what they print goes to the `logs`. A stop signal is passed on, and no other run is started."""
        return _Machine(self, min(self.n_jobs, len(jobs)), logs).run(jobs)


class _Machine:
    """Runs jobs in places, of which each has a share of cores and GPUs."""

    def __init__(self, settings: Here, at_once: int, logs: Path) -> None:
        self.processes, self.at_once, self.logs = settings.processes, at_once, logs
        self.places: SimpleQueue[int] = SimpleQueue()
        for place in range(at_once):
            self.places.put(place)
        self.running: set[subprocess.Popen[str]] = set()
        self.stop_signal = StopSignal(then=self._pass_on)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        parallel = joblib.Parallel(self.at_once, backend="threading", return_as="generator_unordered")
        with self.stop_signal.heeded(), Tally(len(jobs)) as tally:
            for one in parallel(joblib.delayed(self._run)(job) for job in jobs):
                tally.add(one)
        return tally.ended

    def _run(self, job: Job) -> Outcome:
        if self.stop_signal.came is not None:
            return Outcome(job, NOT_STARTED)
        place = self.places.get()
        try:
            code, output = self._wait(job, self._environment(place))
        finally:
            self.places.put(place)
        stopped = code <= 0 or job.summary().get("status") == "stopped"  # below 0: it had not come to heed signals
        if self.stop_signal.came is not None and stopped:  # torchrun ends with 1, however its processes end
            return Outcome(job, INTERRUPTED)
        return outcome(job, code, output)

    def _wait(self, job: Job, environment: dict[str, str]) -> tuple[int, str]:
        """Exit status and output of a job; it is shown, if no other runs beside it."""
        log = self.logs / f"{job.name}.log"
        logger.info("run %s: output in %s", job.name, log)
        lines = []
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with (
            log.open("w", buffering=1) as file,
            subprocess.Popen(job.command(self.processes), env=environment, **pipes) as process,
        ):
            self.running.add(process)
            if self.stop_signal.came is not None:
                process.terminate()
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                file.write(line)
                if self.at_once == 1:
                    tqdm.write(line, sys.stdout, end="")  # above the bar
                    sys.stdout.flush()
        self.running.discard(process)
        return process.returncode, "".join(lines)

    def _pass_on(self) -> None:
        for process in list(self.running):
            process.terminate()

    def _environment(self, place: int) -> dict[str, str]:
        """One of the places' cores and GPUs."""
        own = environment(joblib.cpu_count() // (self.at_once * self.processes))
        if gpus := _gpus():
            numbers = (place * self.processes + rank for rank in range(self.processes))
            own["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(gpus[number % len(gpus)] for number in numbers))
        return own


def _gpus() -> list[str]:
    """Of this machine, by the names that CUDA_VISIBLE_DEVICES knows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]

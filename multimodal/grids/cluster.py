"""A grid on a cluster: each run is a job of Slurm's, by way of submitit."""

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import joblib
from pydantic import Field

from multimodal.config import Config, ConfigError
from multimodal.grids.jobs import Job, Outcome, environment, outcome
from multimodal.grids.tally import Tally

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds between looks at the jobs."""


class Cluster(Config):
    """What each run of a grid asks of a cluster; units and names are Slurm's."""

    cluster: Literal["slurm", "local"]
    """local runs the same processes on this machine, without Slurm."""
    jobs_at_once: int = Field(gt=0)
    nodes: int = Field(gt=0)
    gpus_per_node: int = Field(ge=0)
    processes_per_node: int = Field(gt=0)
    """Ranks of a run."""
    cpus_per_process: int | None = Field(gt=0)
    """null is this machine's share, for cluster=local."""
    mem_gb: float | None = Field(gt=0)
    timeout_min: int = Field(gt=0)
    signal_delay_s: int = Field(gt=0)
    """How long before the end of its time a job is told to save."""
    max_num_timeout: int = Field(ge=0)
    """How often a job whose time was over is put back in the queue; one that was preempted always is."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    setup: list[str]
    """Lines of shell before the run."""
    additional: dict[str, Any]
    """Other options of sbatch."""

    @property
    def processes(self) -> int:
        """Of each run."""
        return self.nodes * self.processes_per_node

    def __call__(self, jobs: Sequence[Job], logs: Path) -> list[Outcome]:
        """Submit them and wait; what they print is in the `logs`, by job id."""
        executor = self._executor(logs)
        waiting = [Task(job, self._cores()) for job in jobs]
        running: list[Submitted] = []
        if self.cluster == "slurm":  # one array, of which the queue runs so many at a time
            with executor.batch():
                running = [Submitted(executor.submit(task), task.job) for task in waiting]
            waiting = []
        with Tally(len(jobs)) as tally:
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs_at_once:
                        task = waiting.pop(0)
                        running.append(Submitted(executor.submit(task), task.job))
                    for one in [one for one in running if one.cluster_job.done()]:
                        running.remove(one)
                        tally.add(one.outcome())
                    time.sleep(PATIENCE)
            except KeyboardInterrupt:
                ids = ", ".join(one.cluster_job.job_id for one in running)
                logger.info("no longer waits for jobs %s, which go on", ids)
                raise
        return tally.ended

    def _cores(self) -> int:
        """Of each process."""
        return self.cpus_per_process or max(1, joblib.cpu_count() // (self.jobs_at_once * self.processes_per_node))

    def _executor(self, logs: Path) -> "submitit.AutoExecutor":
        try:
            import submitit
        except ImportError:
            raise ConfigError([("hydra/launcher", "needs submitit: uv sync --extra slurm")]) from None
        limits = {"slurm_max_num_timeout": self.max_num_timeout, "local_max_num_timeout": self.max_num_timeout}
        executor = submitit.AutoExecutor(logs / "submitit", cluster=self.cluster, **limits)
        wishes = {name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        executor.update_parameters(
            name="multimodal",
            timeout_min=self.timeout_min,
            mem_gb=self.mem_gb,
            nodes=self.nodes,
            tasks_per_node=self.processes_per_node,
            gpus_per_node=self.gpus_per_node or None,
            cpus_per_task=self.cpus_per_process,
            slurm_array_parallelism=self.jobs_at_once,
            slurm_signal_delay_s=self.signal_delay_s,
            slurm_srun_args=[f"--cpus-per-task={self._cores()}"],  # which srun does not take over from sbatch
            slurm_setup=self.setup or None,
            slurm_additional_parameters=self.additional or None,
            **{f"slurm_{name}": value for name, value in wishes.items()},
        )
        return executor


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has."""

    cluster_job: "submitit.Job[int]"
    job: Job

    def outcome(self) -> Outcome:
        """Once it is done: what its first rank says, and if that was killed, what the cluster says."""
        first = self.cluster_job.task(0)
        error = first.exception()
        if error is not None:
            return outcome(self.job, 1, str(error).partition("\n---")[0])
        return outcome(self.job, first.result(), first.stderr() or "")


class Task:
    """What runs on the cluster, in each process of a job: one rank of a run."""

    def __init__(self, job: Job, cores: int) -> None:
        self.job, self.cores = job, cores

    def __call__(self) -> int:
        """The exit status of the run."""
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        job = self.job.continued() if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else self.job  # a node was lost
        self.process = subprocess.Popen(job.command(), env=environment(self.cores))
        while self.process.poll() is None:  # `wait` holds a lock, which `checkpoint` would wait for
            time.sleep(PATIENCE)
        return self.process.returncode

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit calls in the first rank before the job is put back in the queue: the run saves and ends."""
        import submitit

        self.process.terminate()
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Task(self.job.continued(), self.cores))

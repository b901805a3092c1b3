"""A run of a grid, as the command that makes it, and what became of it."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multimodal.config import RunError
from multimodal.run_folder import FINISHED
from multimodal.tracker import SUMMARY

MAX_REASON = 300
INTERRUPTED, NOT_STARTED = "interrupted", "not started"
"""The status of a run that a stop signal to the grid has stopped, and of one that it kept from starting."""
OPEN = (INTERRUPTED, NOT_STARTED)


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    folder: Path
    words: tuple[str, ...]
    """Of the command, without the interpreter: `train.py key=value run.name=NAME`."""
    metric: str | None
    """What the run is judged by."""
    done: bool
    """Whether nothing of it is left to do."""
    dry: bool = False
    """Whether it only looks: what its folder says is of another start."""

    def command(self, processes: int = 1) -> list[str]:
        """What is started; several processes by torchrun."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *(several if processes > 1 else []), *self.words]

    def continued(self) -> "Job":
        """The same run where it goes on: what it has computed is not deleted once more."""
        return replace(self, words=(*self.words, "run.fresh=false"))

    def summary(self) -> dict[str, Any]:
        """What the run says of itself; empty if it has not come to that."""
        if self.dry:
            return {}
        try:
            found: dict[str, Any] = json.loads((self.folder / SUMMARY).read_text())
        except (OSError, ValueError):
            return {}
        return found


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    job: Job
    status: str
    """As in its summary, or one of OPEN."""
    reason: str = ""
    """Why it failed, in a line."""

    @property
    def result(self) -> float | None:
        """The best value of what the run is judged by."""
        return self.job.summary().get(f"best/{self.job.metric}")


def outcome(job: Job, code: int, output: str) -> Outcome:
    """That of a command that ended with this exit status after this output."""
    if code:
        return Outcome(job, "failed", reason(code, output))
    return Outcome(job, job.summary().get("status", "finished"))


def reason(code: int, output: str) -> str:
    """Why a command failed, in one line: its last one, or the problems that it lists; the signal that killed it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    starts = [place for place, line in enumerate(lines) if " problem" in line and line.endswith(":")]
    told = " ".join(lines[starts[-1] :] if starts else lines[-1:])
    if code < 0:
        told = f"killed by {signal.Signals(-code).name}; its last line: {told}"
    return told if len(told) <= MAX_REASON else f"{told[:MAX_REASON]}..."


def environment(cores: int) -> dict[str, str]:
    """That of a run which has so many cores to itself; what the user has set stays."""
    return {"OMP_NUM_THREADS": str(max(1, cores)), **os.environ}


def is_well(one: Outcome) -> bool:
    """Whether it has come to its end, or only a stop signal is why it has not."""
    return one.status in (*FINISHED, *OPEN)


def failures(outcomes: Sequence[Outcome]) -> RunError | None:
    """What did not end well, a line for each run; None if all did."""
    open_ones = [one for one in outcomes if not is_well(one)]
    if not open_ones:
        return None
    lines = [f"  {one.job.name}: {one.reason or one.status}" for one in open_ones]
    advice = "Once the causes are mended, the same command finishes what is missing, and skips what is done"
    return RunError("\n".join([f"{len(open_ones)} of {len(outcomes)} runs are not finished:", *lines, advice]))

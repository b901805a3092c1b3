"""Where a step's time goes: a trace of a few steps, and a table of its parts."""

import gzip
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from multimodal.files import write_json

logger = logging.getLogger(__name__)

span = record_function
"""Gives what is done inside a name in the profile; costs nothing to speak of where none is made."""
SPANS = ("data", "towers", "loss", "backward", "gradients", "optimizer", "ema", "vote", "log", "save")
"""The parts of a step, in their order. With micro-batches the second pass of the towers is in "backward"."""
WAIT, WARMUP, ACTIVE = 2, 1, 5
"""Steps that are left out, that are recorded for nothing, and that are recorded."""


class Profile(Protocol):
    """Is told when a step ends."""

    def step(self) -> None: ...


class _NoProfile:
    def step(self) -> None:
        pass


@contextmanager
def profiled(
    wanted: bool,
    folder: Path,  # of the run
    device: torch.device,
) -> Iterator[Profile]:
    """Record some steps to `profile/trace.json.gz`, for Perfetto or chrome://tracing, and say where their time went."""
    if not wanted:
        yield _NoProfile()
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it calls it an error that there is no GPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    def tell(found: profile) -> None:
        _tell(
            found, folder / "profile", "" if device.type == "cpu" else " on the host, which waits for the GPU in some"
        )

    when = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=tell) as found:
        yield found
    if found.step_num <= WAIT + WARMUP:
        logger.warning("profile=true: the run ended before step %d, the first that is recorded", WAIT + WARMUP + 1)


def _tell(found: profile, folder: Path, where: str) -> None:
    folder.mkdir(exist_ok=True)
    trace = folder / "trace.json"
    found.export_chrome_trace(str(trace))
    with gzip.open(folder / "trace.json.gz", "wb") as packed:
        packed.write(trace.read_bytes())
    trace.unlink()
    seconds = _seconds(found)
    write_json(folder / "spans.json", seconds)
    whole = seconds["step"]
    logger.info("where the %.4g s of a step went%s; %s", whole, where, folder / "trace.json.gz")
    for name, part in seconds.items():
        logger.info("  %-10s %5.1f%% %9.2f ms", name, 100 * part / whole, 1000 * part)


def _seconds(found: profile) -> dict[str, float]:
    """By span, and of a whole step; the "rest" is in no span."""
    events = {event.key: event for event in found.key_averages()}
    steps = events["ProfilerStep*"].count
    totals = {name: event.cpu_time_total / 1e6 / steps for name, event in events.items()}
    whole = totals["ProfilerStep*"]
    parts = {name: totals[name] for name in SPANS if name in totals}
    return {**parts, "rest": max(0.0, whole - sum(parts.values())), "step": whole}

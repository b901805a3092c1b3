"""How each run stands, from what its folder holds."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from multimodal import checkpoint, run_lock
from multimodal.report.folders import Run, number, read
from multimodal.report.numbers import NONE, plain, short
from multimodal.report.overview import main_metrics
from multimodal.results_table import aligned
from multimodal.run_folder import FINISHED
from multimodal.tracker import METRICS
from multimodal.units import Duration

Status = Literal["live", "finished", "stopped", "failed", "killed", "broken", "evaluated"]
ENDINGS: dict[str, Status] = {
    **dict.fromkeys(FINISHED, "finished"),
    "stopped": "stopped",
    "failed": "failed",
    "running": "killed",
}
"""What a run that is not live said last, and how it stands."""
RECENT = 5
"""Entries of the log that a rate is the median of."""
HEADS = ("run", "status", "step", "samples/s", "left", "metric", "value", "size", "age")


@dataclass(frozen=True)
class Entry:
    """A run in the list."""

    run: Run
    folder: Path
    status: Status
    step: int | None
    total: int | None
    """Steps that it is to take; None where nothing says."""
    rate: float | None
    """Samples a second, of late; of a live run."""
    left: float | None
    """Seconds, without evaluations; of a live run."""
    metric: tuple[str, float] | None
    """The best value of what its checkpoints are judged by, or else the last one of its main metric."""
    size: int
    """Bytes on the disk."""
    age: float
    """Seconds since something was logged."""


def entries(folders: Sequence[Path]) -> list[Entry]:
    """Of all runs."""
    return [_entry(run, folder) for run, folder in zip(read(folders), folders, strict=True)]


def _entry(run: Run, folder: Path) -> Entry:
    status = status_of(run, folder)
    last = {**(run.rows[-1] if run.rows else {}), **({} if status == "live" else run.summary)}
    step, total = number(last.get("step")), _total(run, folder)
    rate = left = None
    if status == "live":
        rates = [value for row in run.rows if (value := number(row.get("train/samples_per_s")))]
        rate = median(rates[-RECENT:]) if rates else None
        batch = number(run.config.get("global_batch_size"))
        if rate and batch and total is not None and step is not None:
            left = (total - step) * batch / rate
    return Entry(
        run,
        folder,
        status,
        None if step is None else int(step),
        total,
        rate,
        left,
        _metric(run),
        size_of(folder),
        time.time() - _touched(folder),
    )


def status_of(run: Run, folder: Path) -> Status:
    """Live is what a process trains now; killed is what says that it runs and does not; broken what cannot be read."""
    return "live" if run_lock.is_held(folder) else standing(run)


def standing(run: Run) -> Status:
    """The same of a run that nobody trains; whoever holds its lock may ask."""
    if not run.config:
        return "broken" if run.rows or run.summary or run.notes else "evaluated"
    return ENDINGS.get(str(run.summary.get("status")), "broken")


def _total(run: Run, folder: Path) -> int | None:
    try:
        duration = Duration.parse(str(run.config.get("duration")))
        batch = int(run.config["global_batch_size"])
        if duration.unit != "epochs":
            return duration.steps(batch, 1)
        epochs = [(row["step"], row["train/epoch"]) for row in run.rows if row.get("train/epoch")]
        return duration.steps(batch, max(1, round(epochs[-1][0] / epochs[-1][1])))
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError):
        return _stored_total(folder)


def _stored_total(folder: Path) -> int | None:
    try:
        return checkpoint.load_state(checkpoint.find(folder)).total_steps
    except (OSError, ValueError):
        return None


def _metric(run: Run) -> tuple[str, float] | None:
    section = run.config.get("checkpoint")
    settings = section if isinstance(section, dict) else {}
    key = settings.get("best")
    if key:
        values = [value for row in run.rows if (value := number(row.get(key))) is not None]
        if values:
            return str(key), (min if settings.get("mode") == "min" else max)(values)
    for main in main_metrics([run]):
        if (value := run.values[main].value) is not None:
            return main, value
    return None


def size_of(folder: Path) -> int:
    """Bytes of all files below; what a link leads to does not count."""

    def sizes() -> Iterator[int]:
        for path in folder.rglob("*"):
            try:
                yield 0 if path.is_dir() else path.lstat().st_size
            except OSError:  # deleted meanwhile
                continue

    return sum(sizes())


def _touched(folder: Path) -> float:
    for path in (folder / METRICS, folder):
        if path.exists():
            return path.stat().st_mtime
    return time.time()


# --- as text --------------------------------------------------------------------------------------------------------


def table(listed: Sequence[Entry]) -> str:
    """One line for each run."""
    return aligned([HEADS, *(_row(entry) for entry in listed)])


def _row(entry: Entry) -> list[str]:
    total = "" if entry.total is None else f"/{entry.total}"
    key, value = entry.metric or (NONE, None)
    return [
        entry.run.name,
        entry.status,
        NONE if entry.step is None else f"{entry.step}{total}",
        NONE if entry.rate is None else f"{entry.rate:,.0f}",
        NONE if entry.left is None else clock(entry.left),
        key,
        plain(value),
        f"{short(entry.size)}B",
        clock(entry.age),
    ]


def clock(seconds: float) -> str:
    """In the largest unit of which there are two or more: 90s, 5min, 30h, 12d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"

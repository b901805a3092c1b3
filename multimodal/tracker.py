"""A run's log: metrics.jsonl and summary.json are the source of truth; W&B mirrors them."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from multimodal.config import RunError
from multimodal.files import to_json, write_json
from multimodal.parts import Mirror, RunInfo, Tracker

logger = logging.getLogger(__name__)

METRICS, SUMMARY = "metrics.jsonl", "summary.json"

Row = dict[str, Any]
"""Flat keys; a value that was not finite is None."""


class RunLog:
    """Appends rows to metrics.jsonl and passes them on to the mirror; a mirror that fails is left, the run goes on."""

    def __init__(self, folder: Path, log_bytes: int) -> None:
        self.folder = folder
        self.file = (folder / METRICS).open("ab")
        self.file.truncate(min(log_bytes, self.file.tell()))
        self.file.seek(0, os.SEEK_END)
        self.mirror: Mirror | None = None

    def start(self, tracker: Tracker, run: RunInfo) -> None:
        """Show the log in `tracker` too."""
        with self._unless_it_fails():
            self.mirror = tracker.start(run)

    @property
    def rows(self) -> list[Row]:
        """All rows so far; one that could not be written to its end is none."""
        lines = (self.folder / METRICS).read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """One row: the step, the samples seen by then, and flat metric keys."""
        row = {"step": step, "samples": samples, **values}
        try:
            self.file.write(to_json(row).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise RunError(f"{self.folder / METRICS} cannot be written: {error.strerror}") from error
        with self._unless_it_fails():
            if self.mirror is not None:
                self.mirror.log(step, row)

    def figure(self, step: int, name: str, path: Path) -> None:
        """Show a figure that is in the run's folder."""
        with self._unless_it_fails():
            if self.mirror is not None:
                self.mirror.figure(step, name, path)

    @property
    def length(self) -> int:
        """Bytes of all rows so far."""
        return self.file.tell()

    def flush(self) -> None:
        """Bring all rows to the disk."""
        os.fsync(self.file.fileno())

    def summarise(self, facts: Mapping[str, Any], best: str | None, mode: str) -> dict[str, Any]:
        """Write summary.json: the last value of every metric, `facts`, and the row of the best."""
        rows = self.rows
        summary: dict[str, Any] = {}
        for row in rows:
            summary.update(row)
        summary |= facts
        candidates = [row for row in rows if best in row and row[best] is not None]
        if best is not None and candidates:
            top = (max if mode == "max" else min)(candidates, key=lambda row: row[best])
            summary |= {f"best/{best}": top[best], "best/step": top["step"]}
        write_json(self.folder / SUMMARY, summary)
        return summary

    def close(self, exit_code: int) -> None:
        """Finish the file and the mirror."""
        try:
            self.file.close()
        except OSError:  # what could not be written once is tried again
            if exit_code == 0:
                raise
        with self._unless_it_fails():
            if self.mirror is not None:
                self.mirror.finish(exit_code)

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            logger.warning("the tracker failed and is left out from here on; %s goes on", METRICS, exc_info=True)
            self.mirror = None


class NoTracker(Tracker):
    """No mirror: the run's own files are all there is."""

    def start(self, run: RunInfo) -> Mirror:
        return _Nowhere()


class _Nowhere:
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def figure(self, step: int, name: str, path: Path) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class Wandb(Tracker):
    """Weights & Biases: online when there is a login or a key, else offline, to be synchronised later."""

    project: str = Field(min_length=1)
    entity: str | None
    """Team or user; null for the login's own."""
    group: str | None
    """What runs are listed under together, such as a sweep."""
    tags: Annotated[tuple[str, ...], Strict(False)]
    notes: str | None
    mode: Literal["auto", "online", "offline"]
    """auto is online when logged in (never asks), else offline; the environment variable WANDB_MODE goes before it."""

    def start(self, run: RunInfo) -> Mirror:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or self.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        settings: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group,
            "tags": self.tags,
            "notes": self.notes,
            "name": run.name,
            "id": run.id,
            "dir": run.folder,
            "config": run.config,
            "resume": "allow",
            "reinit": "finish_previous",  # a second run in this process (multirun) is a second W&B run
            "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
        }
        try:
            mirror = wandb.init(mode=mode, **settings)
        except wandb.Error as error:
            if mode == "offline":
                raise
            logger.warning("W&B cannot be reached (%s): logging offline", error)
            mode, mirror = "offline", wandb.init(mode="offline", **settings)
        mirror.define_metric("samples")
        for metrics in ("eval/*", "eval_ema/*"):
            mirror.define_metric(metrics, step_metric="samples")
        if mode == "offline":
            logger.info("W&B is offline; to upload this run: uv run wandb sync %s", Path(mirror.dir).parent)
            for row in run.history:  # an offline run cannot be continued: each start writes it whole
                mirror.log(row, step=int(row["step"]))
        return _WandbMirror(mirror)


class _WandbMirror:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        known = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        self.run.log(known, step=step)

    def figure(self, step: int, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))}, step=step)

    def finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)

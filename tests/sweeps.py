"""What tests of whole searches share: processes of `scripts/sweep.py` over runs that train in a second."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import yaml
from conftest import TINY
from optuna.trial import FrozenTrial

from multimodal.cli import CONF

OVERRIDES = [
    *(word for word in TINY if not word.startswith(("run.name=", "evals=", "checkpoint.every="))),
    "evals=[shapes]",
    "evals.shapes.dataset.size=80",
    "evals.shapes.every=2steps",
    "checkpoint.every=2steps",
]
LONGEST = 900.0
"""Seconds that a search, or anything in it, may take."""


class Searching:
    """One search in a folder of its own, by any number of processes."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.study_folder = self.runs / "search"
        self.storage = settings.get("storage") or f"sqlite:///{self.study_folder / 'study.db'}"
        (folder / "sweep").mkdir(parents=True)
        body = {"defaults": [], "overrides": OVERRIDES, "threads": 1, **settings}
        (folder / "sweep" / "tiny.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(body, sort_keys=False)}")
        self.log = folder / "log.txt"
        self.drivers: list[subprocess.Popen[bytes]] = []

    def begin(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(CONF.parent / "scripts" / "sweep.py"), f"--config-dir={self.folder}"]
        words = ["sweep=tiny", "name=search", f"paths.runs={self.runs}"]
        with self.log.open("ab") as log:
            driver = subprocess.Popen([*command, *words], stdout=log, stderr=subprocess.STDOUT, cwd=CONF.parent)
        self.drivers.append(driver)
        return driver

    def finish(self) -> None:
        """Wait for all that were not killed."""
        for driver in self.drivers:
            assert driver.wait(LONGEST) in (0, -signal.SIGKILL), self.log.read_text()

    @property
    def trials(self) -> list[FrozenTrial]:
        return optuna.load_study(study_name="search", storage=self.storage).trials

    def run(self, number: int) -> Path:
        return self.runs / f"search-{number:04d}"

    def rows(self, number: int) -> list[dict[str, Any]]:
        path = self.run(number) / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self, driver: "subprocess.Popen[bytes]", happened: Callable[[], object]) -> None:
        """Until something has happened, as long as the driver works on it."""
        until = time.monotonic() + LONGEST
        while not happened():
            assert driver.poll() is None, self.log.read_text()
            assert time.monotonic() < until
            time.sleep(0.05)

    def kill_trial(self, driver: "subprocess.Popen[bytes]", number: int) -> None:
        """As the kernel does where memory is short; once it has logged something."""
        self.wait(driver, lambda: self.rows(number))
        os.kill(json.loads((self.run(number) / ".lock").read_text())["pid"], signal.SIGKILL)


def outcome(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.state.name, t.params, t.values, t.intermediate_values) for t in trials]

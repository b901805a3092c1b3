"""What programs over a finished (or running) run are told."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from multimodal import checkpoint
from multimodal.config import Config, ConfigError, PathsSection, Weights
from multimodal.resolve import did_you_mean


class Settings(Config):
    """Which state of a run, and where it is used."""

    checkpoint: str | int
    """last, best, or a step."""
    weights: Weights
    """raw for those of that step, ema for their running mean, where the run has kept it."""
    paths: PathsSection
    device: Literal["auto", "cpu", "cuda"]
    workers: int = Field(ge=0)
    """Processes that read images."""


class FinishedRun(Settings):
    """Which run besides."""

    run: str = Field(min_length=1)
    """Name of a run below `paths.runs`."""

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.paths.runs) / self.run

    def find_checkpoint(self) -> Path:
        """The checkpoint's folder; ConfigError says what there is."""
        if not self.folder.is_dir():
            have = [path.name for path in Path(self.paths.runs).glob("*") if checkpoint.steps(path)]
            told = f"there is no run '{self.run}' in {self.paths.runs}.{did_you_mean(self.run, have)}"
            raise ConfigError([("run", told)])
        try:
            found = checkpoint.find(self.folder, str(self.checkpoint))
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError([("run", str(error))]) from None
        try:
            checkpoint.weights_file(found, self.weights)
        except ValueError as error:
            raise ConfigError([("weights", str(error))]) from None
        return found

    def output(self, kind: str, checkpoint: Path, name: str, asked: str) -> Path:
        """Where an answer goes unless told: a folder of its `kind` in the run's, a file for each that was `asked`."""
        digest = hashlib.sha256(asked.encode("utf-8", "replace")).hexdigest()[:8]
        return self.folder / kind / f"{self.named(checkpoint.name)}-{name}-{digest}"

    def named(self, name: str) -> str:
        """The name of something made with raw weights, or with the others."""
        return name if self.weights == "raw" else f"{name}-{self.weights}"

"""What programs over a finished (or running) run are told."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from multimodal import checkpoint
from multimodal.config import Config, ConfigError, PathsSection


class FinishedRun(Config):
    """Which run, and where it is used."""

    run: str = Field(min_length=1)
    """Name of a run below `paths.runs`."""
    checkpoint: str | int
    """last, best, or a step."""
    paths: PathsSection
    device: Literal["auto", "cpu", "cuda"]
    workers: int = Field(ge=0)
    """Processes that read images."""

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.paths.runs) / self.run

    def find_checkpoint(self) -> Path:
        """The checkpoint's folder; ConfigError says what there is."""
        try:
            return checkpoint.find(self.folder, str(self.checkpoint))
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError([("run", str(error))]) from None

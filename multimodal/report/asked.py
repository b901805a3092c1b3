"""What programs over folders of runs are told: which ones."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from multimodal.config import MISSING, Config, PathsSection
from multimodal.report import folders


def words(value: Any) -> Any:
    """Those that a string names, with commas between, or those of a list."""
    if isinstance(value, str) and value != MISSING:
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(words)]
Words = Several[Annotated[str, Field(min_length=1)]]


def _runs_are_there(config: "SeveralRuns") -> Iterator[tuple[str, str]]:
    yield from (("runs", text) for text in config.found[1])


class SeveralRuns(Config):
    """Which runs."""

    rules = (_runs_are_there,)

    runs: Annotated[Words, Field(min_length=1)]
    """Names of runs below `paths.runs`, folders, or globs."""
    paths: PathsSection

    @cached_property
    def found(self) -> tuple[list[Path], list[str]]:
        """The runs' folders, and what is wrong with names that have none."""
        return folders.find(self.runs, Path(self.paths.runs))

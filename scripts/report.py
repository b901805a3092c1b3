"""Put runs side by side on one HTML page: `scripts/report.py RUN... [out=report.html]`; also runs=[a,b,c]."""

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import BeforeValidator, Field

from multimodal.cli import launch, plain, program
from multimodal.config import MISSING, Config, PathsSection, RunError, check
from multimodal.report import folders, numbers, page

logger = logging.getLogger(__name__)


def _words(value: Any) -> Any:
    """The runs that a string names, with commas between, or those of a list."""
    if isinstance(value, str) and value != MISSING:
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return tuple(value) if isinstance(value, list) else value


def _runs_are_there(config: "ReportConfig") -> Iterator[tuple[str, str]]:
    yield from (("runs", text) for text in config.found[1])


def _out_is_a_page(config: "ReportConfig") -> Iterator[tuple[str, str]]:
    if config.out is None:
        return
    if Path(config.out).suffix.lower() not in (".html", ".htm"):
        yield "out", f"should be a file that ends in .html, got '{config.out}'"
    elif Path(config.out).is_dir():
        yield "out", f"{config.out} is a folder"


class ReportConfig(Config):
    """Which runs, and where the page goes."""

    rules = (_runs_are_there, _out_is_a_page)

    runs: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_words)]
    """Names of runs below `paths.runs`, folders, or globs."""
    out: str | None = Field(min_length=1)
    """An HTML file; null for report.html in `paths.runs`."""
    paths: PathsSection

    @cached_property
    def found(self) -> tuple[list[Path], list[str]]:
        """The runs' folders, and what is wrong with names that have none."""
        return folders.find(self.runs, Path(self.paths.runs))


@program("report")
def main(composed: DictConfig) -> None:
    """Read what the runs' folders hold and write the page; no model is loaded."""
    asked = check(plain(composed), ReportConfig)
    out = Path(asked.paths.runs) / "report.html" if asked.out is None else Path(asked.out)
    runs = folders.read(asked.found[0])
    for run in runs:
        for note in run.notes:
            logger.warning("%s: %s", run.name, note)
    try:
        page.write(out, page.render(runs))
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}") from error
    size = numbers.short(out.stat().st_size)
    logger.info("%d run%s, %sB: %s", len(runs), "s" if len(runs) > 1 else "", size, out)


if __name__ == "__main__":
    launch(main, verbatim=("runs", "out"), listed="runs")

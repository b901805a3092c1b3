"""Put runs side by side on one HTML page: `scripts/report.py RUN... [out=report.html]`; also runs=[a,b,c]."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import launch, plain, program
from multimodal.comparison.groups import compared
from multimodal.comparison.tables import section
from multimodal.config import RunError, check
from multimodal.report import folders, numbers, page
from multimodal.report.asked import SeveralRuns

logger = logging.getLogger(__name__)


def _out_is_a_page(config: "ReportConfig") -> Iterator[tuple[str, str]]:
    if config.out is None:
        return
    if Path(config.out).suffix.lower() not in (".html", ".htm"):
        yield "out", f"should be a file that ends in .html, got '{config.out}'"
    elif Path(config.out).is_dir():
        yield "out", f"{config.out} is a folder"


class ReportConfig(SeveralRuns):
    """Which runs, and where the page goes."""

    rules = (*SeveralRuns.rules, _out_is_a_page)

    out: str | None = Field(min_length=1)
    """An HTML file; null for report.html in `paths.runs`."""


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
        page.write(out, page.render(runs, sections=_groups(runs)))
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}") from error
    size = numbers.short(out.stat().st_size)
    logger.info("%d run%s, %sB: %s", len(runs), "s" if len(runs) > 1 else "", size, out)


def _groups(runs: Sequence[folders.Run]) -> list[page.Section]:
    """Runs over their seeds, where there are several of the same settings."""
    found = compared(runs)
    return [section(found)] if any(len(group.runs) > 1 for group in found.groups) else []


if __name__ == "__main__":
    launch(main, verbatim=("runs", "out"), listed="runs")

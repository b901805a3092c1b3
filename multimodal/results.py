"""What evaluations found, on disk: numbers in `results.json`, figures beside them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from multimodal.files import write_json
from multimodal.parts import Estimate, Report

FILE = "results.json"


def folder_of(run: Path, step: int) -> Path:
    """Where the results of a run's checkpoint are."""
    return run / "evaluations" / f"step-{step:08d}"


def estimates(reports: Mapping[str, Report]) -> dict[str, Estimate]:
    """All numbers of reports by the name of their evaluation, as `eval/<name>/<metric>`."""
    return {
        f"{name}/{metric}": found if isinstance(found, Estimate) else Estimate(found)
        for name, report in reports.items()
        for metric, found in report.metrics.items()
    }


def write_numbers(reports: Mapping[str, Report], folder: Path) -> None:
    """Add the numbers to what the folder's `results.json` holds; what is no number is null."""
    path = folder / FILE
    before = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        key: {name: value if value is None or math.isfinite(value) else None for name, value in asdict(one).items()}
        for key, one in estimates(reports).items()
    }
    write_json(path, {**before, **found})


def write_figures(reports: Mapping[str, Report], folder: Path) -> Iterator[tuple[str, Path]]:
    """Draw the figures of evaluations into a folder: (`eval/<name>/<figure>`, path)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        for figure, make in report.figures.items():
            path = folder / f"{name.removeprefix('eval/').replace('/', '_')}_{figure}.png"
            make().savefig(path, dpi=120)
            yield f"{name}/{figure}", path

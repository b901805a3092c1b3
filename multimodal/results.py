"""What evaluations found, on disk: numbers in `results.json`, figures beside them."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multimodal.files import from_json, write_json
from multimodal.parts import Estimate, Report

logger = logging.getLogger(__name__)

FILE, SETTINGS = "results.json", "settings.json"
"""Numbers by metric, and by evaluation what they were measured with."""
EVALUATIONS, FIGURES = "evaluations", "figures"
"""In a run's folder: results by step, and the figures that training has drawn."""
TRAINING_CURVES = "curves"
"""A figure of every trained run."""


def folder_of(run: Path, step: int) -> Path:
    """Where the results of a run's checkpoint are."""
    return run / EVALUATIONS / f"step-{step:08d}"


def estimates(reports: Mapping[str, Report]) -> dict[str, Estimate]:
    """All numbers of reports by the name of their evaluation, as `eval/<name>/<metric>`."""
    return {
        f"{name}/{metric}": found if isinstance(found, Estimate) else Estimate(found)
        for name, report in reports.items()
        for metric, found in report.metrics.items()
    }


def write_numbers(reports: Mapping[str, Report], folder: Path) -> None:
    """Add the numbers to what the folder's `results.json` holds, and what they were measured with to `settings.json`.

    What is no number is null. An evaluation of the same name that was measured otherwise is replaced, with a warning.
    """
    path, beside = folder / FILE, folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    numbers, settings = _read(path), _read(beside)
    for name, report in reports.items():
        if settings.get(name, report.settings) != report.settings:
            logger.warning("%s was measured otherwise before, which is replaced: %s", name, path)
            numbers = {key: one for key, one in numbers.items() if not key.startswith(f"{name}/")}
    write_json(path, {**numbers, **{key: asdict(one) for key, one in estimates(reports).items()}})
    write_json(beside, {**settings, **{name: report.settings for name, report in reports.items()}})


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing, and a warning, if it is damaged."""
    if not path.exists():
        return {}
    try:
        held = from_json(path.read_bytes(), str(path))
    except ValueError:
        held = None
    if not isinstance(held, dict):
        logger.warning("%s is damaged: it is written anew, without what it held", path)
        return {}
    return held


def write_figures(reports: Mapping[str, Report], folder: Path) -> Iterator[tuple[str, Path]]:
    """Draw the figures of evaluations into a folder: (`eval/<name>/<figure>`, path)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        for figure, make in report.figures.items():
            path = folder / f"{name.removeprefix('eval/').replace('/', '_')}_{figure}.png"
            make().savefig(path, dpi=120)
            yield f"{name}/{figure}", path

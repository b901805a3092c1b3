"""Compare runs over their seeds: `scripts/compare.py 'runs/*' [y=eval/shapes/top1]`; Markdown, CSV and a page."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import launch, plain, program
from multimodal.comparison import pairs, pareto, tables
from multimodal.comparison.groups import FACTS, Compared, compared, direction
from multimodal.comparison.statistics import FEWEST, NAMES, Kind
from multimodal.config import ConfigError, RunError, check
from multimodal.report import folders, page
from multimodal.report.asked import SeveralRuns, Words
from multimodal.report.folders import Picture
from multimodal.report.pictures import encoded
from multimodal.resolve import did_you_mean
from multimodal.results_table import aligned

logger = logging.getLogger(__name__)

Better = Literal["auto", "more", "less"]
SIGNS = {"more": 1, "less": -1}


class CompareConfig(SeveralRuns):
    """Which runs, by what, and where the files go."""

    metrics: Words
    """Names or patterns of those that are shown and tested; none for the main ones of each evaluation."""
    baseline: str | None = Field(min_length=1)
    """A group, or a run in it, that others are tested against; null tests every two groups."""
    test: Kind
    x: str = Field(min_length=1)
    """Of the Pareto front: a metric, or parameters, samples, samples_per_s, train/loss."""
    y: str | None = Field(min_length=1)
    """The other one; null draws none."""
    x_better: Better
    """Whether more or less of it is better, where its name does not say."""
    y_better: Better
    out: str | None = Field(min_length=1)
    """What the names of files begin with; null for comparison in `paths.runs`."""


@program("compare")
def main(composed: DictConfig) -> None:
    """Read what the runs' folders hold, say what is not compared and why, and write the rest down."""
    asked = check(plain(composed), CompareConfig)
    runs = folders.read(asked.found[0])
    foreign = [(place.name, "is no run") for place in folders.passed_over(asked.runs, Path(asked.paths.runs))]
    found = compared(runs, foreign)
    for name, why in found.left_out:
        logger.warning("%s: %s", name, why)
    shown = {run.name for group in found.groups for run in group.runs}
    runs = [run for run in runs if run.name in shown]
    for run in runs:
        for note in run.notes:
            logger.warning("%s: %s", run.name, note)
    if not found.groups:
        raise RunError("there is no finished run to compare")
    for key in sorted(found.unlike):
        logger.warning(
            "%s is left out: not all runs were measured on the same data (chance, or number of samples)", key
        )
    keys, signs = _checked(asked, found)
    made = pairs.all_pairs(found, keys, asked.test, _baseline(asked, found))
    out = Path(asked.paths.runs) / "comparison" if asked.out is None else Path(asked.out)
    try:
        _write(out, asked, found, keys, made, signs, runs)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}") from error
    for grid in tables.results(found, keys):
        logger.info("%s", aligned([grid.heads, *([fact.text for fact in row] for row in grid.rows)]))
    tests = len(pairs.performed(made))
    told = f"{tests} tests ({NAMES[asked.test]})" if tests else f"no tests: no two groups share {FEWEST} seeds"
    logger.info("runs: %d, groups: %d, %s", len(runs), len(found.groups), told)
    logger.info("%s", "\n".join(str(path) for path in sorted(out.parent.glob(f"{out.name}[-.]*"))))


def _baseline(asked: CompareConfig, found: Compared):
    wanted = asked.baseline
    return next((g for g in found.groups if wanted in (g.name, *(run.name for run in g.runs))), None)


def _checked(asked: CompareConfig, found: Compared) -> tuple[list[str], tuple[int, int]]:
    """The metrics, and the directions of the front; ConfigError with all that the runs do not have."""
    problems: list[tuple[str, str]] = []
    keys: list[str] = []
    try:
        keys = pairs.chosen(found, asked.metrics)
    except ValueError as error:
        problems.append(("metrics", str(error)))
    if asked.baseline is not None and _baseline(asked, found) is None:
        names = [group.name for group in found.groups]
        problems.append(("baseline", f"there is no group '{asked.baseline}'.{did_you_mean(asked.baseline, names)}"))
    signs = []
    for axis, key, better in (("x", asked.x, asked.x_better), ("y", asked.y, asked.y_better)):
        if asked.y is None or key is None:
            continue
        signs.append(SIGNS.get(better, direction(key, found.groups)))
        if key in found.keys and key not in (*keys, *FACTS):
            keys.append(key)
        if key not in found.keys:
            problems.append((axis, f"no run has '{key}'.{did_you_mean(key, found.keys)}"))
        elif signs[-1] == 0:
            problems.append((f"{axis}_better", f"the name '{key}' does not say whether more is better: more or less"))
    if problems:
        raise ConfigError(problems)
    return keys, (signs[0], signs[1]) if signs else (0, 0)


def _write(
    out: Path,
    asked: CompareConfig,
    found: Compared,
    keys: Sequence[str],
    made: Sequence[pairs.Tested],
    signs: tuple[int, int],
    runs: Sequence[folders.Run],
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = caption = None
    drawn = out.with_name(f"{out.name}-pareto.png")
    drawn.unlink(missing_ok=True)  # of another comparison
    if asked.y is not None:
        picture = _front(drawn, asked.x, asked.y, found, signs)
        caption = f"{asked.y} over {asked.x}; blue: on the Pareto front"
    shown = tables.section(found, keys, made, asked.test, picture, caption or "")
    page.write(out.with_name(f"{out.name}.html"), page.render(runs, sections=[shown]))
    page.write(out.with_name(f"{out.name}.md"), tables.markdown(shown))
    for name, rows in tables.csvs(found, made, asked.test).items():
        with out.with_name(f"{out.name}-{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _front(path: Path, x: str, y: str, found: Compared, signs: tuple[int, int]):
    both = zip(found.groups, tables.spreads(found, x), tables.spreads(found, y), strict=True)
    points = [(group.name, (a, b)) for group, a, b in both if a is not None and b is not None]
    if not points:
        raise ConfigError([("x", f"no group of runs has both {x} and {y}")])
    best = pareto.front([(a.mean, b.mean) for _, (a, b) in points], signs)
    names = [name for name, _ in points]
    pareto.draw(names, [point for _, point in points], best, (x, y)).savefig(path, dpi=120)
    logger.info("on the Pareto front: %s", ", ".join(name for name, on in zip(names, best, strict=True) if on))
    return encoded(Picture("", "pareto", None, path), 0)


if __name__ == "__main__":
    launch(main, verbatim=("runs", "metrics", "out", "baseline"), listed="runs")

"""Fit error = a + b x^-c to runs and foretell larger ones: `scripts/scaling.py 'size_*' metric=eval/shapes/top1`."""

import csv
import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import launch, plain, program
from multimodal.comparison.groups import compared
from multimodal.config import ConfigError, RunError, check
from multimodal.files import to_json, write_json
from multimodal.hardware import Hardware
from multimodal.report import folders
from multimodal.report.asked import Several, SeveralRuns, Words
from multimodal.scaling.figure import draw
from multimodal.scaling.fit import STEEPEST, Fit, fit
from multimodal.scaling.points import TITLES, Axis, Point, complement, planned_size, points

logger = logging.getLogger(__name__)


class ScalingConfig(SeveralRuns):
    """Which runs, what of them, and what is foretold."""

    metric: str = Field(min_length=1)
    """Of an evaluation, or train/loss; what is fitted is its error: 1 less a fraction, or the number itself."""
    x: Axis
    """What a size is: FLOPs of training, parameters, or samples seen."""
    plans: Words
    """JSON files of scripts/plan.py, each of a run whose error is foretold, with its cost."""
    at: Several[Annotated[float, Field(gt=0, strict=False)]]
    """More sizes at which it is."""
    resamples: int = Field(ge=20)
    """Of the bootstrap."""
    seed: int = Field(ge=0)
    out: str | None = Field(min_length=1)
    """What the names of files begin with; null for scaling in `paths.runs`."""
    hardware: Hardware
    """Where FLOPs are counted for."""


@program("scaling")
def main(composed: DictConfig) -> None:
    """Fit the law, draw it, and write it down; what is foretold is added to a file that is never written anew."""
    asked = check(plain(composed), ScalingConfig)
    found = compared(folders.read(asked.found[0]))
    plans, lacking = _checked(asked, found)
    used, left_out = points(found, asked.metric, asked.x, asked.hardware)
    for name, why in left_out:
        logger.warning("%s: %s", name, why)
    x, error = (np.array([getattr(point, name) for point in used]) for name in ("x", "error"))
    try:
        law = fit(x, error, asked.resamples, asked.seed)
    except ValueError as problem:
        raise RunError(f"{len(used)} runs of {problem}") from None
    foretold = [_foretold(law, size, used, lacking, plan) for size, plan in plans]
    out = Path(asked.paths.runs) / "scaling" if asked.out is None else Path(asked.out)
    try:
        _write(out, asked, used, law, foretold, lacking)
    except OSError as problem:
        raise RunError(f"{out} cannot be written: {problem.strerror}") from problem
    sizes = len({point.x for point in used})
    error_of = _error(asked.metric, lacking)
    logger.info("%s = a + b %s^-c, of %d runs of %d sizes; 95%% intervals", error_of, asked.x, len(used), sizes)
    for name, (value, low, high) in _numbers(law).items():
        logger.info("%s %.4g [%.4g, %.4g]", name, value, low, high)
    _, low, high = _numbers(law)["c"]
    if low <= 0 or high >= STEEPEST:
        logger.warning("c can be anything from %.3g to %.3g: these runs do not determine a law", low, high)
    for one in foretold:
        plan = one.get("plan") or {}
        cost = "".join(f", {plan[key]:,.4g} {key}" for key in ("gpu_hours", "dollars") if key in plan)
        span = f"{one['error']:.4g} [{one['low']:.4g}, {one['high']:.4g}]"
        logger.info("at %.4g %s, %.3g times the largest: error %s%s", one["x"], asked.x, one["beyond"], span, cost)
    logger.info("%s", "\n".join(str(out.with_name(f"{out.name}.{kind}")) for kind in ("json", "csv", "png")))


def _checked(asked: ScalingConfig, found: Any) -> tuple[list[tuple[float, dict[str, Any] | None]], bool]:
    """The sizes to foretell, with plans, and whether the error is what the metric lacks to 1; ConfigError with all."""
    problems: list[tuple[str, str]] = []
    sizes: list[tuple[float, dict[str, Any] | None]] = [(size, None) for size in asked.at]
    for name in asked.plans:
        try:
            plan = json.loads(Path(name).read_text())
            cost = plan.get("time") or {}
            facts = {"file": name, "hardware": plan.get("hardware"), "num_gpus": plan.get("num_gpus"), **cost}
            sizes.append((planned_size(plan, asked.x), facts))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            problems.append(("plans", f"{name}: {error}"))
    lacking = False
    try:
        lacking = complement(asked.metric, found)
    except ValueError as error:
        problems.append(("metric", str(error)))
    if problems:
        raise ConfigError(problems)
    return sizes, lacking


def _foretold(law: Fit, x: float, used: list[Point], lacking: bool, plan: dict[str, Any] | None) -> dict[str, Any]:
    error, low, high = law.foretold(x)
    beyond = x / max(point.x for point in used)
    value = 1 - error if lacking else error
    return {"x": x, "beyond": beyond, "error": error, "low": low, "high": high, "value": value, "plan": plan}


def _error(metric: str, lacking: bool) -> str:
    return f"1 - {metric}" if lacking else metric


def _numbers(law: Fit) -> dict[str, tuple[float, float, float]]:
    """a, b and c with their intervals."""
    spans = law.intervals
    b = tuple(float(np.exp(value)) for value in (law.law.log_b, *spans["log_b"]))
    return {"a": (law.law.a, *spans["a"]), "b": (b[0], b[1], b[2]), "c": (law.law.c, *spans["c"])}


def _write(
    out: Path, asked: ScalingConfig, used: list[Point], law: Fit, foretold: list[dict[str, Any]], lacking: bool
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: dict(zip(("value", "low", "high"), found, strict=True)) for name, found in _numbers(law).items()}
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "metric": asked.metric, "x": asked.x}
    error = _error(asked.metric, lacking)
    whole = {**about, "form": "error = a + b x^-c", "error": error, **numbers, "foretold": foretold}
    rows = [[point.name, point.x, point.error, float(law.law(point.x))] for point in used]
    write_json(out.with_name(f"{out.name}.json"), {**whole, "runs": [point.name for point in used]})
    with out.with_name(f"{out.name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["run", asked.x, "error", "fitted"], *rows])
    with out.with_name(f"{out.name}-foretold.jsonl").open("a", encoding="utf-8") as file:
        for one in foretold:
            file.write(to_json({**about, **one, "law": numbers, "runs": [point.name for point in used]}) + "\n")
    marks = [(one["x"], one["error"], one["low"], one["high"]) for one in foretold]
    draw(used, law, marks, TITLES[asked.x], error).savefig(out.with_name(f"{out.name}.png"), dpi=120)


if __name__ == "__main__":
    launch(main, verbatim=("runs", "plans", "out"), listed="runs")

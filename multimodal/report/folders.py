"""What a run's folder holds, as far as a report shows it; any piece may be missing."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any

from multimodal import checkpoint
from multimodal.files import from_json, from_yaml
from multimodal.resolve import did_you_mean
from multimodal.results import EVALUATIONS, FIGURES, TRAINING_CURVES
from multimodal.results import FILE as RESULTS
from multimodal.run_folder import CONFIG
from multimodal.tracker import METRICS, SUMMARY, Row

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Of batch norms: they stand among the weights, and are no parameters."""
PARAMETERS = "num_parameters/total"
"""In the summary, where older runs do not have it."""
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Value:
    """A metric as an evaluation found it."""

    value: float | None
    """None where it was no number."""
    step: int
    low: float | None = None
    high: float | None = None
    """The bounds of its 95% interval."""
    chance: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Picture:
    """A figure of an evaluation, or another PNG of the run."""

    evaluation: str
    """Such as eval/shapes; empty where the file is of none."""
    figure: str
    step: int | None
    path: Path


@dataclass(frozen=True)
class Run:
    """One run, or a model that was only evaluated."""

    name: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    """By metric key, the newest."""
    pictures: list[Picture] = field(default_factory=list)
    parameters: int | None = None
    notes: tuple[str, ...] = ()
    """What could not be read."""


# --- finding --------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether there is something to report on."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, SUMMARY, EVALUATIONS))


def find(words: Iterable[str], root: Path) -> tuple[list[Path], list[str]]:
    """The folders that names below `root`, paths and globs stand for, each once; and what is wrong with the others."""
    found: list[Path] = []
    wrong: list[str] = []
    for word in words:
        places = [place for place in (root / word, Path(word)) if word and place.is_dir()]
        if places:
            matches = [place for place in places if is_run(place)][:1]
            if not matches:
                wrong.append(f"{places[0]} does not look like a run: it has no {CONFIG}, {METRICS} or {EVALUATIONS}/")
        elif has_magic(word):
            matches = [place for place in _matches(word, root) if is_run(place)]
            if not matches:
                wrong.append(f"no run matches '{word}', here or in {root}")
        else:
            matches = []
            have = [place.name for place in root.glob("*") if is_run(place)]
            wrong.append(f"there is no run '{word}' in {root}.{did_you_mean(word, have)}")
        found += matches
    return list({folder.resolve(): folder for folder in found}.values()), wrong


def passed_over(words: Iterable[str], root: Path) -> list[Path]:
    """The folders that globs match, but for hidden ones, in which there is nothing of a run."""
    globs = [word for word in words if has_magic(word) and not (root / word).is_dir()]
    return [
        place
        for word in globs
        for place in _matches(word, root)
        if place.is_dir() and not place.name.startswith(".") and not is_run(place)
    ]


def _matches(pattern: str, root: Path) -> list[Path]:
    path = Path(pattern)
    if path.is_absolute():
        return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return sorted(root.glob(pattern)) or sorted(Path().glob(pattern))


# --- reading --------------------------------------------------------------------------------------------------------


def read(folders: Iterable[Path]) -> list[Run]:
    """All runs, named as their folders; by the whole path where two are named alike."""
    folders = list(folders)
    names = [folder.resolve().name for folder in folders]
    alike = {name for name in names if names.count(name) > 1}
    return [
        read_run(folder, str(folder) if name in alike else name) for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> Run:
    """One run; what cannot be read is in its notes."""
    notes: list[str] = []
    text = _text(folder / CONFIG, notes)
    rows = list(_rows(_text(folder / METRICS, notes), notes))
    summary = _object(folder / SUMMARY, notes)
    told = number(summary.get(PARAMETERS))
    run = Run(
        name,
        config_text=text,
        config=_config(text, notes),
        rows=rows,
        summary=summary,
        values=_values(folder, rows, notes),
        parameters=_parameters(folder) if told is None else int(told),
    )
    return replace(run, pictures=list(_pictures(folder, run)), notes=tuple(notes))


def split(key: str) -> tuple[str, str]:
    """A metric's key as evaluation and metric: ("eval/shapes", "top1"); ("", key) where it is of no evaluation."""
    kind, _, rest = key.partition("/")
    evaluation, _, metric = rest.partition("/")
    return (f"{kind}/{evaluation}", metric) if kind in ("eval", "eval_ema") and metric else ("", key)


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return ""


def _config(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        config = from_yaml(text, CONFIG) or {}
        json.dumps(config, default=str)  # what cannot be told, such as a number of 5,000 digits, cannot be shown
    except (ValueError, TypeError, RecursionError):
        config = None
    if not isinstance(config, dict):
        notes.append(f"{CONFIG} is not a mapping in YAML")
        return {}
    return config


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = from_json(_text(path, notes) or "{}", path.name)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{'/'.join(path.parts[-2:])} is not an object in JSON")
        return {}
    return value


def _rows(text: str, notes: list[str]) -> Iterator[Row]:
    lost = 0
    for line in text.split("\n")[:-1]:  # behind the last end of a line is one that is being written
        try:
            row = from_json(line, METRICS)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int) and number(row["step"]) is not None:
            yield row
        else:
            lost += 1
    if lost:
        notes.append(f"{METRICS}: rows that are none: {lost}")


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    """The folders of evaluations, by step."""
    for path in sorted((folder / EVALUATIONS).glob("step-*")):
        if found := STEP.match(path.name):
            yield int(found[1]), path


def _values(folder: Path, rows: list[Row], notes: list[str]) -> dict[str, Value]:
    """The newest of each metric; at the same step what scripts/evaluate.py found, as it has intervals."""
    values: dict[str, Value] = {}
    for row in rows:
        found = {key: Value(number(row[key]), row["step"]) for key in row if split(key)[0]}
        values |= found
    for step, path in _steps(folder):
        for key, told in _object(path / RESULTS, notes).items():
            if split(key)[0] and (key not in values or step >= values[key].step):
                values[key] = _value(told, step)
    return values


def _value(told: Any, step: int) -> Value:
    """From the form of results.json, or from a bare number, as it was before."""
    if not isinstance(told, Mapping):
        return Value(number(told), step)
    facts = {name: number(told.get(name)) for name in ("value", "low", "high", "chance", "count")}
    count = facts.pop("count")
    return Value(step=step, count=None if count is None else int(count), **facts)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if known else None


def _parameters(folder: Path) -> int | None:
    """Numbers in the weights of the newest checkpoint that is whole, of which none is read."""
    for step in reversed(checkpoint.steps(folder)):
        try:
            shapes = checkpoint.stored_shapes(checkpoint.step_folder(folder, step))
        except (OSError, ValueError):
            continue
        return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS))
    return None


def _pictures(folder: Path, run: Run) -> Iterator[Picture]:
    """The newest of each figure, those of scripts/evaluate.py before those of training at the same step."""
    named = [key for key in (split(key)[0] for key in run.values) if key]
    evals = run.config.get("evals")
    named += [f"eval/{name}" for name in (evals if isinstance(evals, dict) else {})]
    prefixes = {f"{name.removeprefix('eval/').replace('/', '_')}_": name for name in dict.fromkeys(named)}
    last = {split(key)[0]: row["step"] for row in run.rows for key in row}
    newest: dict[tuple[str, str], Picture] = {}
    steps: list[tuple[int | None, Path]] = [(None, folder / FIGURES), *_steps(folder)]
    for step, place in steps:
        for path in sorted(place.glob("*.png")):
            prefix = max((known for known in prefixes if path.stem.startswith(known)), key=len, default="")
            evaluation, figure = prefixes.get(prefix, ""), path.stem.removeprefix(prefix)
            if evaluation == "" and figure == TRAINING_CURVES:
                continue  # a report draws the curves of all runs itself
            taken = last.get(evaluation) if step is None else step
            before = newest.get((evaluation, figure))
            if before is None or before.step is None or (taken is not None and taken >= before.step):
                newest[evaluation, figure] = Picture(evaluation, figure, taken, path)
    yield from newest.values()

"""Training curves of several runs in one picture for each metric, in coordinates that a page draws as SVG."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from multimodal.report.folders import Run, Value, number, split
from multimodal.report.numbers import amount, is_share, plain
from multimodal.report.results import CHANCE, OF_CHANCE

SIDE = 1000
"""Of the square that a curve is drawn in; the page stretches it."""
MOST_POINTS = 400
"""Of one curve."""
ALL_POINTS = 60_000
"""Of all curves of a page."""
LOSS = "train/loss"
TINY = 1e-290
"""Differences below are none: no axis could be divided."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One run's values of a metric."""

    run: int
    points: list[Point]
    """As in the files."""
    path: str
    """As an SVG path in a square of SIDE."""
    last: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent of its length from the lower end."""

    place: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One metric."""

    key: str
    unit: str
    scale: float
    """What values are multiplied by where they are written."""
    curves: list[Curve]
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    chance: float | None
    """Where guessing is, in percent of the height."""
    marked: bool
    """Whether each point is shown: an evaluation's are few."""


@dataclass(frozen=True)
class Curves:
    """All panels: the loss, evaluations, and the rest; and what never changed."""

    axis: str
    loss: list[Panel]
    evaluations: list[Panel]
    others: list[Panel]
    constant: list[tuple[str, str]]


def curves(runs: Sequence[Run]) -> Curves:
    """Every metric that at least one run has logged, over steps; over samples where runs have other batch sizes."""
    sizes = {repr(run.config.get("global_batch_size")) for run in runs if run.rows}
    axis = "steps" if len(sizes) < 2 else "samples"
    keys = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if "/" in key))
    most = max(20, min(MOST_POINTS, ALL_POINTS // max(1, len(keys) * len(runs))))
    found: list[Panel] = []
    constant: list[tuple[str, str]] = []
    for key in keys:
        evaluation, metric = split(key)
        if evaluation and metric == CHANCE:
            continue
        lines = [list(_points(run, key, axis.removesuffix("s") if axis == "steps" else axis)) for run in runs]
        values = {value for points in lines for _, value in points}
        if not evaluation and len(values) == 1 and sum(map(len, lines)) > len(runs):
            constant.append((key, plain(values.pop())))
        elif values:
            found.append(_panel(key, [_thinned(points, most) for points in lines], _chance(key, runs)))
    return Curves(
        axis,
        [panel for panel in found if panel.key == LOSS],
        [panel for panel in found if split(panel.key)[0]],
        [panel for panel in found if panel.key != LOSS and not split(panel.key)[0]],
        constant,
    )


def _points(run: Run, key: str, axis: str) -> Iterator[Point]:
    for row in run.rows:
        x, y = number(row.get(axis)), number(row.get(key))
        if x is not None and y is not None:
            yield x, y


def _chance(key: str, runs: Sequence[Run]) -> float | None:
    evaluation, metric = split(key)
    told = [run.values[key].chance for run in runs if key in run.values]
    if metric in OF_CHANCE:
        told += [run.values[f"{evaluation}/{CHANCE}"].value for run in runs if f"{evaluation}/{CHANCE}" in run.values]
    return next((value for value in told if value is not None), None)


def _thinned(points: list[Point], most: int) -> list[Point]:
    """At most so many of the points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    num_stretches = max(1, (most - 2) // 2)
    inner, kept = points[1:-1], [points[0]]
    for index in range(num_stretches):
        stretch = inner[index * len(inner) // num_stretches : (index + 1) * len(inner) // num_stretches]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def _panel(key: str, lines: list[list[Point]], chance: float | None) -> Panel:
    evaluation, metric = split(key)
    share = (
        is_share(metric, [Value(y, 0, chance=chance) for points in lines for _, y in points]) if evaluation else False
    )
    scale = 100 if share else 1
    values = [y for points in lines for _, y in points] + ([] if chance is None else [chance])
    x, x_ticks = _axis(0, max(x for points in lines for x, _ in points), 1)
    y, y_ticks = _axis(min(values), max(values), scale)
    return Panel(
        key,
        "%" if share else "",
        scale,
        [
            Curve(index, points, _path(points, x, y), amount(points[-1][1], share))
            for index, points in enumerate(lines)
            if points
        ],
        x,
        y,
        x_ticks,
        y_ticks,
        None if chance is None else 100 * (chance - y[0]) / (y[1] - y[0]),
        marked=bool(evaluation) or max(map(len, lines)) == 1,
    )


def _path(points: list[Point], x: tuple[float, float], y: tuple[float, float]) -> str:
    places = (f"{SIDE * (px - x[0]) / (x[1] - x[0]):.0f} {SIDE * (y[1] - py) / (y[1] - y[0]):.0f}" for px, py in points)
    return "M" + "L".join(places)


def _axis(low: float, high: float, scale: float) -> tuple[tuple[float, float], list[Tick]]:
    """The ends of an axis, a little beyond the values, and round places on it."""
    if high - low < TINY:
        pad = abs(low) if abs(low) > TINY else 1.0
        low, high = (low - pad / 2, high + pad / 2) if low else (0.0, pad)
    first = low if low == 0 else low - 0.04 * (high - low)
    if low >= 0:
        first = max(0.0, first)
    last = high + 0.04 * (high - low)
    step = _round_step((last - first) * scale / 5)
    ticks = []
    for index in range(math.ceil(first * scale / step - 1e-9), math.floor(last * scale / step + 1e-9) + 1):
        value = index * step
        ticks.append(Tick(round(100 * (value / scale - first) / (last - first), 2), _tick(value)))
    return (first, last), ticks


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / rough)))


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"

"""A comparison as tables: for a page, as Markdown, as rows of CSV."""

from collections.abc import Iterable, Iterator, Sequence

from multimodal.comparison.groups import FACTS, Compared, shared
from multimodal.comparison.pairs import Tested, all_pairs, chosen, performed
from multimodal.comparison.statistics import FEWEST, NAMES, Kind, Spread, spread
from multimodal.report.numbers import NONE, amount
from multimodal.report.overview import Fact, differences
from multimodal.report.page import Grid, Section
from multimodal.report.pictures import Shown

TITLE = "Groups"
NOTE = "Mean ± standard deviation over seeds (their number); no deviation where it is 0, or of one run."


def spreads(compared: Compared, key: str) -> list[Spread | None]:
    """Of a metric in each group; None where no run has it."""
    found = [list(group.values(key).values()) for group in compared.groups]
    return [spread(values) if values else None for values in found]


def section(
    compared: Compared,
    keys: Sequence[str] = (),  # of metrics; the main ones if there are none
    tests: Sequence[Tested] | None = None,  # of groups in these; all pairs if None
    kind: Kind = "t",
    picture: Shown | None = None,
    caption: str = "",
) -> Section:
    """What there is to see of groups."""
    keys = list(keys) or chosen(compared, ())
    tests = all_pairs(compared, keys, kind) if tests is None else tests
    grids = [*results(compared, keys), *_tests(compared, tests, kind), _runs(compared)]
    text = "Runs that differ in nothing but their seed, and in where and how fast they ran, are one group."
    return Section(TITLE, text, grids, picture, caption)


def _runs(compared: Compared) -> Grid:
    rows = []
    for group in compared.groups:
        seeds = ", ".join(map(str, group.seeds)) if group.settings else NONE
        rows.append([Fact(group.name, group.name), Fact(", ".join(run.name for run in group.runs)), Fact(seeds)])
    left_out = "; ".join(f"{name}: {why}" for name, why in compared.left_out)
    return Grid("Runs", ["group", "runs", "seeds"], rows, f"Not compared: {left_out}." if left_out else "")


def results(compared: Compared, keys: Sequence[str]) -> list[Grid]:
    """The settings that differ, and the metrics.

    Many groups that differ in little, such as those of a grid, have a line each, in the order of these settings. A few
    groups that differ in much have a column each.
    """
    found = differences([group.settings for group in compared.groups])
    facts = [key for key in compared.keys if key in FACTS and key not in keys]
    metrics = [_metric(compared, key) for key in [*keys, *facts]]
    settings = [[Fact(one.path, one.path), *one.values] for one in found]
    if len(found) < len(compared.groups):
        names = [Fact("group"), *(Fact(group.name, group.name) for group in compared.groups)]
        first, *rows = [list(row) for row in zip(names, *settings, *metrics, strict=True)]
        rows.sort(key=lambda row: [_order(fact) for fact in row[1 : 1 + len(settings)]])
        return [Grid("Settings and metrics", [fact.text for fact in first], rows, NOTE)]
    heads = [group.name for group in compared.groups]
    return [
        Grid("Settings that differ", ["setting", *heads], settings),
        Grid("Metrics", ["metric", *heads], metrics, NOTE),
    ]


def _order(setting: Fact) -> tuple[bool, float, str]:
    """Numbers by size, then all else by what it says."""
    size = setting.sort if isinstance(setting.sort, int | float) else None
    return (size is None, size or 0.0, setting.text)


def _metric(compared: Compared, key: str) -> list[Fact]:
    """Its name, and its value in each group."""
    share = shared(key, compared.groups)
    cells = [Fact(told(one, share), None if one is None else one.mean) for one in spreads(compared, key)]
    return [Fact(f"{key} %" if share else key, key), *cells]


def told(one: Spread | None, share: bool) -> str:
    """Such as "90.9 ± 0.4 (3)"; without the deviation where all are the same."""
    if one is None:
        return NONE
    deviation = f" ± {amount(one.std, share)}" if one.std else ""
    return f"{amount(one.mean, share)}{deviation}{'' if one.std is None else f' ({one.count})'}"


def _tests(compared: Compared, tests: Sequence[Tested], kind: Kind) -> Iterator[Grid]:
    rows = [
        [
            Fact(test.key, test.key),
            Fact(test.first.name, test.first.name),
            Fact(test.second.name, test.second.name),
            _difference(compared, test),
            Fact(str(test.found.pairs), test.found.pairs),
            _p(test.found.p),
            _p(test.corrected),
        ]
        for test in performed(tests)
    ]
    if not rows:
        return
    heads = ["metric", "group", "against", "difference", "pairs", "p", "p corrected"]
    note = (
        f"{NAMES[kind].capitalize()}, two-sided, over the seeds that both groups have, if these are {FEWEST} or more; "
        f"the difference is that of the second group to the first. Corrected for their number, {len(rows)} (Holm)."
    )
    yield Grid("Tests", heads, rows, note)


def _difference(compared: Compared, test: Tested) -> Fact:
    value, share = test.found.difference, shared(test.key, compared.groups)
    return Fact(f"{'+' if value > 0 else ''}{amount(value, share)}{' points' if share else ''}", value)


def _p(value: float | None) -> Fact:
    return Fact(NONE) if value is None else Fact("<0.0001" if value < 1e-4 else f"{value:.4f}", value)


# --- files ----------------------------------------------------------------------------------------------------------


def markdown(shown: Section) -> str:
    """The same as text."""
    parts = [f"# {shown.title}", shown.text]
    for grid in shown.grids:
        rows = [grid.heads, ["---"] * len(grid.heads), *([fact.text for fact in row] for row in grid.rows)]
        parts += [f"## {grid.title}", "\n".join(_line(row) for row in rows), grid.note]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


Rows = list[list[object]]


def csvs(compared: Compared, tests: Sequence[Tested], kind: Kind) -> dict[str, Rows]:
    """Tables by name, with heads: every metric, in full precision; settings that differ; tests."""
    metrics: Rows = [["group", "metric", "mean", "std", "runs"]]
    for key in compared.keys:
        for group, one in zip(compared.groups, spreads(compared, key), strict=True):
            if one is not None:
                metrics.append([group.name, key, one.mean, one.std, one.count])
    found = differences([group.settings for group in compared.groups])
    settings: Rows = [["setting", *(group.name for group in compared.groups)]]
    settings += [[one.path, *(value.whole or value.text for value in one.values)] for one in found]
    rows: Rows = [["metric", "group", "against", "difference", "pairs", "test", "p", "p_corrected"]]
    for test in tests:
        made = test.found
        names = [test.key, test.first.name, test.second.name]
        rows.append(
            [*names, made.difference, made.pairs, None if made.p is None else NAMES[kind], made.p, test.corrected]
        )
    return {"metrics": metrics, "settings": settings, "tests": rows}

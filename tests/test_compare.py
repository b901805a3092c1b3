"""The laws of a comparison: seeds make groups, tests are over shared seeds, and nothing is left out silently."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import composed_of, config_of, run_program
from report_runs import evaluated, rows, shifted, trained
from scipy import stats

from multimodal.comparison import pareto, tables
from multimodal.comparison.groups import compared, direction
from multimodal.comparison.pairs import all_pairs, chosen
from multimodal.comparison.statistics import holm, paired, spread
from multimodal.config import ConfigError
from multimodal.report import folders, page


def two_groups(root: Path, seeds: int = 4) -> list[Path]:
    """Runs of two learning rates; the second is better by a little more than seeds differ."""
    places = []
    for lr, gain in ((0.001, -0.06), (0.003, -0.01)):
        for seed in range(1, seeds + 1):
            config = {"seed": seed, "optimizer": {"_target_": "multimodal.optim.AdamW", "lr": lr}}
            name = f"x-lr={lr}-seed={seed}"
            results = shifted(gain + 0.01 * (seed % 3) + 0.02 * (seed % 2) * (lr > 0.002))
            places.append(evaluated(trained(root / name, config, rows(seed=seed)), results))
    return places


def found(*places: Path) -> Any:
    return compared(folders.read(places))


# --- groups ---------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_and_operational_settings_only_are_one_group(tmp_path: Path, compose: Any) -> None:
    import yaml

    def run(name: str, *overrides: str) -> folders.Run:
        raw = compose(f"run.name='{name}'", "checkpoint.best=null", *overrides)
        place = trained(tmp_path / name)
        (place / "config.yaml").write_text(yaml.safe_dump(raw))
        return folders.read_run(place, name)

    runs = [
        run("a-seed=1"),
        run("a-seed=2", "seed=2", "workers=3", "tracker=none", "log.every=7steps", "evals=[]", "micro_batch_size=8"),
        run("b", "optimizer.lr=0.01"),
        run("longer", "duration=1000steps"),
    ]
    groups = compared(runs).groups
    assert [(group.name, group.seeds) for group in groups] == [("a", [1, 2]), ("b", [1]), ("longer", [1])]
    (grid,) = tables.results(compared(runs), [])
    assert set(grid.heads[1:3]) == {"optimizer.lr", "duration"}
    few, metrics = tables.results(compared([runs[2], run("other", "optimizer.lr=0.02", "duration=10steps")]), [])
    assert {row[0].text for row in few.rows} == {"optimizer.lr", "duration"}
    assert metrics.heads == ["metric", "b", "other"]


def test_many_groups_that_differ_in_little_have_a_line_each_in_the_order_of_their_settings(
    tmp_path: Path, compose: Any
) -> None:
    import yaml

    runs = []
    for lr, seed in [(0.01, 1), (0.002, 1), (0.002, 2), (0.1, 1)]:
        place = evaluated(trained(tmp_path / f"lr={lr}-seed={seed}"))
        (place / "config.yaml").write_text(yaml.safe_dump(compose(f"optimizer.lr={lr}", f"seed={seed}")))
        runs.append(folders.read_run(place, place.name))
    told = compared(runs)
    (grid,) = tables.results(told, ["eval/shapes/top1"])
    assert grid.heads[:3] == ["group", "optimizer.lr", "eval/shapes/top1 %"]
    assert [row[1].text for row in grid.rows] == ["0.002", "0.01", "0.1"]
    assert [row[0].text for row in grid.rows] == ["lr=0.002", "lr=0.01-seed=1", "lr=0.1-seed=1"]
    one, other = (tables.spreads(told, "eval/shapes/top1")[index] for index in (0, 1))
    assert [row[2].text for row in grid.rows[1::-1]] == [tables.told(one, True), tables.told(other, True)]


def test_what_was_measured_on_other_data_is_not_compared(tmp_path: Path) -> None:
    places = two_groups(tmp_path, seeds=3)
    keys = found(*places).keys
    results = next(places[0].glob("**/results.json"))
    numbers = json.loads(results.read_text())
    numbers["eval/shapes/top1"]["count"] += 1
    results.write_text(json.dumps(numbers))
    told = found(*places)
    assert told.unlike == {"eval/shapes/top1"}
    assert told.keys == [key for key in keys if key != "eval/shapes/top1"]
    assert "eval/shapes/top1" not in chosen(told, [])


def test_a_run_that_stopped_early_has_come_to_its_end(tmp_path: Path) -> None:
    places = two_groups(tmp_path, seeds=2)
    (places[0] / "summary.json").write_text('{"status": "stopped early"}')
    assert not found(*places).left_out


def test_what_is_not_compared_is_told_by_name_and_the_others_are(tmp_path: Path) -> None:
    places = two_groups(tmp_path)
    for name in ("damaged", "stopped", "twin"):
        places.append(evaluated(trained(tmp_path / name, {"seed": 9})))
    (tmp_path / "damaged" / "config.yaml").write_text("{")
    (tmp_path / "stopped" / "summary.json").write_text('{"status": "stopped"}')
    (tmp_path / "twin" / "config.yaml").write_text((places[0] / "config.yaml").read_text())
    told = found(*places)
    assert [len(group.runs) for group in told.groups] == [4, 4]
    assert dict(told.left_out) == {
        "damaged": "its config.yaml is missing or damaged",
        "stopped": "is not finished: stopped, step 60",
        "twin": f"has the settings and the seed of {places[0].name}, which stands for both",
    }
    assert "damaged: its config.yaml" in tables.markdown(tables.section(told))


def test_a_model_that_was_only_evaluated_is_a_group_that_is_not_tested(tmp_path: Path) -> None:
    told = found(*two_groups(tmp_path), evaluated(tmp_path / "ViT-B-32", step=0))
    assert [group.name for group in told.groups][-1] == "ViT-B-32"
    assert all("ViT-B-32" not in (test.first.name, test.second.name) for test in all_pairs(told, chosen(told, ())))


# --- statistics -----------------------------------------------------------------------------------------------------


def test_tests_are_over_the_seeds_that_both_have_and_equal_scipy_s() -> None:
    rng = np.random.default_rng(0)
    first, second = {s: rng.normal() for s in range(7)}, {s: rng.normal() + 0.3 for s in range(2, 9)}
    shared = range(2, 7)
    told = paired(first, second)
    reference = stats.ttest_rel([second[s] for s in shared], [first[s] for s in shared])
    assert told is not None
    assert (told.pairs, told.p) == (5, pytest.approx(reference.pvalue))
    assert told.difference == pytest.approx(np.mean([second[s] - first[s] for s in shared]))
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1)
    differences = np.array([second[s] - first[s] for s in shared])
    means = np.abs(differences @ signs)
    exact = paired(first, second, "permutation")
    assert exact is not None
    assert exact.p == pytest.approx((means >= abs(differences.sum()) - 1e-12).mean())


@pytest.mark.parametrize(
    ("first", "second", "pairs", "p"),
    [
        ({1: 0.1}, {2: 0.2}, None, None),
        ({1: 0.1, 2: 0.2}, {1: 0.3, 2: 0.1}, 2, None),  # too few
        ({1: 0.1, 2: 0.2, 3: 0.3}, {1: 0.1, 2: 0.2, 3: 0.3}, 3, 1.0),
        ({1: 0.25, 2: 0.5, 3: 0.75}, {1: 0.5, 2: 0.75, 3: 1.0}, 3, None),  # no spread to hold the difference against
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_tell_by(
    first: dict[int, float], second: dict[int, float], pairs: int | None, p: float | None
) -> None:
    told = paired(first, second)
    assert (told and told.pairs, told and told.p) == (pairs, p)


def test_among_groups_of_one_distribution_five_percent_of_tests_alarm() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(1000, 2, 5))
    alarms = [paired(dict(enumerate(a)), dict(enumerate(b))).p < 0.05 for a, b in draws]  # type: ignore[union-attr]
    assert 0.03 < np.mean(alarms) < 0.07


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, corrected, strict=True))
    level, rejected = 0.05, set()
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[place] * (len(ps) - rank) > level:
            break
        rejected.add(place)
    assert rejected == {place for place, q in enumerate(corrected) if q <= level}


def test_a_spread_is_the_sample_s() -> None:
    assert spread([1.0, 2.0, 4.0]).std == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert spread([1.0]).std is None


# --- the front ------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS, st.sampled_from([(-1, 1), (1, 1), (-1, -1)]))
def test_nothing_beats_what_is_on_the_front_and_something_on_it_beats_all_else(
    points: list[tuple[int, int]], better: tuple[int, int]
) -> None:
    on = pareto.front(points, better)
    turned = [(better[0] * x, better[1] * y) for x, y in points]
    best = [point for point, is_on in zip(turned, on, strict=True) if is_on]
    assert best
    for point, is_on in zip(turned, on, strict=True):
        over = [(x, y) for x, y in best if x >= point[0] and y >= point[1] and (x, y) != point]
        assert is_on == (not over)


# --- what is shown --------------------------------------------------------------------------------------------------


def test_tables_say_mean_and_spread_and_the_test_with_its_pairs(tmp_path: Path) -> None:
    told = found(*two_groups(tmp_path))
    keys = ["eval/shapes/top1"]
    text = tables.markdown(tables.section(told, keys))
    values = [0.8491 + shift for shift in (0.01, 0.02, 0.0, 0.01)]
    assert f"| {100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} (4) |" in text
    (test,) = all_pairs(told, keys)
    assert f"| +6.0 points | 4 | {test.found.p:.4f} |" in text
    assert "Paired t-test" in text
    assert direction("eval/shapes/top1", told.groups) == 1


def test_the_page_of_a_report_shows_groups(tmp_path: Path) -> None:
    runs = folders.read(two_groups(tmp_path))
    text = page.render(runs, sections=[tables.section(compared(runs))])
    assert 'id="groups"' in text
    assert "± 0.8 (4)" in text
    assert 'id="groups"' not in page.render(runs)


def test_the_program_writes_what_it_found(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    two_groups(runs)
    (runs / "foreign").mkdir()
    run_program("compare", f"runs=['{runs}/*']", f"paths.runs={runs}", "x=samples", "y=eval/shapes/top1")
    files = {path.name for path in runs.iterdir() if path.is_file()}
    tables_of = {f"comparison-{name}.csv" for name in ("metrics", "settings", "tests")}
    assert files == {"comparison.md", "comparison.html", "comparison-pareto.png", *tables_of}
    assert "foreign: is no run" in (runs / "comparison.md").read_text()
    with (runs / "comparison-metrics.csv").open() as file:
        metrics = {(row["group"], row["metric"]): row for row in csv.DictReader(file)}
    values = [
        json.loads(p.read_text())["eval/shapes/top1"]["value"] for p in sorted(runs.glob("x-lr=0.001*/**/results.json"))
    ]
    row = metrics["x-lr=0.001", "eval/shapes/top1"]
    assert float(row["mean"]) == pytest.approx(np.mean(values))
    assert (float(row["std"]), row["runs"]) == (pytest.approx(np.std(values, ddof=1)), "4")


def test_the_number_of_tests_is_that_which_p_is_corrected_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in two_groups(tmp_path):
        results = next(place.glob("**/results.json"))
        numbers = json.loads(results.read_text())
        if not place.name.endswith(("seed=1", "seed=2")):  # too few seeds to test
            del numbers["eval/flickr8k/t2i_r1"]
        results.write_text(json.dumps(numbers))
    with caplog.at_level("INFO"):
        run_program("compare", f"paths.runs={tmp_path}", "runs=['x-*']", "metrics=['eval/*']")
    with (tmp_path / "comparison-tests.csv").open() as file:
        tests = list(csv.DictReader(file))
    done = [row for row in tests if row["p"]]
    assert 1 < len(done) < len(tests)
    assert f"groups: 2, {len(done)} tests (" in caplog.text
    assert f"Corrected for their number, {len(done)} (Holm)" in (tmp_path / "comparison.md").read_text()
    least = min(done, key=lambda row: float(row["p"]))
    assert float(least["p_corrected"]) == pytest.approx(min(1, len(done) * float(least["p"])))


def test_what_is_drawn_is_in_the_table_and_no_tests_have_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_groups(tmp_path, seeds=1)
    words = ["metrics=[train/loss]", "x=samples", "x_better=less", "y=eval/shapes/top1"]
    with caplog.at_level("INFO"):
        run_program("compare", f"paths.runs={tmp_path}", "runs=['*']", *words)
    assert "eval/shapes/top1 %" in (tmp_path / "comparison.md").read_text()
    assert "no tests: no two groups share 3 seeds" in caplog.text


def test_a_front_of_which_no_group_has_both_is_refused(tmp_path: Path) -> None:
    for place, metric in zip(two_groups(tmp_path, seeds=1), ("top1", "top5"), strict=True):
        results = next(place.glob("**/results.json"))
        numbers = json.loads(results.read_text())
        results.write_text(json.dumps({key: one for key, one in numbers.items() if not key.endswith(metric)}))
        (place / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no group of runs has both eval/shapes/top5 and eval/shapes/top1"):
        run_program("compare", f"paths.runs={tmp_path}", "runs=['*']", "x=eval/shapes/top5", "y=eval/shapes/top1")


def test_mistakes_are_told_together(tmp_path: Path) -> None:
    two_groups(tmp_path)
    words = [f"paths.runs={tmp_path}", "runs=['*']", "metrics=[eval/shapes/top2]", "baseline='x-lr=0.002'"]
    with pytest.raises(ConfigError) as caught:
        run_program("compare", *words, "y=eval/geometry/gap", "x=params")
    assert [path for path, _ in caught.value.problems] == ["metrics", "baseline", "x", "y_better"]
    assert "Did you mean" in str(caught.value)


def test_the_yaml_says_every_field_and_no_other() -> None:
    assert composed_of("compare").keys() == config_of("compare").model_fields.keys()

"""The laws of scaling: a law comes back from its points, within its intervals; what is foretold stays written."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import composed_of, config_of, run_program
from report_runs import trained

from multimodal.comparison.groups import compared
from multimodal.config import ConfigError, RunError
from multimodal.hardware import Hardware
from multimodal.report import folders
from multimodal.scaling.fit import Law, fit
from multimodal.scaling.points import complement, flops_per_sample, planned_size, points

SIZES = np.geomspace(1e3, 1e6, 8)


@settings(max_examples=15, deadline=None)
@given(
    st.just(0.0) | st.floats(0.01, 0.4), st.floats(0.5, 30), st.floats(0.15, 0.9), st.sampled_from([1e-3, 1.0, 1e12])
)
def test_a_law_comes_back_from_its_points_in_any_unit(a: float, b: float, c: float, unit: float) -> None:
    found = fit(SIZES * unit, a + b * SIZES**-c, resamples=1).law
    assert found.a == pytest.approx(a, rel=1e-2, abs=2e-3)
    assert found.c == pytest.approx(c, rel=1e-2)
    np.testing.assert_allclose(found(SIZES * unit), a + b * SIZES**-c, rtol=1e-3)


def test_intervals_hold_what_noise_hid_and_so_do_those_of_one_more_run() -> None:
    hits = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        law = Law(rng.uniform(0.05, 0.3), rng.uniform(0, 3), rng.uniform(0.15, 0.5))
        found = fit(SIZES, law(SIZES) * np.exp(rng.normal(scale=0.01, size=len(SIZES))), 60, seed)
        spans = [*found.intervals.values(), found.foretold(1e7)[1:]]
        truth = (law.a, law.log_b, law.c, law(1e7) * np.exp(rng.normal(scale=0.01)))
        hits.append([low <= value <= high for (low, high), value in zip(spans, truth, strict=True)])
        assert found.law.a >= 0
        assert all(low <= high for low, high in spans)
    assert (np.mean(hits, axis=0) >= 0.6).all()  # of many 95%; these are few
    assert np.mean(hits) > 0.8


def test_one_point_that_is_far_off_moves_the_law_little() -> None:
    clean = 0.1 + 3 * SIZES**-0.3
    off = clean.copy()
    off[3] *= 1.3
    found = fit(SIZES, off, resamples=1).law
    assert np.abs(np.log(found(SIZES) / clean)).max() < 0.02


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [0.02, 0.3, 3.0])
def test_scattered_errors_overflow_nothing(steps: float) -> None:
    sizes = 1e13 * np.exp(steps * np.arange(5).repeat(3))
    errors = [0.34, 0.417, 0.367, 0.333, 0.33, 0.383, 0.272, 0.25, 0.285, 0.255, 0.28, 0.262, 0.207, 0.204, 0.2]
    assert 0 <= fit(sizes, np.array(errors), 100, 0).foretold(2 * sizes[-1])[0] < 1


def test_the_same_seed_gives_the_same_intervals() -> None:
    error = (0.1 + 3 * SIZES**-0.3) * np.exp(np.random.default_rng(0).normal(scale=0.01, size=len(SIZES)))
    first, second = fit(SIZES, error, 20, 3), fit(SIZES, error, 20, 3)
    assert (first.intervals, first.foretold(1e8)) == (second.intervals, second.foretold(1e8))


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1, 2, 3], [3, 2, 1], "3 sizes: a law of three numbers wants 4"),
        ([1, 1, 2, 2, 3, 3], [3, 3, 2, 2, 1, 1], "3 sizes"),
        ([1, 2, 3, 4], [3, 2, 1, 0], "no logarithm"),
    ],
)
def test_too_few_sizes_and_no_error_at_all_are_refused(x: list[float], error: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit(np.array(x, dtype=float), np.array(error, dtype=float))


# --- of runs --------------------------------------------------------------------------------------------------------


def sized(root: Path, raw: Callable[[int], dict[str, Any]], count: int = 5) -> list[Path]:
    """Runs that follow a law of the samples they have seen, in top-1."""
    places = []
    for index in range(count):
        samples = 16_000 * 4**index
        row = {"step": samples // 16, "samples": samples, "train/loss": 4 - 0.3 * index}
        row["eval/shapes/top1"] = 1 - (0.05 + 20 * samples**-0.4)
        place = trained(root / f"size{index}", log=[row])
        (place / "config.yaml").write_text(yaml.safe_dump(raw(samples)))
        places.append(place)
    return places


@pytest.fixture
def tiny(tiny_raw: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    return lambda samples: {**tiny_raw, "duration": f"{samples}samples"}


def h100() -> Hardware:
    return Hardware.model_validate(composed_of("scaling")["hardware"])


def test_flops_of_a_run_are_those_of_its_plan(tmp_path: Path, tiny: Callable[[int], dict[str, Any]]) -> None:
    found = compared(folders.read(sized(tmp_path, tiny, 1)))
    made, left_out = points(found, "eval/shapes/top1", "flops", h100())
    each = flops_per_sample({**tiny(16_000), "micro_batch_size": 4}, h100())
    assert [point.x for point in made] == [each * 16_000]
    assert left_out == []
    plan = {"whole_batch_flops": each, "time": {"samples": 100}, "num_parameters": {"total": 7}}
    assert [planned_size(plan, axis) for axis in ("flops", "samples", "parameters")] == [100 * each, 100, 7]


def test_what_a_run_does_not_say_is_told(tmp_path: Path, tiny: Callable[[int], dict[str, Any]]) -> None:
    found = compared(folders.read(sized(tmp_path, tiny, 2)))
    made, left_out = points(found, "eval/shapes/top1", "parameters", h100())
    assert made == []
    assert dict(left_out) == dict.fromkeys(("size0", "size1"), "does not say its parameters")
    assert not complement("train/loss", found)
    with pytest.raises(ValueError, match="Did you mean 'train/loss'"):
        complement("train/los", found)


def test_runs_that_determine_no_law_are_told(
    tmp_path: Path, tiny: Callable[[int], dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    sized(tmp_path, tiny)
    words = ["runs=['*']", f"paths.runs={tmp_path}", "metric=eval/shapes/top1", "x=samples", "resamples=20"]
    run_program("scaling", *words)
    assert "do not determine a law" not in caplog.text
    for place, top1 in zip(sorted(tmp_path.glob("size*")), [0.5, 0.2, 0.6, 0.1, 0.4], strict=True):
        for file in (place / "metrics.jsonl", *place.glob("**/results.json")):
            file.write_text(re.sub(r'("eval/shapes/top1": (?:{"value": )?)[\d.]+', rf"\g<1>{top1}", file.read_text()))
    run_program("scaling", *words)
    assert "do not determine a law" in caplog.text


def test_the_program_fits_draws_and_foretells_and_what_it_foretold_stays(
    tmp_path: Path, tiny: Callable[[int], dict[str, Any]]
) -> None:
    sized(tmp_path, tiny)
    time = {"samples": 16_000 * 4**6, "gpu_hours": 12.5, "hours": 12.5, "dollars": 40.0}
    plan = {"whole_batch_flops": 1e6, "time": time, "num_parameters": {"total": 7}, "hardware": "H100", "num_gpus": 1}
    (tmp_path / "big.json").write_text(json.dumps(plan))
    words = ["runs=['*']", f"paths.runs={tmp_path}", "metric=eval/shapes/top1", "x=samples", "resamples=20"]
    run_program("scaling", *words, f"plans=['{tmp_path}/big.json']", "at=[1e9]")
    law = json.loads((tmp_path / "scaling.json").read_text())
    assert law["a"]["value"] == pytest.approx(0.05, abs=1e-3)
    assert law["b"]["value"] == pytest.approx(20, rel=0.02)
    assert law["c"]["value"] == pytest.approx(0.4, rel=0.01)
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["samples"]) for row in rows] == [16_000 * 4**index for index in range(5)]
    assert all(float(row["fitted"]) == pytest.approx(float(row["error"]), rel=1e-3) for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 1000

    before = (tmp_path / "scaling-foretold.jsonl").read_text()
    told = [json.loads(line) for line in before.splitlines()]
    big = next(one for one in told if one["plan"])
    assert big["error"] == pytest.approx(0.05 + 20 * (16_000 * 4**6) ** -0.4, rel=0.01)
    assert (big["beyond"], big["plan"]["dollars"], big["metric"]) == (16, 40.0, "eval/shapes/top1")
    assert big["value"] == pytest.approx(1 - big["error"])
    run_program("scaling", *words, "at=[1e9]")
    assert (tmp_path / "scaling-foretold.jsonl").read_text().startswith(before)


def test_a_law_of_parameters_wants_no_checkpoints_and_its_plans_no_time(
    tmp_path: Path, tiny: Callable[[int], dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for index, place in enumerate(sized(tmp_path, tiny)):
        summary = json.loads((place / "summary.json").read_text())
        told = {"num_parameters/image": 1, "num_parameters/total": 16_000 * 4**index}
        (place / "summary.json").write_text(json.dumps({**summary, **told}))
    whole = {"whole_batch_flops": 1e6, "num_parameters": {"total": 16_000 * 4**6}}
    (tmp_path / "null.json").write_text(json.dumps({**whole, "time": None}))
    (tmp_path / "none.json").write_text(json.dumps(whole))
    words = ["runs=['*']", f"paths.runs={tmp_path}", "metric=eval/shapes/top1", "resamples=20"]
    plans = f"plans=['{tmp_path}/null.json','{tmp_path}/none.json']"
    with caplog.at_level("INFO"):
        run_program("scaling", *words, plans, "x=parameters")
    law = json.loads((tmp_path / "scaling.json").read_text())
    assert law["c"]["value"] == pytest.approx(0.4, rel=0.01)
    assert [one["beyond"] for one in law["foretold"]] == [16, 16]
    assert len([line for line in caplog.messages if line.startswith("at ") and "gpu_hours" not in line]) == 2
    with pytest.raises(ConfigError) as caught:
        run_program("scaling", *words, plans, "x=samples")
    assert [path for path, _ in caught.value.problems] == ["plans", "plans"]
    assert "is no plan with a size in samples seen" in str(caught.value)


@pytest.mark.parametrize(
    "held", ["[]", "null", "{", '{"num_parameters": [1]}', '{"num_parameters": {"total": 1}, "time": [2]}']
)
def test_what_is_no_plan_is_told_as_such(tmp_path: Path, tiny: Callable[[int], dict[str, Any]], held: str) -> None:
    sized(tmp_path, tiny, 1)
    (tmp_path / "plan.json").write_text(held)
    words = ["runs=['*']", f"paths.runs={tmp_path}", "metric=eval/shapes/top1", "x=parameters"]
    with pytest.raises(ConfigError, match=r"plans: .*plan\.json: "):
        run_program("scaling", *words, f"plans=['{tmp_path}/plan.json']")


def test_mistakes_are_told_together_and_too_few_runs_by_themselves(
    tmp_path: Path, tiny: Callable[[int], dict[str, Any]]
) -> None:
    sized(tmp_path, tiny, 3)
    words = ["runs=['*']", f"paths.runs={tmp_path}", "x=samples"]
    with pytest.raises(ConfigError) as caught:
        run_program("scaling", *words, "metric=eval/shapes/top2", "plans=[nowhere.json]")
    assert [path for path, _ in caught.value.problems] == ["plans", "metric"]
    with pytest.raises(RunError, match="3 runs of 3 sizes: a law of three numbers wants 4 or more"):
        run_program("scaling", *words, "metric=eval/shapes/top1")


def test_the_yaml_says_every_field_and_no_other() -> None:
    assert composed_of("scaling").keys() == config_of("scaling").model_fields.keys()

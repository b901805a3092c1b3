"""The laws of a report: it says what the files say, whatever is missing, in one small file."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import RESULTS, evaluated, picture, rows, shifted, three, trained

from multimodal.cli import _gathered
from multimodal.report import curves, folders, numbers, overview, page, pictures, results

ROOT = Path(__file__).parent.parent


def rendered(*runs: Path, limit: int = page.LIMIT) -> str:
    return page.render(folders.read(runs), limit)


def cells(text: str) -> list[str]:
    """The text of all cells of tables, headers aside."""
    found = re.findall(r"<td\b[^>]*>(.*?)</td>", text, re.S)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in found]


# --- numbers --------------------------------------------------------------------------------------------------------


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, dict | list):
        return set().union(*map(numbers_in, value.values() if isinstance(value, dict) else value))
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def test_every_number_in_a_table_is_in_the_files(tmp_path: Path) -> None:
    runs = three(tmp_path)
    known: set[float] = set()
    for path in [path for run in runs for path in run.rglob("*.json*")]:
        known |= set().union(*(numbers_in(json.loads(text)) for text in path.read_text().splitlines()))
    text = rendered(*runs)
    shown = re.findall(r"<table class=\"sortable results\">.*?</table>", text, re.S)
    tokens = [
        token for table in shown for cell in cells(table) for token in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", cell)
    ]
    assert len(tokens) > 40
    for token in tokens:
        value, digits = float(token.replace(",", "")), len(token.partition(".")[2])
        near = 0.5000001 * 10**-digits
        assert any(abs(value - number) <= near or abs(value - 100 * number) <= near for number in known), token


def test_every_result_in_the_files_is_on_the_page(tmp_path: Path) -> None:
    found = cells(rendered(*three(tmp_path)))
    for value in ("90.9 [89.6, 92.1]", "23.4 [21.0, 25.9]", "7 [6, 8.5]", "0.8123", "406.5", "1.25", "2,000", "813"):
        assert any(value in cell for cell in found), value
    assert "33.2" in found  # of the log only
    assert "34.2" in found


def test_a_value_is_the_newest_with_its_interval(tmp_path: Path) -> None:
    run = evaluated(trained(tmp_path / "a"), {"eval/old/top1": {**RESULTS["eval/shapes/top1"]}}, step=40)
    assert folders.read_run(run, "a").values["eval/old/top1"] == folders.Value(pytest.approx(0.3317), 60)
    evaluated(run, {"eval/old/top1": {"value": 0.3317, "low": 0.32, "high": 0.34, "chance": None, "count": 9}}, step=60)
    assert folders.read_run(run, "a").values["eval/old/top1"] == folders.Value(0.3317, 60, 0.32, 0.34, None, 9)
    evaluated(run, {"eval/old/top1": 0.5}, step=70)  # as it was written before intervals
    assert folders.read_run(run, "a").values["eval/old/top1"] == folders.Value(0.5, 70)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("top1", 0.90912, "90.9"),
        ("i2t_r10", 1.0, "100.0"),
        ("mean_per_class", 0.0, "0.0"),
        ("t2i_median_rank", 1.0, "1"),
        ("t2i_mean_rank", 12345.6, "12,346"),
        ("effective_rank", 0.5, "0.5"),
        ("gap", 0.81234, "0.8123"),
        ("spearman", 0.81234, "0.8123"),
        ("recall", None, numbers.NONE),
    ],
)
def test_fractions_are_in_percent_and_nothing_else_is(metric: str, value: float | None, text: str) -> None:
    assert numbers.amount(value, numbers.is_share(metric, [folders.Value(value, 1)])) == text


@given(st.floats(-1e300, 1e300))
def test_a_number_is_written_in_four_digits(value: float) -> None:
    assert float(numbers.plain(value).replace(",", "")) == pytest.approx(value, rel=1e-3)


def runs_with(*spans: tuple[float, float | None, float | None], metric: str = "top1") -> list[folders.Run]:
    key = f"eval/it/{metric}"
    return [folders.Run(str(i), values={key: folders.Value(v, 1, low, high)}) for i, (v, low, high) in enumerate(spans)]


@pytest.mark.parametrize(
    ("metric", "spans", "marks"),
    [
        ("top1", [(0.9, 0.88, 0.92), (0.8, 0.78, 0.82), (0.5, 0.4, 0.6)], ["best", "", ""]),
        ("top1", [(0.9, 0.88, 0.92), (0.87, 0.85, 0.89), (0.5, 0.4, 0.6)], ["tied", "tied", ""]),
        ("mean_rank", [(9.0, 8.0, 10.0), (5.0, 4.0, 6.0)], ["", "best"]),
        ("top1", [(0.9, 0.88, 0.92), (0.8, None, None)], ["", ""]),
        ("top1", [(0.9, 0.88, 0.92)], [""]),
        ("gap", [(0.9, 0.88, 0.92), (0.1, 0.05, 0.2)], ["", ""]),
    ],
)
def test_the_best_is_marked_where_no_other_interval_reaches_it(metric: str, spans: Any, marks: list[str]) -> None:
    (table,) = results.tables(runs_with(*spans, metric=metric))
    assert [cell.mark for cell in table.lines[0].cells if cell is not None] == marks


@pytest.mark.parametrize(("counts", "chances"), [((24, 5000), (0.1, 0.1)), ((50, 50), (0.1, 1 / 3))])
def test_no_value_is_the_best_of_what_was_measured_on_other_data(counts: Any, chances: Any) -> None:
    runs = [
        folders.Run(name, values={"eval/it/top1": folders.Value(value, 1, value - 0.01, value + 0.01, chance, count)})
        for name, value, count, chance in zip("ab", (0.9, 0.5), counts, chances, strict=True)
    ]
    (line,) = results.tables(runs)[0].lines
    assert [cell.mark for cell in line.cells if cell is not None] == ["", ""]
    assert not line.same


def test_main_numbers_begin_with_what_checkpoints_are_judged_by_and_what_most_runs_have() -> None:
    value = folders.Value(0.5, 1)
    keys = [["eval/few/top1", "eval/all/top1"], ["eval/own/top5", "eval/own/top1", "eval/all/top1"]]
    runs = [folders.Run(str(i), values=dict.fromkeys(found, value)) for i, found in enumerate(keys)]
    runs[1].config["checkpoint"] = {"best": "eval/own/top5"}
    assert overview.main_metrics(runs) == ["eval/own/top5", "eval/all/top1", "eval/few/top1", "eval/own/top1"]


def test_chance_of_older_evaluations_is_in_its_column(tmp_path: Path) -> None:
    (table,) = results.tables(folders.read([trained(tmp_path / "a")]))
    assert [(line.metric, line.chance) for line in table.lines] == [("top1", "25")]


def test_parameters_are_those_that_the_run_told_also_without_a_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "a"
    shutil.copytree(tiny_run, run)
    told = folders.read_run(run, "a").parameters
    assert told == json.loads((run / "summary.json").read_text())["num_parameters/total"]
    shutil.rmtree(run / "checkpoints")
    assert folders.read_run(run, "a").parameters == told
    (run / "summary.json").unlink()
    assert folders.read_run(run, "a").parameters is None
    shutil.copytree(tiny_run / "checkpoints", run / "checkpoints")
    assert folders.read_run(run, "a").parameters == told


def test_parameters_are_counted_without_loading_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    run = trained(tmp_path / "a")
    assert folders.read_run(run, "a").parameters is None
    place = run / "checkpoints" / "step-00000060"
    place.mkdir(parents=True)
    weights = {"x": torch.zeros(3, 5), "scale": torch.zeros(()), "norm.running_mean": torch.zeros(5)}
    save_file(weights, place / "model.safetensors")
    assert folders.read_run(run, "a").parameters == 16
    sound = (place / "model.safetensors").read_bytes()
    for lie in (b"[9,5]", b"[-3,5]", b'["x"]', b"[1e9]", b"{   }", b"[[3]]"):
        (place / "model.safetensors").write_bytes(sound.replace(b"[3,5]", lie.ljust(5)))
        assert folders.read_run(run, "a").parameters is None
    (place / "model.safetensors").write_bytes(b"nothing")
    assert folders.read_run(run, "a").parameters is None


# --- curves and configurations --------------------------------------------------------------------------------------


def test_curves_are_made_of_points_in_the_files_and_keep_the_extremes(tmp_path: Path) -> None:
    log = rows(5000)
    log[1234]["train/loss"], log[2345]["train/loss"] = 99.0, -99.0
    log[3456]["train/loss"] = None
    drawn = curves.curves(folders.read([trained(tmp_path / "a", log=log)]))
    points = drawn.loss[0].curves[0].points
    assert set(points) <= {(row["step"], row.get("train/loss")) for row in log}
    assert {99.0, -99.0} <= {value for _, value in points}
    assert len(points) <= curves.MOST_POINTS
    assert [panel.key for panel in drawn.evaluations] == ["eval/old/top1"]
    assert [panel.key for panel in drawn.others] == ["train/samples_per_s"]
    assert drawn.constant == [("train/broken_samples", "0")]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**7), st.floats(-1e12, 1e12) | st.sampled_from([0.0, 5e-324, 1e-300, -1e299, 1e299])
        ),
        min_size=1,
        max_size=20,
    ),
    st.booleans(),
)
def test_any_values_can_be_drawn(points: list[tuple[int, float]], share: bool) -> None:
    key = "eval/it/top1" if share else "train/loss"
    log = [{"step": step, "samples": step, key: value} for step, value in points]
    drawn = curves.curves([folders.Run("a", rows=log)])
    for panel in [*drawn.loss, *drawn.evaluations]:
        places = [float(word) for word in re.findall(r"-?[\d.]+", panel.curves[0].path)]
        assert all(0 <= place <= curves.SIDE for place in places)
        assert all(-0.01 <= tick.place <= 100.01 for tick in [*panel.x_ticks, *panel.y_ticks])
        assert len(panel.y_ticks) <= 12


def test_runs_of_other_batch_sizes_are_drawn_over_samples(tmp_path: Path) -> None:
    a, b = trained(tmp_path / "a"), trained(tmp_path / "b", {"global_batch_size": 64})
    assert curves.curves(folders.read([a])).axis == "steps"
    assert curves.curves(folders.read([a, b])).axis == "samples"


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    lion = {"_target_": "multimodal.optimizers.lion.Lion", "lr": 0.001, "betas": [0.9, 0.99]}
    extra = {"evals": {"more": {"_target_": "somewhere.Else", "every": "never"}}}
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b", {"seed": 2, "optimizer": lion, **extra})]
    told = overview.differences([run.config for run in folders.read([*runs, evaluated(tmp_path / "c")])])
    assert {line.path: [value.text for value in line.values] for line in told} == {
        "seed": ["1", "2", numbers.NONE],
        "optimizer": ["AdamW", "Lion", numbers.NONE],
        "evals.shapes": ["ZeroShot", numbers.NONE, numbers.NONE],
        "evals.old": ["0 settings", numbers.NONE, numbers.NONE],
        "evals.more": [numbers.NONE, "Else", numbers.NONE],
    }
    assert overview.differences([run.config for run in folders.read(runs[:1])]) == []


# --- what is missing, hostile or large ------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script><b title=\"'>&amp;{{ 7 * 7 }}"


def test_whatever_is_written_in_files_is_only_text(tmp_path: Path) -> None:
    config = {"seed": HOSTILE, HOSTILE: HOSTILE, "optimizer": {"_target_": HOSTILE}}
    log = [{"step": 10, "samples": 10, f"train/{HOSTILE}": 1.0, f"eval/{HOSTILE}/{HOSTILE}": 1.0, "train/loss": 2.0}]
    run = folders.read_run(trained(tmp_path / "a", config, log), HOSTILE)
    picture(tmp_path / "a" / "figures" / "old_<b>.png")
    other = folders.read_run(trained(tmp_path / "a", {}, log), "b")
    run.summary["status"] = HOSTILE
    text = page.render([replace(run, notes=(HOSTILE,)), other])
    assert HOSTILE not in text
    assert "<b>.png" not in text
    assert text.count("<script") == 2  # ours, and the points of curves
    assert "<b title" not in text
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "figures", "evaluations"])
def test_any_piece_of_a_run_may_be_missing(tmp_path: Path, name: str) -> None:
    a, b, c = three(tmp_path)
    gone = a / name
    for path in sorted([*gone.rglob("*"), gone], reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert ">a</span>" in rendered(a, b, c)
    assert ">a</span>" in rendered(a)


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "summary.json", "evaluations/step-00000060/results.json"]
)
@pytest.mark.parametrize("content", [b"\xff{[", b"[1]\n", b"3\n", b"{\n", b""])
def test_a_broken_file_is_named_on_the_page(tmp_path: Path, name: str, content: bytes) -> None:
    run = evaluated(trained(tmp_path / "a"))
    (run / name).write_bytes(content)
    text = rendered(run)
    assert (
        content == b""
        or not content.endswith(b"\n")
        or name.rpartition("/")[2] in re.sub("<pre.*", "", text, flags=re.S)
    )


DEEP = b"[" * 100_000
NESTED = b'{"a":' * 300 + b"1" + b"}" * 300


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", DEEP),
        ("config.yaml", NESTED),
        ("config.yaml", b"a: &a [*a]"),
        ("config.yaml", b"a: &a [1, 2]\nb: [*a, *a]"),
        ("config.yaml", b"seed: !!int x"),
        ("config.yaml", b"seed: 0x" + b"f" * 5000),
        ("config.yaml", b"optimizer: {2001-01-01: x}"),
        ("config.yaml", b"{optimizer: {_target_: [a, {b: c}]}, global_batch_size: [128], evals: [1]}"),
        ("metrics.jsonl", DEEP + b"\n"),
        ("metrics.jsonl", b'{"step": 1' + b"0" * 4000 + b', "train/loss": 1.0}\n{"step": true, "samples": [1]}\n'),
        ("summary.json", DEEP),
        ("summary.json", b'{"status": ' + NESTED + b', "step": [1]}'),
        ("evaluations/step-00000060/results.json", DEEP),
        ("evaluations/step-00000060/results.json", b'{"eval/a/top1": {"value": [1], "low": "x"}, "eval/a/b": [2]}'),
    ],
)
def test_a_hostile_file_spoils_no_page(tmp_path: Path, name: str, content: bytes) -> None:
    a, b, c = three(tmp_path)
    (a / name).write_bytes(content)
    text = rendered(a, b, c)
    assert all(f">{shown}</span>" in text for shown in ("a", "b", "ViT-B-32-openai"))
    assert "85.9" in text  # what the second run's files say


def test_a_row_that_is_being_written_is_left_to_the_next_time(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "train/lo')
    read = folders.read_run(run, "a")
    assert len(read.rows) == 7
    assert read.notes == ()


def test_a_broken_picture_is_named_on_the_page(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    (run / "figures" / "old_confusion_matrix.png").write_bytes(b"no PNG")
    assert "a: old_confusion_matrix.png (cannot be read)" in rendered(run)


def test_a_page_is_not_larger_than_its_limit_and_says_what_is_left_out(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    for index in range(3):
        picture(run / "figures" / f"old_noise{index}.png", (500 + 100 * index, 500), noise=True)
    whole = rendered(run)
    assert "Left out" not in whole
    limit = len(whole) + page.SPARE - 20_000
    text = rendered(run, limit=limit)
    assert len(text.encode()) <= limit
    assert re.findall(r"a: (old_\w+.png) \(\d.\d MB\)", text) == ["old_noise2.png"]
    assert text.count("<figcaption><span") == 3


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", (2400, 800), noise=True)
    shown = pictures.encoded(folders.Picture("eval/it", "x", None, tmp_path / "x.png"), 0)
    assert (shown.kind, shown.width, shown.height) == ("image/webp", 1600, 533)
    assert len(shown.data) < (tmp_path / "x.png").stat().st_size / 3


def test_pictures_are_the_newest_of_each_kind_and_know_their_evaluation(tmp_path: Path) -> None:
    run = evaluated(trained(tmp_path / "a", log=[*rows(), {"step": 60, "samples": 1, "eval/shapes/top1": 0.5}]))
    evaluated(run, {**RESULTS, "eval/shapes_two/top1": 0.5, "eval_ema/shapes/top1": 0.5}, step=80)
    for name in ("shapes_two_grid", "eval_ema_shapes_grid", "unknown"):
        picture(run / "evaluations" / "step-00000080" / f"{name}.png")
    picture(run / "figures" / "shapes_confusion_matrix.png")
    picture(run / "figures" / "shapes_failures.png")
    found = {(it.evaluation, it.figure): it.step for it in folders.read_run(run, "a").pictures}
    assert found == {
        ("eval/old", "confusion_matrix"): 60,
        ("eval/shapes", "confusion_matrix"): 80,
        ("eval/shapes", "failures"): 60,
        ("eval/shapes_two", "grid"): 80,
        ("eval_ema/shapes", "grid"): 80,
        ("", "unknown"): 80,
    }


# --- finding runs ---------------------------------------------------------------------------------------------------


def test_runs_are_found_by_name_by_folder_and_by_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = three(tmp_path / "runs")
    (tmp_path / "runs" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    root = Path("runs")

    def names(*words: str) -> list[str]:
        found, wrong = folders.find(words, root)
        assert wrong == []
        return [path.name for path in found]

    assert names("b", "runs/a", str(runs[2])) == ["b", "a", "ViT-B-32-openai"]
    assert names("runs/*") == names("*") == names(f"{tmp_path}/runs/*") == ["ViT-B-32-openai", "a", "b"]
    assert names("a", "runs/a", "[ab]") == ["a", "b"]
    found, wrong = folders.find(["aa", "x*", "empty"], root)
    assert found == []
    assert "Did you mean 'a'?" in wrong[0]
    assert "no run matches 'x*'" in wrong[1]
    assert "does not look like a run" in wrong[2]


def test_runs_named_alike_are_told_apart(tmp_path: Path) -> None:
    one, other = trained(tmp_path / "x" / "a"), trained(tmp_path / "y" / "a")
    assert [run.name for run in folders.read([one, other])] == [str(one), str(other)]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["a", "out=x.html", "b"], ["out=x.html", "runs=['a','b']"]),
        (["runs/x-lr=0.1-seed=2", "it's"], [r"runs=['runs/x-lr=0.1-seed=2','it\'s']"]),
        (["runs=[a,b]", "paths.runs=x"], ["runs=[a,b]", "paths.runs=x"]),
        (["--config-dir", "here", "a"], ["--config-dir", "here", "runs=['a']"]),
        (["+x=1", "hydra/launcher=y", "~z="], ["+x=1", "hydra/launcher=y", "~z="]),
        ([], []),
    ],
)
def test_words_that_are_no_overrides_are_runs(words: list[str], given: list[str]) -> None:
    assert _gathered(words, "runs") == given


# --- the program ----------------------------------------------------------------------------------------------------


def report(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
def test_mistakes_are_told_together_and_nothing_is_written(tmp_path: Path) -> None:
    three(tmp_path / "runs")
    done = report("a", "bb", "out=report.txt", "+oot=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "3 problems in the configuration:",
        "  oot: unknown key. Did you mean 'out'?",
        "  runs: there is no run 'bb' in runs. Did you mean 'b'?",
        "  out: should be a file that ends in .html, got 'report.txt'",
    ]
    assert not list(tmp_path.glob("report*"))


@pytest.mark.slow
def test_a_key_that_there_is_not_is_told_with_the_nearest(tmp_path: Path) -> None:
    done = report("a", "paths.rns=x", cwd=tmp_path)
    assert done.returncode == 1
    assert "paths.rns: unknown key. Did you mean 'paths.runs'?" in done.stderr


@pytest.mark.slow
def test_a_report_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    done = report(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "1 problem in the configuration:\n  runs: no value given\n")


@pytest.mark.slow
def test_the_program_writes_one_page_and_says_where(tmp_path: Path) -> None:
    three(tmp_path / "runs")
    sweep = shifted(0.01)
    evaluated(tmp_path / "runs" / "x-lr=0.1,seed=2", sweep)
    done = report("runs/*", cwd=tmp_path)
    assert re.fullmatch(r"4 runs, [\d.]+kB: runs/report.html\n", done.stdout), done.stderr
    assert (tmp_path / "runs" / "report.html").read_text().startswith("<!DOCTYPE html>")
    done = report("runs=[a,b]", "out=deep/page.html", cwd=tmp_path)
    assert re.fullmatch(r"2 runs, [\d.]+kB: deep/page.html\n", done.stdout), done.stderr
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]


@pytest.mark.parametrize("metric", ["max_skew", "ndkl"])
def test_less_skew_is_better(metric: str) -> None:
    share = numbers.is_share(metric, [folders.Value(0.5, 1, chance=0.4)])
    assert (share, numbers.better(metric, share)) == (False, -1)


@pytest.mark.parametrize(
    "metric",
    [
        *("anisotropy_image", "anti_hubs_t2i", "hubness_i2t", "mean_absolute_effect", "share_significant"),
        *("mean_absolute_effect_projected", "weat1_effect", "weat6_p_projected", "p", "effective_rank_text"),
    ],
)
def test_of_associations_and_geometry_no_value_is_the_best_and_none_is_in_percent(metric: str) -> None:
    share = numbers.is_share(metric, [folders.Value(0.5, 1, chance=0.4)])
    assert (share, numbers.better(metric, share)) == (False, 0)

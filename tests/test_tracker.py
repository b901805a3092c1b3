"""The laws of the log."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from multimodal.parts import RunInfo
from multimodal.tracker import METRICS, SUMMARY, NoTracker, RunLog


class Recorder:
    """A mirror that fails on a given call."""

    def __init__(self, fails_on: str = "") -> None:
        self.fails_on = fails_on
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_on:
            raise OSError("no network")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call(f"log {step} {dict(values)}")

    def figure(self, step: int, name: str, path: Path) -> None:
        self._call(f"figure {step} {name}")

    def finish(self, exit_code: int) -> None:
        self._call(f"finish {exit_code}")


def test_a_row_is_one_line_of_json_with_step_and_samples(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(3, 48, {"train/loss": 1.5})
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == log.rows == [{"step": 3, "samples": 48, "train/loss": 1.5}]


def test_rows_behind_the_checkpoint_are_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 10, {"a": 1})
    log.flush()
    length = log.length
    assert length == (tmp_path / METRICS).stat().st_size
    log.write(2, 20, {"a": 2})
    log.close(1)
    again = RunLog(tmp_path, length)
    assert [row["step"] for row in again.rows] == [1]
    again.write(2, 20, {"a": 3})
    assert [row["a"] for row in again.rows] == [1, 3]
    again.flush()
    assert again.length == (tmp_path / METRICS).stat().st_size


def test_the_length_is_that_of_the_file_also_when_nothing_was_written_since_rows_were_cut_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 10, {"a": 1})
    log.flush()
    length = log.length
    log.write(2, 20, {"a": 2})
    log.close(1)
    assert RunLog(tmp_path, length).length == length == (tmp_path / METRICS).stat().st_size


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 9}\n')
    assert RunLog(tmp_path, 0).rows == []


@pytest.mark.parametrize(("mode", "best", "step"), [("max", 0.5, 2), ("min", 0.1, 1)])
def test_the_summary_has_the_last_values_and_the_first_best_row(
    tmp_path: Path, mode: str, best: float, step: int
) -> None:
    log = RunLog(tmp_path, 0)
    for number, top1 in enumerate([0.1, 0.5, 0.5, 0.2, 0.1], start=1):
        log.write(number, 10 * number, {"train/loss": 1 / number})
        log.write(number, 10 * number, {"eval/x/top1": top1})
    log.write(6, 60, {"train/loss": 0.0})
    summary = log.summarise({"id": "abc", "status": "finished"}, "eval/x/top1", mode)
    assert summary == {
        "id": "abc",
        "status": "finished",
        "step": 6,
        "samples": 60,
        "train/loss": 0.0,
        "eval/x/top1": 0.1,
        "best/eval/x/top1": best,
        "best/step": step,
    }
    assert json.loads((tmp_path / SUMMARY).read_text()) == summary


@pytest.mark.parametrize("best", [None, "eval/other/top1"])
def test_a_summary_of_nothing_evaluated_has_no_best(tmp_path: Path, best: str | None) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 10, {"train/loss": 1.0})
    assert not any(key.startswith("best") for key in log.summarise({}, best, "max"))


def test_the_mirror_is_told_everything(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.mirror = mirror = Recorder()
    log.write(1, 10, {"a": 1})
    log.figure(1, "curves", tmp_path / "x.png")
    log.close(0)
    assert mirror.calls == ["log 1 {'step': 1, 'samples': 10, 'a': 1}", "figure 1 curves", "finish 0"]


@pytest.mark.parametrize("fails_on", ["log 1 {'step': 1, 'samples': 10}", "figure 1 curves", "finish 1"])
def test_a_mirror_that_fails_is_left_and_the_log_goes_on(
    tmp_path: Path, fails_on: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, 0)
    log.mirror = mirror = Recorder(fails_on)
    log.write(1, 10, {})
    log.figure(1, "curves", tmp_path / "x.png")
    log.write(2, 20, {})
    assert len(log.rows) == 2
    log.close(1)
    assert mirror.calls[-1] == fails_on
    assert log.mirror is None
    assert "the tracker failed and is left out" in caplog.text


def test_without_a_tracker_nothing_is_mirrored(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.mirror = NoTracker().start(RunInfo("name", "id", tmp_path, {}, []))
    log.write(1, 10, {"a": 1})
    log.figure(1, "curves", tmp_path / "x.png")
    log.close(0)
    assert {path.name for path in tmp_path.iterdir()} == {METRICS}

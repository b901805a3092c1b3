"""The laws of evaluations while training: they change nothing, and say which checkpoint is the best."""

import errno
import json
import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Interrupt, TinyConfig
from tiny_runs import assert_same_run, crash, kill, named, rows, weights, with_checkpoint

from multimodal import checkpoint, journal, trainer
from multimodal.assemble import evaluate
from multimodal.checkpoint import find, load_state, steps
from multimodal.config import TrainConfig
from multimodal.parts import BadSample, Eval, Report, Sources
from multimodal.parts import Encoder as EncoderContract
from multimodal.results import folder_of, write_numbers
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")


SCORES = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.9}


class Scripted(Eval):
    """Says one score after the other; a negative one stands for what is no number."""

    every: Cadence = Cadence.parse("2steps")
    scores: tuple[float, ...] = tuple(SCORES.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        return ()

    def build(self, data: Sources) -> Callable[[EncoderContract], Report]:
        left = list(self.scores)

        def run(model: EncoderContract) -> Report:
            features = model.encode("text", ["a red circle"])
            assert features.shape == (1, 16)
            score = left.pop(0)
            return Report({"top1": score if score >= 0 else math.nan})

        return run


def evaluated(config: TrainConfig, mode: str = "max", **knobs: Any) -> TrainConfig:
    config = config.model_copy(update={"evals": {"it": Scripted(**knobs)}})
    return with_checkpoint(config, best="eval/it/top1", mode=mode, keep=1)


@pytest.mark.parametrize(("mode", "step", "best"), [("max", 4, 0.9), ("min", 2, 0.1)])
def test_the_best_checkpoint_is_that_of_the_first_best_value(
    tiny_config: TinyConfig, mode: str, step: int, best: float
) -> None:
    config = evaluated(tiny_config(), mode)
    summary = Trainer(config).run()
    told = {at: json.loads((folder_of(config.folder, at) / "results.json").read_text()) for at in SCORES}
    assert {at: found["eval/it/top1"]["value"] for at, found in told.items()} == SCORES
    assert [(row["step"], row["eval/it/top1"]) for row in rows(config) if "eval/it/top1" in row] == list(SCORES.items())
    assert load_state(find(config.folder, "best")).step == step == summary["best/step"]
    assert load_state(find(config.folder, "best")).best == best == summary["best/eval/it/top1"]
    assert steps(config.folder) == [step, 8]


def test_evaluations_always_run_at_the_end(tiny_config: TinyConfig) -> None:
    config = evaluated(tiny_config(), every=Cadence.parse("never"))
    assert Trainer(config).run()["eval/it/top1"] == 0.1
    assert len([row for row in rows(config) if "eval/it/top1" in row]) == 1


def test_evaluating_does_not_change_the_training(tiny_config: TinyConfig) -> None:
    plain = named(tiny_config("towers.image.patch_dropout=0.5"), "plain")
    watched = named(evaluated(plain), "watched")
    Trainer(plain).run()
    Trainer(watched).run()
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


def test_a_value_that_is_no_number_is_not_the_best(tiny_config: TinyConfig) -> None:
    config = evaluated(tiny_config(), scores=(0.1, -1.0, 0.05, 0.04))
    Trainer(config).run()
    assert load_state(find(config.folder, "best")).step == 2


def test_a_crash_before_the_best_is_marked_does_not_forget_it(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_checkpoint(evaluated(tiny_config()), keep=9)
    original = checkpoint.mark_best
    with monkeypatch.context() as patch:

        def mark(run: Path, step: int) -> None:
            if step == 4:
                raise ZeroDivisionError
            original(run, step)

        patch.setattr(checkpoint, "mark_best", mark)
        with pytest.raises(ZeroDivisionError):
            Trainer(config).run()
    later = config.model_copy(update={"evals": {"it": Scripted(scores=(0.3, 0.2))}})
    Trainer(later).run()
    assert load_state(find(config.folder, "best")).step == 4


class Told(Eval):
    """Says something of the model."""

    every: Cadence = Cadence.parse("3steps")

    @property
    def metrics(self) -> tuple[str, ...]:
        return ()

    def build(self, data: Sources) -> Callable[[EncoderContract], Report]:
        return lambda model: Report({"sum": model.encode("text", ["a red circle"]).sum().item()})


@pytest.mark.parametrize("ends", [3, 8])
@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_that_a_run_did_not_come_to_is_made_when_it_goes_on(
    tiny_config: TinyConfig, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch, ends: int, fails: bool
) -> None:
    config = tiny_config().model_copy(update={"evals": {"it": Told()}})
    whole = with_checkpoint(named(config, "whole"), best=None)
    parted = named(whole, "parted")
    Trainer(whole).run()
    with monkeypatch.context() as patch:

        def happens() -> None:
            kill(signal.SIGTERM)()
            if fails:
                patch.setattr(trainer, "evaluate", lambda *_: crash())

        interrupt(ends, happens)
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            Trainer(parted).run()
    assert steps(parted.folder) == [ends]
    assert load_state(find(parted.folder)).evaluated != fails
    assert Trainer(parted).run()["status"] == "finished"
    assert [row["step"] for row in rows(parted) if "eval/it/sum" in row] == [3, 6, 8]
    assert_same_run(parted, whole)


def test_a_picture_that_cannot_be_written_costs_nothing_else(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = evaluated(tiny_config())
    monkeypatch.setattr(journal, "write_figures", full)
    monkeypatch.setattr(journal.figures, "curves", full)
    assert Trainer(config).run()["status"] == "finished"
    assert "a figure of step 2 cannot be written: [Errno 28] No space left on device" in caplog.text
    assert len([row for row in rows(config) if "eval/it/top1" in row]) == len(SCORES)


def test_results_that_cannot_be_written_are_told_as_such_and_cost_no_figure(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = evaluated(tiny_config("duration=2steps"))
    place = config.folder / "evaluations" / "step-00000002"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    drawn: list[str] = []
    monkeypatch.setattr(journal, "write_figures", lambda reports, folder: drawn.extend(reports) or [])
    assert Trainer(config).run()["status"] == "finished"
    (told,) = [line for line in caplog.messages if "cannot be written" in line]
    assert told.startswith("intervals and settings of step 2, whose values are in metrics.jsonl, cannot be written")
    assert str(place) in told
    assert "eval/it" in drawn


@pytest.mark.parametrize("held", ["", "[1, 2]", "{", '{"eval/other/top1": {"value": 0.5}}'])
def test_damaged_results_are_written_anew_and_whole_ones_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, held: str
) -> None:
    (tmp_path / "results.json").write_text(held)
    (tmp_path / "settings.json").write_text(held)
    write_numbers({"eval/it": Report({"top1": math.nan}, settings={"k": 1})}, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["eval/it"] == {"k": 1}
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.pop("eval/it/top1")["value"] is None
    whole = "other" in held
    assert found == (json.loads(held) if whole else {})
    assert ("is damaged" in caplog.text) != whole


def test_numbers_that_were_measured_otherwise_are_replaced_as_a_whole_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(name: str, metrics: dict[str, float], path: str) -> list[str]:
        write_numbers({f"eval/{name}": Report(metrics, settings={"dataset": {"path": path}})}, tmp_path)
        return list(json.loads((tmp_path / "results.json").read_text()))

    write("it", {"top1": 0.5, "top5": 0.9}, "a")
    write("it2", {"top1": 0.5}, "a")
    assert write("it", {"top1": 0.6}, "a") == ["eval/it/top1", "eval/it/top5", "eval/it2/top1"]
    assert "measured otherwise" not in caplog.text
    assert write("it", {"top1": 0.7}, "b") == ["eval/it2/top1", "eval/it/top1"]
    assert f"eval/it was measured otherwise before, which is replaced: {tmp_path / 'results.json'}" in caplog.text


def test_a_sample_that_cannot_be_read_is_told_with_the_evaluation_that_wants_it() -> None:
    def run(_: EncoderContract) -> Report:
        raise BadSample("photos/3.png: not an image that Pillow can read")

    encoder: Any = SimpleNamespace(num_truncated=0, forget=lambda: None)
    with pytest.raises(BadSample, match=r"^evals\.mine: photos/3\.png: not an image"):
        evaluate({"mine": run}, encoder)

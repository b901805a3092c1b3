"""The laws of saving in the background: training goes on, and what is on the disk is as if it had not."""

import errno
import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Interrupt, TinyConfig
from tiny_runs import assert_same_run, crash, kill, named, rows, weights, with_checkpoint
from torch import Tensor

from multimodal import checkpoint
from multimodal.checkpoint import find, load_state, steps
from multimodal.config import RunError, TrainConfig
from multimodal.parts import Encoder as EncoderContract
from multimodal.parts import Eval, Report
from multimodal.tracker import RunLog
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")

OnWrite = Callable[[Callable[[int], None]], None]
SECONDS = 10.0
"""That a test waits for what should come at once."""


@pytest.fixture
def on_write(monkeypatch: pytest.MonkeyPatch) -> OnWrite:
    """Let something happen, which is told the step, before a checkpoint's first tensors are written."""

    def at(happens: Callable[[int], None]) -> None:
        original = checkpoint.save_file

        def save_file(tensors: dict[str, Tensor], file: Path) -> None:
            if file.name == checkpoint.WEIGHTS:
                happens(int(file.parent.name[-8:]))
            original(tensors, file)

        monkeypatch.setattr(checkpoint, "save_file", save_file)

    return at


def full(at: int) -> Callable[[int], None]:
    """The disk is when this step is written."""

    def happens(step: int) -> None:
        if step == at:
            raise OSError(errno.ENOSPC, "No space left on device")

    return happens


def every(config: TrainConfig, number: int, **changes: Any) -> TrainConfig:
    return with_checkpoint(config, every=Cadence.parse(f"{number}steps"), keep=9, **changes)


@pytest.mark.parametrize("words", [("optimizer=adamw",), ("optimizer=muon", "ema.decay=0.9")])
def test_training_goes_on_during_a_write_and_the_files_are_of_the_step_of_the_save(
    tiny_config: TinyConfig, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    ours = every(named(tiny_config(*words), "background"), 4)
    waiting = with_checkpoint(named(ours, "waiting"), background=False)
    Trainer(waiting).run()
    went_on = threading.Event()
    interrupt(7, went_on.set)
    flush = RunLog.flush
    monkeypatch.setattr(RunLog, "flush", lambda log: flush(log) if went_on.wait(SECONDS) else crash())
    Trainer(ours).run()
    assert went_on.is_set()
    for file in (path.stem for path in find(waiting.folder, "4").glob("*.safetensors")):
        for name, value in weights(waiting, file, "4").items():
            assert torch.equal(weights(ours, file, "4")[name], value), (file, name)
    stored = [load_state(find(config.folder, "4")) for config in (waiting, ours)]
    assert [state.step for state in stored] == [4, 4]
    log = (ours.folder / "metrics.jsonl").read_bytes()[: stored[1].log_bytes]
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2, 3, 4]
    assert_same_run(ours, waiting)


@pytest.mark.parametrize("words", [("optimizer=adamw", "ema.decay=0.9"), ("optimizer=muon",)])
def test_what_goes_on_from_a_write_that_training_overtook_is_the_run_that_never_ended(
    tiny_config: TinyConfig, interrupt: Interrupt, on_write: OnWrite, words: tuple[str, ...]
) -> None:
    whole = named(tiny_config("towers.image.patch_dropout=0.5", *words), "whole")
    parted = every(named(whole, "parted"), 4)
    Trainer(whole).run()
    overtaken = threading.Event()

    def end() -> None:
        overtaken.set()
        crash()

    interrupt(7, end)
    on_write(lambda _: None if overtaken.wait(SECONDS) else crash())
    with pytest.raises(ZeroDivisionError):
        Trainer(parted).run()
    assert steps(parted.folder) == [4]
    assert [row["step"] for row in rows(parted)] == [1, 2, 3, 4, 5, 6]
    Trainer(parted).run()
    assert_same_run(parted, whole)


def test_one_checkpoint_is_written_at_a_time(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [0], [0]
    original = checkpoint.save

    def save(*arguments: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        original(*arguments)
        inside[0] -= 1

    copies = checkpoint.whole_tensors

    def copied(*arguments: Any, **named: Any) -> Any:
        assert inside[0] == 0, "a second copy while the first is written"
        return copies(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint, "whole_tensors", copied)
    config = every(tiny_config(), 1)
    Trainer(config).run()
    assert most == [1]
    assert steps(config.folder) == list(range(1, 9))


def test_a_run_ends_when_its_last_write_has(
    tiny_config: TinyConfig, on_write: OnWrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    mark, summarise = checkpoint.prune, Trainer._summarise

    def prune(run: Path, keep: int) -> None:
        mark(run, keep)
        events.append("written")

    def summary(self: Trainer, status: str) -> dict[str, Any]:
        events.append(status)
        return summarise(self, status)

    monkeypatch.setattr(checkpoint, "prune", prune)
    monkeypatch.setattr(Trainer, "_summarise", summary)
    on_write(lambda _: time.sleep(0.3))
    Trainer(tiny_config()).run()
    assert events == ["written", "finished"]


class Watched(Eval):
    """Notes which steps are on the disk when it begins."""

    folder: Path
    every: Cadence = Cadence.parse("3steps")

    def build(self, root: Path) -> Callable[[EncoderContract], Report]:
        return lambda model: Report({"saved": float(steps(self.folder)[-1] if steps(self.folder) else 0)})


def test_a_stopped_run_has_saved_before_it_evaluates_and_before_it_says_so(
    tiny_config: TinyConfig, interrupt: Interrupt, on_write: OnWrite, caplog: pytest.LogCaptureFixture
) -> None:
    config = every(tiny_config(), 2)
    config = config.model_copy(update={"evals": {"it": Watched(folder=config.folder)}})
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"best": "eval/it/saved"})})
    interrupt(3, kill(signal.SIGTERM))
    said: list[bool] = []

    def slowly(step: int) -> None:
        time.sleep(0.3)
        said.append("stopped by a signal" in caplog.text)

    on_write(slowly)
    with caplog.at_level(logging.INFO):
        assert Trainer(config).run()["status"] == "stopped"
    assert [row["eval/it/saved"] for row in rows(config) if "eval/it/saved" in row] == [3]
    assert said == [False] * 3  # after step 2, on the signal, and as the best
    assert find(config.folder, "best").name == "step-00000003"


# --- what cannot be written -----------------------------------------------------------------------------------------


def test_a_write_that_fails_ends_the_run_at_the_next_vote(
    tiny_config: TinyConfig, interrupt: Interrupt, on_write: OnWrite
) -> None:
    config = every(tiny_config(), 5)
    one = Trainer(config)
    interrupt(7, lambda: wait([one.saver.write] if one.saver.write else [], SECONDS) and None)
    on_write(full(5))
    with pytest.raises(RunError, match=rf"step 5 cannot be written to {config.folder}: .*No space left on device"):
        one.run()
    assert 5 <= rows(config)[-1]["step"] < 7
    assert json.loads((config.folder / "summary.json").read_text())["status"] == "failed"
    assert list((config.folder / "checkpoints").iterdir()) == []


def test_a_write_that_fails_is_told_by_the_next_save(tiny_config: TinyConfig, on_write: OnWrite) -> None:
    def late(step: int) -> None:
        if step == 4:
            time.sleep(0.5)
            full(4)(step)

    config = every(tiny_config(), 1)
    on_write(late)
    with pytest.raises(RunError, match="step 4 cannot be written"):
        Trainer(config).run()
    assert rows(config)[-1]["step"] == 5
    assert steps(config.folder) == [1, 2, 3]


def test_a_run_whose_last_write_fails_is_not_finished(tiny_config: TinyConfig, on_write: OnWrite) -> None:
    config = tiny_config()
    on_write(full(8))
    with pytest.raises(RunError, match="step 8 cannot be written"):
        Trainer(config).run()
    assert json.loads((config.folder / "summary.json").read_text())["status"] == "failed"


def test_a_run_that_cannot_save_on_a_signal_does_not_say_that_it_stopped(
    tiny_config: TinyConfig, interrupt: Interrupt, on_write: OnWrite, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config()
    interrupt(3, kill(signal.SIGTERM))
    on_write(full(3))
    with caplog.at_level(logging.INFO), pytest.raises(RunError, match="step 3 cannot be written"):
        Trainer(config).run()
    assert "stopped by a signal" not in caplog.text
    assert json.loads((config.folder / "summary.json").read_text())["status"] == "failed"


def test_a_write_that_fails_while_the_run_ends_for_another_reason_is_told_too(
    tiny_config: TinyConfig, interrupt: Interrupt, on_write: OnWrite, caplog: pytest.LogCaptureFixture
) -> None:
    config, ends = every(tiny_config(), 4), threading.Event()

    def end() -> None:
        ends.set()
        crash()

    interrupt(6, end)
    on_write(lambda step: full(4)(step) if ends.wait(SECONDS) else None)
    with pytest.raises(ZeroDivisionError):
        Trainer(config).run()
    assert f"the checkpoint of step 4 cannot be written to {config.folder}" in caplog.text

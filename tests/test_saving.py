"""The laws of saving in the background: training goes on, and what is on the disk is as if it had not."""

import errno
import json
import logging
import shutil
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

from multimodal import checkpoint, run_lock
from multimodal.checkpoint import TrainerState, find, load_state, steps
from multimodal.config import RunError, TrainConfig
from multimodal.ema import Ema
from multimodal.journal import Journal
from multimodal.parts import Encoder as EncoderContract
from multimodal.parts import Eval, Report, Sources
from multimodal.saving import Saver
from multimodal.towers.text import TextPreprocessor
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


def test_one_checkpoint_is_written_at_a_time(
    tiny_config: TinyConfig, on_write: OnWrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, returned, writing = threading.Event(), threading.Event(), threading.Event()
    returned_too_soon: list[bool] = []
    save, copies = Saver.save, checkpoint.whole_tensors

    def saved(saver: Saver, state: TrainerState, *arguments: Any) -> None:
        if state.step == 2:
            asked.set()
        save(saver, state, *arguments)
        if state.step == 2:
            returned.set()

    def copied(*arguments: Any, **named: Any) -> Any:
        assert not writing.is_set(), "a second copy while the first is written"
        return copies(*arguments, **named)

    def held(step: int) -> None:
        if step == 1:
            writing.set()
            assert asked.wait(SECONDS)
            returned_too_soon.append(returned.wait(0.3))
            writing.clear()

    monkeypatch.setattr(Saver, "save", saved)
    monkeypatch.setattr(checkpoint, "whole_tensors", copied)
    on_write(held)
    config = every(tiny_config(), 1)
    Trainer(config).run()
    assert returned_too_soon == [False]
    assert returned.is_set()
    assert steps(config.folder) == list(range(1, 9))


@pytest.mark.parametrize("background", [True, False])
def test_tied_and_transposed_weights_are_saved(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    kept, state_dicts = torch.rand(3, 2), Ema.state_dicts
    odd = {"one": kept, "tied": kept, "row": kept[1], "transposed": kept.T}
    monkeypatch.setattr(Ema, "state_dicts", lambda ema: {kind: own | odd for kind, own in state_dicts(ema).items()})
    config = with_checkpoint(tiny_config(), background=background)
    Trainer(config).run()
    stored = weights(config)
    for name, value in odd.items():
        assert torch.equal(stored[name], value), name


def test_a_run_whose_end_is_cut_short_keeps_its_lock_until_the_write_has_ended(
    tiny_config: TinyConfig, interrupt: Interrupt, on_write: OnWrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, let_go = every(tiny_config(), 2), threading.Event()

    def impatient(_: Saver) -> None:
        raise KeyboardInterrupt

    interrupt(4, crash)
    on_write(lambda _: None if let_go.wait(SECONDS) else crash())
    monkeypatch.setattr(Saver, "_settle", impatient)
    one = Trainer(config)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    held = (config.folder / run_lock.NAME).exists()
    let_go.set()
    one.saver.thread.shutdown()
    assert held
    assert steps(config.folder) == [2]
    assert one.lock is not None
    one.lock.release()
    assert not (config.folder / run_lock.NAME).exists()


def test_a_run_ends_when_its_last_write_has(
    tiny_config: TinyConfig, on_write: OnWrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    mark, summarise = checkpoint.prune, Journal.summarise

    def prune(run: Path, keep: int) -> None:
        mark(run, keep)
        events.append("written")

    def summary(self: Journal, state: TrainerState, status: str) -> dict[str, Any]:
        events.append(status)
        return summarise(self, state, status)

    monkeypatch.setattr(checkpoint, "prune", prune)
    monkeypatch.setattr(Journal, "summarise", summary)
    on_write(lambda _: time.sleep(0.3))
    Trainer(tiny_config()).run()
    assert events == ["written", "finished"]


class Watched(Eval):
    """Notes which steps are on the disk when it begins."""

    folder: Path
    every: Cadence = Cadence.parse("3steps")

    @property
    def metrics(self) -> tuple[str, ...]:
        return ()

    def build(self, data: Sources) -> Callable[[EncoderContract], Report]:
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
    interrupt(7, lambda: wait([one.saver.pending] if one.saver.pending else [], SECONDS) and None)
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


def test_an_old_checkpoint_that_cannot_be_deleted_is_left_with_a_warning(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = shutil.rmtree

    def refuse(path: Path, **how: Any) -> None:
        if "partial-old" in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, **how)

    config = with_checkpoint(tiny_config("duration=4steps"), every=Cadence.parse("1steps"), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert Trainer(config).run()["status"] == "finished"
        Trainer(config).run()  # a start
    assert steps(config.folder) == [3, 4]
    for step in (1, 2):
        left = config.folder / "checkpoints" / f".partial-old-step-0000000{step}"
        assert f"{left} cannot be deleted, and is left for the next start: " in caplog.text
    Trainer(config).run()
    assert sorted(path.name[-2:] for path in (config.folder / "checkpoints").iterdir()) == ["03", "04"]


def test_a_write_that_fails_deletes_nothing_but_what_there_is_of_it(tiny_config: TinyConfig, on_write: OnWrite) -> None:
    config = every(tiny_config(), 2)
    others = config.folder / "checkpoints" / ".partial-step-00000099"

    def fail(step: int) -> None:
        if step == 4:
            others.mkdir()
        full(4)(step)

    on_write(fail)
    with pytest.raises(RunError, match="step 4 cannot be written"):
        Trainer(config).run()
    assert sorted(path.name for path in others.parent.iterdir()) == [others.name, "step-00000002"]


def test_a_best_that_cannot_be_marked_is_not_told_as_a_checkpoint_that_cannot_be_written(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_config("evals=[shapes]", "evals.shapes.dataset.size=80", "checkpoint.best=eval/shapes/top1")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "mark_best", refuse)
        with pytest.raises(RunError, match=r"is written, but cannot be marked as the best: .*No space left"):
            Trainer(config).run()
    assert steps(config.folder) == [8]
    Trainer(config).run()  # which has nothing left to do but that
    assert checkpoint.find(config.folder, "best") == checkpoint.find(config.folder, "last").resolve()


def test_whatever_a_preprocessor_raises_the_step_the_folder_and_the_reason_are_told(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    config = tiny_config()
    monkeypatch.setattr(TextPreprocessor, "save", save)
    with pytest.raises(RunError, match=rf"step 8 cannot be written to {config.folder}: .*device \(os error 28\)"):
        Trainer(config).run()
    assert list((config.folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("owner", "name"), [(checkpoint, "clean"), (Path, "write_text"), (RunLog, "summarise")])
def test_a_folder_that_cannot_be_made_ready_is_told_with_the_reason(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_config()
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(RunError, match=f"folder {config.folder} cannot be made ready: .*No space left on device"):
        Trainer(config).run()

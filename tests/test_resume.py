"""The laws of runs: a run stopped and run again is the run that was never stopped."""

import json
import signal

import pytest
import torch
from conftest import Interrupt, TinyConfig
from tiny_runs import assert_same_run, crash, kill, named, rows, weights, with_checkpoint

from multimodal import checkpoint, trainer
from multimodal.checkpoint import steps
from multimodal.config import ConfigError, RunError, TrainConfig
from multimodal.journal import Journal
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("number", "micro_batch_size"), [(signal.SIGTERM, None), (signal.SIGINT, None), (signal.SIGTERM, 6)]
)
def test_a_run_that_was_stopped_and_run_again_is_the_run_that_was_not(
    tiny_config: TinyConfig, interrupt: Interrupt, number: int, micro_batch_size: int | None
) -> None:
    size = f"micro_batch_size={micro_batch_size or 'null'}"
    whole = named(tiny_config("towers.image.patch_dropout=0.5", "augment=crop_flip", size), "whole")
    parted = named(whole, "parted")
    assert Trainer(whole).run()["status"] == "finished"
    interrupt(3, kill(number))
    before = signal.getsignal(number)
    assert Trainer(parted).run()["status"] == "stopped"
    assert signal.getsignal(number) == before
    assert steps(parted.folder) == [3]
    summary = Trainer(parted).run()
    assert summary["status"] == "finished"
    assert summary["step"] == 8
    assert [row["step"] for row in rows(parted)] == list(range(1, 9))
    assert_same_run(parted, whole)


@pytest.mark.parametrize("words", ["optimizer=adamw", "optimizer=lion", "optimizer=muon", "ema.decay=0.9"])
def test_a_run_that_crashed_goes_on_from_its_checkpoint_without_duplicate_rows(
    tiny_config: TinyConfig, interrupt: Interrupt, words: str
) -> None:
    config = tiny_config(words)
    whole = with_checkpoint(named(config, "whole"), every=Cadence.parse("2steps"), keep=9)
    parted = named(whole, "parted")
    Trainer(whole).run()
    interrupt(6, crash)
    with pytest.raises(ZeroDivisionError):
        Trainer(parted).run()
    assert json.loads((parted.folder / "summary.json").read_text())["status"] == "failed"
    assert [row["step"] for row in rows(parted)] == [1, 2, 3, 4, 5]
    assert steps(parted.folder) == [2, 4]
    Trainer(parted).run()
    assert_same_run(parted, whole)


def test_a_run_stopped_before_its_first_row_after_a_crash_goes_on(
    tiny_config: TinyConfig, interrupt: Interrupt
) -> None:
    config = with_checkpoint(tiny_config("log.every=4steps"), every=Cadence.parse("3steps"), keep=9)
    interrupt(5, crash)
    with pytest.raises(ZeroDivisionError):
        Trainer(config).run()
    assert steps(config.folder) == [3]
    interrupt(1, kill(signal.SIGTERM))
    Trainer(config.model_copy(update={"log": config.log.model_copy(update={"every": Cadence.parse("8steps")})})).run()
    Trainer(config).run()
    assert [row["step"] for row in rows(config)] == [8]


def test_a_run_keeps_its_identifier_when_it_goes_on(tiny_config: TinyConfig, interrupt: Interrupt) -> None:
    config = tiny_config()
    interrupt(3, kill(signal.SIGTERM))
    first = Trainer(config).run()
    assert Trainer(config).run()["id"] == first["id"]


def test_a_finished_run_returns_at_once_with_its_summary(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    summary = Trainer(config).run()
    before = {p: p.read_bytes() for p in config.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(trainer, "training_batches", crash)
    assert Trainer(config).run() == summary
    assert {p: p.read_bytes() for p in config.folder.rglob("*") if p.is_file()} == before


def test_a_run_killed_behind_its_last_checkpoint_has_a_summary_when_it_is_run_again(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "summarise", lambda self, state, status: {})
        Trainer(config).run()
    summary = Trainer(config).run()
    assert summary["status"] == "finished"
    assert "train/loss" in summary


def test_a_fresh_run_starts_over(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    first = Trainer(config).run()
    fresh = config.model_copy(update={"run": config.run.model_copy(update={"fresh": True}), "seed": 7})
    second = Trainer(fresh).run()
    assert [row["step"] for row in rows(config)] == list(range(1, 9))
    assert second["id"] != first["id"]
    assert second["train/loss"] != first["train/loss"]


def test_a_folder_that_is_no_run_is_not_deleted(tiny_config: TinyConfig) -> None:
    config = tiny_config("run.fresh=true")
    config.folder.mkdir(parents=True)
    (config.folder / "thesis.txt").write_text("my only copy")
    with pytest.raises(ConfigError, match=r"run\.fresh: .* does not look like a run"):
        Trainer(config).run()
    assert (config.folder / "thesis.txt").read_text() == "my only copy"


def test_another_experiment_under_the_same_name_is_refused_with_the_keys_that_differ(tiny_config: TinyConfig) -> None:
    Trainer(tiny_config("duration=1steps")).run()
    before = weights(tiny_config())
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny_config("seed=2", "optimizer.lr=0.5", "workers=1")).run()
    assert [path for path, _ in caught.value.problems] == ["seed", "optimizer.lr"]
    assert "seed: 1 -> 2" in str(caught.value)
    assert "run.fresh=true starts this one over" in str(caught.value).splitlines()[-1]
    assert "seed: 1\n" in (tiny_config().folder / "config.yaml").read_text()
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_config()).items())


def test_a_longer_duration_goes_on_with_the_same_run(tiny_config: TinyConfig) -> None:
    config = tiny_config("duration=4steps", "warmup=2steps")
    Trainer(config).run()
    summary = Trainer(tiny_config("duration=6steps", "warmup=2steps")).run()
    assert summary["step"] == 6
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4, 5, 6]
    assert rows(config)[5]["train/lr"] > 0


def test_two_runs_of_the_same_configuration_are_equal_and_another_seed_is_not(tiny_config: TinyConfig) -> None:
    one, two = named(tiny_config(), "one"), named(tiny_config(), "two")
    other = named(tiny_config("seed=2"), "other")
    for config in (one, two, other):
        Trainer(config).run()
    assert_same_run(one, two)
    assert rows(one)[0]["train/loss"] != rows(other)[0]["train/loss"]


def spoil(config: TrainConfig, step: int, file: str = "optimizer.safetensors") -> None:
    (checkpoint.step_folder(config.folder, step) / file).write_bytes(b"")


def test_a_damaged_checkpoint_is_passed_over_in_words_and_the_run_is_the_same(
    tiny_config: TinyConfig, interrupt: Interrupt, caplog: pytest.LogCaptureFixture
) -> None:
    whole = with_checkpoint(named(tiny_config(), "whole"), every=Cadence.parse("2steps"), keep=9)
    parted = with_checkpoint(named(whole, "parted"), keep=1)
    Trainer(whole).run()
    interrupt(8, crash)
    with pytest.raises(ZeroDivisionError):
        Trainer(with_checkpoint(parted, keep=9)).run()
    assert steps(parted.folder) == [2, 4, 6]
    spoil(parted, 6)
    spoil(parted, 4, "state.json")
    Trainer(parted).run()
    told = [line for line in caplog.messages if "goes back to step 2" in line]
    assert ["step-00000006" in told[0] and "optimizer.safetensors" in told[0], "state.json" in told[1]] == [True, True]
    assert_same_run(parted, whole)
    left = sorted(path.name for path in (parted.folder / "checkpoints").iterdir())
    assert left == ["damaged-step-00000004", "damaged-step-00000006", "step-00000008"]


def test_where_no_checkpoint_is_sound_the_run_ends_and_nothing_is_deleted(
    tiny_config: TinyConfig, interrupt: Interrupt
) -> None:
    config = with_checkpoint(tiny_config(), every=Cadence.parse("2steps"), keep=9)
    interrupt(5, crash)
    with pytest.raises(ZeroDivisionError):
        Trainer(config).run()
    for step in (2, 4):
        spoil(config, step)
    before = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"no checkpoint of the run is sound(.|\n)*step-00000004(.|\n)*step-00000002"):
        Trainer(config).run()
    assert {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_no_start_for_another_run(tiny_config: TinyConfig) -> None:
    first = named(tiny_config("duration=1steps"), "first")
    Trainer(first).run()
    spoil(first, 1, "model.safetensors")
    with pytest.raises(ConfigError, match=r"init\.weights: .*step-00000001 is damaged: model\.safetensors"):
        Trainer(tiny_config("init.weights=first")).run()

"""The laws of runs: a run stopped and run again is the run that was never stopped."""

import errno
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TinyConfig
from safetensors.torch import load_file
from torch import Tensor

import multimodal
from multimodal import checkpoint, checksums, trainer
from multimodal.batch import Features, Sample
from multimodal.checkpoint import find, load_state, steps
from multimodal.config import ConfigError, RunError, TrainConfig, Weights
from multimodal.data.order import Batches
from multimodal.data.shapes import Shapes
from multimodal.losses.infonce import InfoNCE
from multimodal.parts import BadSample, Dataset, Eval, Report, Source
from multimodal.parts import Encoder as EncoderContract
from multimodal.trainer import Trainer
from multimodal.units import Cadence


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take longer to draw than these runs to train."""

    class Nothing:
        def savefig(self, path: Path, dpi: int) -> None:
            path.write_bytes(b"")

    monkeypatch.setattr(trainer.figures, "curves", lambda rows: Nothing())
    monkeypatch.setattr(trainer.run_folder.provenance, "facts", dict)


def weights(config: TrainConfig, name: str = "model", which: str = "last") -> dict[str, Tensor]:
    return load_file(find(config.folder, which) / f"{name}.safetensors")


def rows(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


CLOCK = ("train/samples_per_s", "train/data_wait")


def assert_same_run(ours: TrainConfig, others: TrainConfig) -> None:
    """Weights, optimizer and all rows of the log but for what the clock says."""
    names = {path.stem for path in find(others.folder).glob("*.safetensors")}
    assert names >= {"model", "optimizer"}
    for name in names:
        mine, theirs = weights(ours, name), weights(others, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    timeless = [[{k: v for k, v in row.items() if k not in CLOCK} for row in rows(c)] for c in (ours, others)]
    assert timeless[0] == timeless[1]


def named(config: TrainConfig, name: str) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def with_checkpoint(config: TrainConfig, **changes: Any) -> TrainConfig:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=changes)})


Interrupt = Callable[[int, Callable[[], None]], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Let something happen in the course of the step with this number, from 1, counted from the call."""

    def at(number: int, happens: Callable[[], None]) -> None:
        original, taken = trainer.training_step, [0]

        def step(*arguments: Any) -> dict[str, Tensor]:
            taken[0] += 1
            if taken[0] == number:
                happens()
            return original(*arguments)

        monkeypatch.setattr(trainer, "training_step", step)

    return at


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def crash() -> None:
    raise ZeroDivisionError


# --- resuming -------------------------------------------------------------------------------------------------------


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
        patch.setattr(Trainer, "_summarise", lambda self, status: {})
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


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_row_says_what_the_step_was(tiny_config: TinyConfig) -> None:
    config = tiny_config("log.every=3steps", "warmup=2steps")
    Trainer(config).run()
    found = rows(config)
    assert [row["step"] for row in found] == [3, 6, 8]
    for row in found:
        assert row["samples"] == 16 * row["step"]
        assert row["train/epoch"] == row["step"] / 4
        assert row["train/lr"] == pytest.approx(0.001 * config.schedule(int(row["step"]) - 1, 2, 8))
        assert row["train/samples_per_s"] > 0
        assert 0 <= row["train/data_wait"] <= 1
        assert "train/finite" not in row


def test_a_run_learns(tiny_config: TinyConfig) -> None:
    config = tiny_config("duration=30steps", "optimizer.lr=0.01")
    Trainer(config).run()
    losses = [row["train/loss"] for row in rows(config)]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_the_folder_of_a_run_has_what_it_says(tiny_config: TinyConfig) -> None:
    config = tiny_config("duration=1steps")
    Trainer(config).run()
    assert {path.name for path in config.folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "figures",
        "metrics.jsonl",
        "summary.json",
        "uncommitted.diff",
    }


def test_a_run_of_no_steps_is_refused_in_words(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError):
        Trainer(tiny_config("duration=0steps", "warmup=0steps")).run()


# --- evaluation -----------------------------------------------------------------------------------------------------

SCORES = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.9}


class Scripted(Eval):
    """Says one score after the other; a negative one stands for what is no number."""

    every: Cadence = Cadence.parse("2steps")
    scores: tuple[float, ...] = tuple(SCORES.values())

    def build(self, root: Path) -> Callable[[EncoderContract], Report]:
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


# --- the mean of the weights ----------------------------------------------------------------------------------------


class Weighs(Eval):
    """Says where the text tower puts one caption, as a number."""

    metrics = ("at",)
    every: Cadence = Cadence.parse("4steps")

    def build(self, root: Path) -> Callable[[EncoderContract], Report]:
        return lambda model: Report({"at": model.encode("text", ["a red circle"])[0, 0].item()})


def test_the_mean_is_evaluated_beside_the_weights_and_kept_with_them(tiny_config: TinyConfig) -> None:
    plain = named(tiny_config().model_copy(update={"evals": {"it": Weighs()}}), "plain")
    config = named(tiny_config("ema.decay=0.9").model_copy(update={"evals": plain.evals}), "mean")
    config = with_checkpoint(config, best="eval_ema/it/at", keep=9)
    Trainer(plain).run()
    summary = Trainer(config).run()
    assert all(torch.equal(value, weights(config)[name]) for name, value in weights(plain).items())
    assert not (find(plain.folder) / "ema.safetensors").exists()
    both = [(row["eval/it/at"], row["eval_ema/it/at"]) for row in rows(config) if "eval/it/at" in row]
    assert [raw for raw, _ in both] == [row["eval/it/at"] for row in rows(plain) if "eval/it/at" in row]
    assert all(raw != mean for raw, mean in both)
    assert load_state(find(config.folder, "best")).best == max(mean for _, mean in both)
    stored = find(config.folder) / "config.yaml"
    elsewhere = {"evals": {}, "checkpoint": plain.checkpoint.model_dump(mode="json")}  # a part of no package
    stored.write_text(yaml.safe_dump({**yaml.safe_load(stored.read_text()), **elsewhere}))
    checksums.write(stored.parent)
    kinds: tuple[Weights, ...] = ("raw", "ema")
    for kind, wanted in zip(kinds, both[-1], strict=True):
        model = multimodal.load(config.folder, weights=kind)
        assert model.encode_text("a red circle")[0, 0].item() == wanted
    assert summary["eval_ema/it/at"] == both[-1][1]


def test_the_mean_is_that_of_the_weights_after_every_step_from_those_before_the_first(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = named(tiny_config(), "first")
    Trainer(first).run()
    config = with_checkpoint(
        tiny_config("ema.decay=0.75", "init.weights=first", "duration=3steps"), every=Cadence.parse("1steps"), keep=9
    )
    Trainer(config).run()
    mean = weights(first)
    for step in (1, 2, 3):
        raw = weights(config, which=str(step))
        mean = {name: 0.75 * value + 0.25 * raw[name] for name, value in mean.items()}
        for name, value in weights(config, "ema", str(step)).items():
            torch.testing.assert_close(value, mean[name])


def test_a_failing_evaluation_of_the_mean_saves_the_weights_as_they_are(tiny_config: TinyConfig) -> None:
    class Fails(Weighs):
        def build(self, root: Path) -> Callable[[EncoderContract], Report]:
            calls = iter((True, False))
            return lambda model: Report({"at": 1.0}) if next(calls) else crash()  # type: ignore[func-returns-value,return-value]

    plain = named(tiny_config("duration=4steps"), "plain")
    Trainer(plain).run()
    config = tiny_config("duration=4steps", "ema.decay=0.9").model_copy(update={"evals": {"it": Fails()}})
    with pytest.raises(ZeroDivisionError):
        Trainer(config).run()
    assert all(torch.equal(value, weights(config)[name]) for name, value in weights(plain).items())


def test_another_decay_is_refused_and_a_run_from_before_there_was_one_goes_on(tiny_config: TinyConfig) -> None:
    config = tiny_config("duration=1steps")
    Trainer(config).run()
    with pytest.raises(ConfigError, match=r"ema\.decay: None -> 0\.9"):
        Trainer(tiny_config("duration=2steps", "ema.decay=0.9")).run()
    stored = find(config.folder) / "config.yaml"
    raw = yaml.safe_load(stored.read_text())
    del raw["ema"]
    stored.write_text(yaml.safe_dump(raw))
    checksums.write(stored.parent)
    multimodal.load(config.folder)
    assert Trainer(tiny_config("duration=2steps")).run()["step"] == 2


# --- what goes wrong ------------------------------------------------------------------------------------------------


class _SomeBroken(Source):
    def __init__(self, source: Source, broken: int) -> None:
        self.source, self.broken = source, broken

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index < self.broken:
            raise BadSample(f"sample/{index}: cannot be read")
        return self.source[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)


class Broken(Dataset):
    """Shapes, of which the first ones cannot be read."""

    broken: int

    def build(self, root: Path) -> Source:
        return _SomeBroken(Shapes(size=64, image_size=32).build(root), self.broken)


def test_too_many_broken_samples_stop_the_run_and_say_why(
    tiny_config: TinyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config().model_copy(update={"dataset": Broken(broken=2)})
    with pytest.raises(RunError, match=r"2 of 100 samples were broken, more than max_broken=0\.01"):
        Trainer(config).run()
    assert "sample/0: cannot be read" in caplog.text
    assert "sample/1: cannot be read" in caplog.text
    assert json.loads((config.folder / "summary.json").read_text())["status"] == "failed"


def test_a_few_broken_samples_are_counted_and_the_run_goes_on(tiny_config: TinyConfig, interrupt: Interrupt) -> None:
    config = tiny_config("max_broken=1.0").model_copy(update={"dataset": Broken(broken=5)})
    whole, parted = named(config, "whole"), named(config, "parted")
    assert Trainer(whole).run()["train/broken_samples"] >= 10
    interrupt(5, kill(signal.SIGTERM))
    Trainer(parted).run()
    Trainer(parted).run()
    assert_same_run(parted, whole)


class Exploding(InfoNCE):
    """Is not a number."""

    def __call__(self, features: Features) -> Tensor:
        return super().__call__(features) * torch.nan


def test_a_run_that_diverges_stops_and_says_so(tiny_config: TinyConfig) -> None:
    losses: Mapping[str, Any] = {"infonce": Exploding()}
    config = tiny_config("log.every=4steps").model_copy(update={"loss": losses})
    with pytest.raises(RunError, match="not finite in 4 of the steps up to 4"):
        Trainer(config).run()
    assert json.loads((config.folder / "summary.json").read_text())["status"] == "failed"
    assert steps(config.folder) == []


def test_the_samples_of_the_first_step_that_was_not_finite_are_named_and_the_checkpoint_before_it_stays(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_checkpoint(tiny_config("log.every=4steps"), every=Cadence.parse("2steps"))
    source, original = config.dataset.build(Path()), trainer.training_step
    expected: list[str] = []

    def step(*arguments: Any) -> dict[str, Tensor]:
        """Spoil a token that some of the third batch's captions have, and some have not."""
        model, batch, (_, number) = arguments[0], arguments[3], arguments[7]
        if number == 2:
            count = Counter(token for row in batch.inputs["text"].tolist() for token in set(row))
            token = next(token for token, rows in count.most_common() if 2 <= rows <= 6)
            rows = (batch.inputs["text"] == token).any(1)
            expected.extend(source.key(index) for index in batch.indices[rows].tolist())
            model.towers["text"].net.token_embedding.weight.data[token] = torch.nan
        return original(*arguments)

    monkeypatch.setattr(trainer, "training_step", step)
    with pytest.raises(RunError, match="first of them is step 3: features that are not finite are those of") as caught:
        Trainer(config).run()
    assert len(expected) > 1
    assert f"those of {', '.join(expected)} ({config.folder / 'not_finite.json'})" in str(caught.value)
    assert json.loads((config.folder / "not_finite.json").read_text()) == {"step": 3, "samples": expected}
    assert steps(config.folder) == [2]
    checkpoint.verify(find(config.folder))


def test_where_all_features_are_finite_the_whole_batch_is_named(tiny_config: TinyConfig) -> None:
    losses: Mapping[str, Any] = {"infonce": Exploding()}
    config = tiny_config("log.every=4steps").model_copy(update={"loss": losses})
    with pytest.raises(RunError, match=r"is step 1: all features were finite; its samples are .* and 8 more"):
        Trainer(config).run()
    (positions,) = Batches(64, config.seed, 16, 0, 1, start=0, stop=1)
    named = json.loads((config.folder / "not_finite.json").read_text())["samples"]
    source = config.dataset.build(Path())
    assert named == [source.key(index) for _, index in positions]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_words_and_the_ones_before_stay(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_checkpoint(tiny_config(), every=Cadence.parse("2steps"), keep=9)
    original = checkpoint.save_file

    def full(tensors: dict[str, Tensor], file: Path) -> None:
        if "00000006" in str(file) and file.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=rf"step 6 cannot be written to {config.folder}: .*No space left on device"):
        Trainer(config).run()
    assert [path.name[-2:] for path in sorted((config.folder / "checkpoints").iterdir())] == ["02", "04"]


def test_fewer_samples_than_a_batch_are_refused_before_the_start(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match="dataset: has 64 samples, fewer than one batch of global_batch_size=65"):
        Trainer(tiny_config("global_batch_size=65")).run()


def test_all_that_cannot_be_opened_is_told_at_once(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config("global_batch_size=65", "evals=[cifar10,flickr8k]", f"paths.datasets={tmp_path}")
    with pytest.raises(ConfigError) as caught:
        Trainer(config).run()
    assert [path for path, _ in caught.value.problems] == ["dataset", "evals.cifar10", "evals.flickr8k"]

"""The laws of early stopping: interrupted or not, a run ends at the same step, and what it has computed is the same."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Interrupt, TinyConfig
from tiny_runs import assert_same_run, crash, kill, named, rows, with_checkpoint

from multimodal.checkpoint import find, load_state
from multimodal.config import ConfigError, TrainConfig
from multimodal.parts import Encoder as EncoderContract
from multimodal.parts import Eval, Report, Sources
from multimodal.patience import Patience
from multimodal.run_folder import is_finished
from multimodal.trainer import Trainer
from multimodal.units import Cadence, Duration

pytestmark = pytest.mark.usefixtures("no_pictures")

CURVE = (0.1, 0.3, 0.2, 0.3, 0.1, 0.9, 0.9, 0.9)
"""A metric's value after each step: not better than after the second until the sixth."""


class Curve(Eval):
    """Reads the step from the log."""

    folder: Path

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("m",)

    def build(self, data: Sources) -> Callable[[EncoderContract], Report]:
        log = self.folder / "metrics.jsonl"
        return lambda _: Report({"m": CURVE[json.loads(log.read_text().splitlines()[-1])["step"] - 1]})


def stopping(config: TrainConfig, **changes: Any) -> TrainConfig:
    asked = config.early_stop.model_copy(update={"metric": "eval/curve/m", "patience": 2, **changes})
    curve = Curve(folder=config.folder, every=Cadence.parse("1steps"))
    late = Curve(folder=config.folder, every=Cadence.parse("never"))
    return config.model_copy(update={"early_stop": asked, "evals": {"curve": curve, "late": late}})


def test_a_run_ends_when_its_metric_was_not_better_for_so_many_evaluations(tiny_config: TinyConfig) -> None:
    config = stopping(tiny_config())
    summary = Trainer(config).run()
    assert (summary["status"], summary["step"]) == ("stopped early", 4)
    assert summary["eval/late/m"] == CURVE[3]  # its last step is the last one to all evaluations
    assert Trainer(config).run() == summary
    assert is_finished(config)


def test_until_then_it_is_the_run_that_does_not_stop(tiny_config: TinyConfig) -> None:
    whole = stopping(tiny_config("duration=4steps", "schedule=constant"), metric=None)
    early = stopping(named(tiny_config("schedule=constant"), "early"))
    whole, early = (one.model_copy(update={"evals": {"curve": one.evals["curve"]}}) for one in (whole, early))
    Trainer(whole).run()
    Trainer(early).run()
    assert_same_run(early, whole)


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("happens", [kill(signal.SIGTERM), crash], ids=["stopped", "crashed"])
def test_an_interrupted_run_stops_at_the_same_step(
    tiny_config: TinyConfig, interrupt: Interrupt, step: int, happens: Callable[[], None]
) -> None:
    config = with_checkpoint(tiny_config(), every=Cadence.parse("1steps"))
    whole, parted = stopping(named(config, "whole")), stopping(named(config, "parted"))
    Trainer(whole).run()
    interrupt(step, happens)
    try:
        Trainer(parted).run()
    except ZeroDivisionError:
        assert happens is crash
    assert Trainer(parted).run()["status"] == "stopped early"
    assert_same_run(parted, whole)


EARLY = "the run stops early"


@pytest.mark.parametrize("part", ["curve", "late"])
def test_a_run_of_which_an_evaluation_fails_at_its_early_end_counts_none_twice(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    config = with_checkpoint(tiny_config(), best="eval/curve/m")
    whole, parted = stopping(named(config, "whole")), stopping(named(config, "parted"))
    with caplog.at_level("INFO"):
        Trainer(whole).run()
    assert len([told for told in caplog.messages if EARLY in told]) == 1  # `late` comes after it was told
    build = Curve.build

    def failing(self: Curve, data: Sources) -> Callable[[EncoderContract], Report]:
        run = build(self, data)
        return lambda encoder: crash() if self == parted.evals[part] and stands_at(4) else run(encoder)

    def stands_at(step: int) -> bool:
        return rows(parted)[-1]["step"] == step

    with monkeypatch.context() as patched:
        patched.setattr(Curve, "build", failing)
        with pytest.raises(ZeroDivisionError):
            Trainer(parted).run()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert Trainer(parted).run()["status"] == "stopped early"
    assert len([told for told in caplog.messages if EARLY in told]) == 1
    assert_same_run(parted, whole)
    stored = [load_state(find(one.folder)) for one in (whole, parted)]
    assert stored[0].patience.waited == 2
    different = {"run_id", "log_bytes"}
    assert stored[1].model_dump(exclude=different) == stored[0].model_dump(exclude=different)


def test_a_larger_patience_goes_on_and_a_longer_duration_does_not(tiny_config: TinyConfig) -> None:
    config = stopping(tiny_config())
    Trainer(config).run()
    longer = config.model_copy(update={"duration": Duration.parse("9steps")})
    assert not is_finished(longer)
    assert Trainer(longer).run()["step"] == 4
    patient = stopping(config, patience=4)
    assert not is_finished(patient)
    summary = Trainer(patient).run()
    assert (summary["status"], summary["step"]) == ("finished", 8)
    assert [row["step"] for row in rows(config) if "eval/curve/m" in row] == list(range(1, 9))


@pytest.mark.parametrize(
    ("values", "mode", "min_delta", "waited"),
    [
        ([1.0, 2.0, 3.0], "max", 0.0, 0),
        ([1.0, 1.0, 1.0], "max", 0.0, 2),
        ([3.0, 2.0, 1.0], "min", 0.0, 0),
        ([1.0, 1.5, 2.0], "max", 0.5, 0),  # small steps add up
        ([1.0, 1.2, 1.3], "max", 0.5, 2),
        ([1.0, math.nan, math.inf], "max", 0.0, 2),
        ([math.nan], "max", 0.0, 1),
    ],
)
def test_what_counts_as_better(values: list[float], mode: Any, min_delta: float, waited: int) -> None:
    patience = Patience()
    for value in values:
        patience = patience.after(value, mode, min_delta)
    assert patience.waited == waited


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["early_stop.metric=eval/shapes/top2"], "Did you mean 'eval/shapes/top"),
        (["early_stop.metric=eval_ema/shapes/top1"], "is not a metric"),
        (["early_stop.metric=eval/shapes/top1", "evals.shapes.every=never"], "evals.shapes.every=never"),
    ],
)
def test_a_metric_that_is_never_found_in_time_is_told_before_the_start(
    tiny_config: TinyConfig, words: list[str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config("evals=[shapes]", *words)
    assert [path for path, _ in caught.value.problems] == ["early_stop.metric"]
    assert told in str(caught.value)

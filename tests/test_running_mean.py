"""The laws of the running mean of the weights: kept, evaluated and continued beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TinyConfig
from tiny_runs import crash, named, rows, weights, with_checkpoint

import multimodal
from multimodal import checksums
from multimodal.checkpoint import find, load_state
from multimodal.config import ConfigError, Weights
from multimodal.parts import Encoder as EncoderContract
from multimodal.parts import Eval, Report, Sources
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")


class Weighs(Eval):
    """Says where the text tower puts one caption, as a number."""

    every: Cadence = Cadence.parse("4steps")

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("at",)

    def build(self, data: Sources) -> Callable[[EncoderContract], Report]:
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

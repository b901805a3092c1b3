"""What goes wrong in a run ends it in words, and the checkpoints before stay."""

import errno
import json
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Interrupt, TinyConfig
from tiny_runs import assert_same_run, kill, named, with_checkpoint
from torch import Tensor
from torch._inductor.exc import InductorError

from multimodal import checkpoint, trainer
from multimodal.batch import Features, Sample
from multimodal.checkpoint import find, steps
from multimodal.config import RunError
from multimodal.data.order import Batches
from multimodal.data.shapes import Shapes
from multimodal.losses.infonce import InfoNCE
from multimodal.parts import BadSample, Dataset, Source
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")


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


def test_a_compiler_that_fails_is_told_in_words(tiny_config: TinyConfig, interrupt: Interrupt) -> None:
    def cut_short() -> None:
        raise InductorError(RuntimeError("file too short"), None)

    interrupt(2, cut_short)
    with pytest.raises(RunError, match=r"compile=true: .*file too short.* delete .*inductor.*; or compile=false"):
        Trainer(tiny_config()).run()

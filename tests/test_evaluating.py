"""The laws of evaluations while training: they change nothing, and say which checkpoint is the best."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyConfig
from tiny_runs import named, rows, weights, with_checkpoint

from multimodal import checkpoint
from multimodal.checkpoint import find, load_state, steps
from multimodal.config import TrainConfig
from multimodal.parts import Encoder as EncoderContract
from multimodal.parts import Eval, Report
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")


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

"""The laws of debug presets: a delta on any experiment, under a name of its own, and one batch is learnt."""

import logging

import pytest
from conftest import TINY, Compose, TinyConfig, composed

from multimodal.cli import CONF
from multimodal.config import TrainConfig, check
from multimodal.evals.one_batch import OneBatch
from multimodal.trainer import Trainer

PRESETS = sorted(path.stem for path in (CONF / "debug").glob("*.yaml"))
OURS = ("run.name=", "duration=", "evals=", "tracker=", "checkpoint.", "global_batch_size=")
SMALL = [word for word in TINY if not word.startswith(OURS)]
"""Towers and data, to which a preset is the delta."""


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_a_preset_is_a_delta_on_any_experiment(compose: Compose, experiment: str, preset: str) -> None:
    config = check(compose(f"experiment={experiment}", f"debug={preset}"), TrainConfig)
    assert config.tracker.target() == "multimodal.tracker.NoTracker"


def small(preset: str, runs: object, *words: str) -> TrainConfig:
    return check(composed(f"debug={preset}", f"run.name={preset}", f"paths.runs={runs}", *SMALL, *words), TrainConfig)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_one_batch_is_learnt_or_it_says_that_it_is_not(tmp_path: object, caplog: pytest.LogCaptureFixture) -> None:
    words = ["global_batch_size=8", "dataset.two_objects=0", "schedule=constant", "log.every=50steps"]
    with caplog.at_level(logging.INFO):
        summary = Trainer(small("one_batch", tmp_path, *words, "duration=150steps")).run()
    assert summary["eval/one_batch/i2t_r1"] == summary["eval/one_batch/t2i_r1"] == 1
    assert "one batch: learnt" in caplog.messages[-2] + caplog.text
    caplog.clear()
    Trainer(small("one_batch", tmp_path, *words, "duration=1steps", "run.name=short")).run()
    assert "one batch: not learnt yet" in caplog.text


@pytest.mark.usefixtures("no_pictures")
def test_a_smoke_run_takes_two_steps_of_everything(tmp_path: object) -> None:
    config = small("smoke", tmp_path, "evals=[]", "checkpoint.best=null", "global_batch_size=16")
    summary = Trainer(config).run()
    assert (summary["status"], summary["step"]) == ("finished", 2)


def test_a_batch_of_the_first_samples_is_what_it_is_evaluated_on(tiny_config: TinyConfig) -> None:
    config = tiny_config("debug=one_batch", "global_batch_size=16", "evals=[one_batch]")
    evaluation = config.evals["one_batch"]
    assert isinstance(evaluation, OneBatch)
    assert evaluation.dataset == config.dataset
    assert evaluation.max_samples == config.max_samples == config.global_batch_size

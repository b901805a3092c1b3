"""The laws of profiles, of compiled towers and of determinism: they change nothing that is computed."""

import gzip
import json

import pytest
import torch
from conftest import TinyConfig
from tiny_runs import CLOCK, assert_same_run, named, rows

from multimodal.config import TrainConfig
from multimodal.trainer import Trainer


def test_a_profile_changes_nothing_and_says_where_the_time_of_a_step_went(tiny_config: TinyConfig) -> None:
    plain = tiny_config("log.every=2steps", "duration=9steps")
    profiled = named(plain.model_copy(update={"profile": True}), "profiled")
    for config in (plain, profiled):
        Trainer(config).run()
    assert_same_run(profiled, plain)
    folder = profiled.folder / "profile"
    seconds = json.loads((folder / "spans.json").read_text())
    whole = seconds.pop("step")
    assert sum(seconds.values()) == pytest.approx(whole)
    assert seconds["rest"] < whole / 2
    assert {"data", "towers", "loss", "backward", "gradients", "optimizer", "vote", "log"} <= seconds.keys()
    with gzip.open(folder / "trace.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"towers", "loss", "backward"} <= names
    assert sorted(path.name for path in folder.iterdir()) == ["spans.json", "trace.json.gz"]


def test_a_run_too_short_for_a_profile_says_so(tiny_config: TinyConfig, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(tiny_config("profile=true", "duration=2steps")).run()
    assert "the run ended before step 4" in caplog.text


def test_a_deterministic_run_asks_for_it_and_the_next_one_does_not(tiny_config: TinyConfig) -> None:
    for wanted in (True, False):
        Trainer(tiny_config(f"deterministic={wanted}", "duration=1steps", f"run.name=deterministic_{wanted}")).run()
        assert torch.are_deterministic_algorithms_enabled() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", ["null", "6"])
def test_compiled_towers_compute_the_same(tiny_config: TinyConfig, micro_batch_size: str) -> None:
    def train(compile: bool) -> TrainConfig:
        config = tiny_config(
            f"compile={compile}",
            f"run.name=compile_{compile}",
            "towers.image.patch_dropout=0.5",
            f"micro_batch_size={micro_batch_size}",
            "duration=3steps",
        )
        Trainer(config).run()
        return config

    compiled, plain = rows(train(True)), rows(train(False))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.pop("train/graph_breaks") == 0
        assert ours.get("train/replay_error", 0.0) < 1e-5
        for name in theirs.keys() - {*CLOCK, "train/replay_error"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name

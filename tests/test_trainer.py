"""What a run is, and what it refuses before it starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyConfig
from tiny_runs import rows
from torch.utils.data import DataLoader

from multimodal import trainer
from multimodal.batch import Batch
from multimodal.config import ConfigError
from multimodal.data import loader, workers
from multimodal.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")


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


def test_a_run_on_a_cpu_takes_no_memory_of_a_gpu(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []

    def loader_of(*given: Any, pin_memory: bool, **more: Any) -> DataLoader[Any]:
        pinned.append(pin_memory)
        return DataLoader(*given, **more)

    def batches(*given: Any) -> Iterator[Batch]:
        with pytest.MonkeyPatch.context() as where_there_is_one:
            where_there_is_one.setattr(torch.cuda, "is_available", lambda: True)
            return loader.training_batches(*given)

    monkeypatch.setattr(workers, "DataLoader", loader_of)
    monkeypatch.setattr(trainer, "training_batches", batches)
    Trainer(tiny_config("duration=1steps")).run()
    assert pinned == [False]


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


def test_fewer_samples_than_a_batch_are_refused_before_the_start(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match="dataset: has 64 samples, fewer than one batch of global_batch_size=65"):
        Trainer(tiny_config("global_batch_size=65")).run()


def test_all_that_cannot_be_opened_is_told_at_once(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config("global_batch_size=65", "evals=[cifar10,flickr8k]", f"paths.datasets={tmp_path}")
    with pytest.raises(ConfigError) as caught:
        Trainer(config).run()
    assert [path for path, _ in caught.value.problems] == ["dataset", "evals.cifar10", "evals.flickr8k"]

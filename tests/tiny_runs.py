"""What is asked of runs in several files of tests."""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from multimodal.checkpoint import find
from multimodal.config import TrainConfig


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


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def crash() -> None:
    raise ZeroDivisionError

"""What tests share: composing a configuration as `train.py` does, and one so small that it trains in a second."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch import Tensor

from multimodal import journal, trainer
from multimodal.cli import CONF, plain, register_plugins
from multimodal.config import TrainConfig, check

Compose = Callable[..., dict[str, Any]]
TinyConfig = Callable[..., TrainConfig]
Interrupt = Callable[[int, Callable[[], None]], None]

TINY = (
    "run.name=tiny",
    "tower@towers.image=vit_tiny",
    "towers.image.image_size=32",
    "towers.image.patch_size=16",
    "towers.image.width=32",
    "towers.image.layers=1",
    "towers.image.heads=1",
    "towers.text.context_length=32",
    "towers.text.width=32",
    "towers.text.layers=1",
    "towers.text.heads=1",
    "towers.text.tokenizer.vocab_size=300",
    "model.embed_dim=16",
    "global_batch_size=16",
    "duration=8steps",
    "log.every=1steps",
    "dataset.size=64",
    "dataset.image_size=32",
    "tracker=none",
    "evals=[]",
    "checkpoint.best=null",
    "checkpoint.every=never",
    "workers=0",
    "device=cpu",
    "precision=fp32",
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums are in the same order everywhere, and small tensors gain nothing from more."""
    torch.set_num_threads(1)


def composed(*overrides: str) -> dict[str, Any]:
    register_plugins()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(hydra_compose("train", list(overrides)))


@pytest.fixture(scope="session")
def compose() -> Compose:
    """The raw configuration of `train.py` with these overrides; `run.name` is "test" unless given."""
    return lambda *overrides: composed("run.name=test", *overrides)


@pytest.fixture(scope="session")
def _tiny_raw() -> dict[str, Any]:
    return composed(*TINY)


@pytest.fixture
def tiny_raw(_tiny_raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A valid configuration of very small towers on 64 samples, in a temporary folder, to be damaged at will."""
    raw = copy.deepcopy(_tiny_raw)
    raw["paths"]["runs"] = str(tmp_path / "runs")
    return raw


@pytest.fixture
def tiny_config(tiny_raw: dict[str, Any], tmp_path: Path) -> TinyConfig:
    """The same, checked; with overrides it is composed anew."""

    def make(*overrides: str) -> TrainConfig:
        raw = composed(*TINY, f"paths.runs={tmp_path / 'runs'}", *overrides) if overrides else tiny_raw
        return check(raw, TrainConfig)

    return make


@pytest.fixture(scope="session")
def tiny_trainer(tmp_path_factory: pytest.TempPathFactory) -> trainer.Trainer:
    """The end of a run of that configuration; nothing may be changed in it or in its folder."""
    config = check(composed(*TINY, f"paths.runs={tmp_path_factory.mktemp('runs')}"), TrainConfig)
    ended = trainer.Trainer(config)
    ended.run()
    return ended


@pytest.fixture(scope="session")
def tiny_run(tiny_trainer: trainer.Trainer) -> Path:
    """Its folder."""
    return tiny_trainer.config.folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take longer to draw than these runs to train."""

    class Nothing:
        def savefig(self, path: Path, dpi: int) -> None:
            path.write_bytes(b"")

    monkeypatch.setattr(journal.figures, "curves", lambda rows: Nothing())
    monkeypatch.setattr(trainer.run_folder.provenance, "facts", dict)


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

"""The laws of memory: how much a step takes, how many rows fit, and what is said when they do not."""

import copy
import json
from typing import Any

import pytest
import torch
from conftest import TinyConfig
from test_micro_batches import FP32, INPUTS, SEED, WIDTH, Noisy, Recorder, model
from test_ranks import on_ranks
from torch import Tensor, nn

from multimodal import distributed, memory
from multimodal.batch import Batch, Features
from multimodal.config import RunError, TrainConfig
from multimodal.losses.infonce import InfoNCE
from multimodal.memory import Peak, micro_batch_that_fits, running_out_is_explained
from multimodal.model import Model
from multimodal.parts import Loss
from multimodal.step import training_step
from multimodal.trainer import Trainer


def test_a_peak_is_what_is_alive_at_once() -> None:
    x = torch.zeros(1000)
    with Peak() as peak:
        a = x + 1
        view = a.view(10, 100)
        del a
        b = view * 2
        del view
        c = b + 1
        del b
        del c
    assert peak.bytes == 2 * 4000
    assert peak.alive == 0


def deep(rows: int = 256, width: int = 64) -> tuple[Model, Batch]:
    one = model()
    for tower in one.towers.values():
        tower.net = nn.Sequential(nn.Linear(INPUTS, width), *(nn.GELU() for _ in range(20)), nn.Linear(width, WIDTH))
    return one.double(), Batch(
        {name: torch.randn(rows, INPUTS, dtype=torch.float64) for name in ("image", "text")}, torch.arange(rows)
    )


class Pull(Loss):
    """Takes next to no memory itself."""

    def needs(self) -> frozenset[str]:
        return frozenset({"image_features", "text_features"})

    def __call__(self, features: Features) -> Tensor:
        return (features.tensors["image_features"] - features.tensors["text_features"]).square().mean()


def test_a_larger_batch_takes_memory_for_its_features_only() -> None:
    losses: dict[str, Loss] = {"pull": Pull()}
    peaks = {}
    for rows in (64, 1024):
        for size in (32, rows):
            one, data = deep(rows)
            with Peak() as peak:
                training_step(one, losses, Recorder(one.parameters(), lr=1), data, FP32, None, size, SEED)
            peaks[rows, size] = peak.bytes
    features, activations = (8 * (1024 - 64) * numbers for numbers in (2 * 4, 20 * 64))
    assert peaks[1024, 1024] - peaks[64, 64] > activations
    assert peaks[1024, 32] - peaks[64, 32] < 5 * features < 0.05 * activations


def test_the_micro_batch_that_fits_grows_with_memory_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    one, data = deep()
    found = []
    losses: dict[str, Loss] = {"pull": Pull()}
    for free in (0.3e6, 0.6e6, 1.2e6, 4e6, 9e6):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free))
        before = copy.deepcopy(one.state_dict())
        found.append(micro_batch_that_fits(one, losses, data, FP32))
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
        assert all(parameter.grad is None for parameter in one.parameters())
        with Peak() as peak:
            training_step(one, losses, Recorder(one.parameters(), lr=0), data, FP32, None, found[-1], SEED)
        assert peak.bytes <= free
        assert peak.bytes > free / 4 or found[-1] == 256
    assert found == sorted(found)
    assert len(set(found)) > 3
    assert found[-1] == 256
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(RunError, match="single row"):
        micro_batch_that_fits(one, losses, data, FP32)


def test_the_losses_of_the_whole_batch_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    one, data = deep()
    logits = 8 * 256**2
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * logits)
    assert micro_batch_that_fits(one, {"pull": Pull()}, data, FP32) > 64
    with pytest.raises(RunError):
        micro_batch_that_fits(one, {"infonce": InfoNCE()}, data, FP32)


@pytest.mark.parametrize("limit", [2, 7, 12, 13])
def test_where_memory_is_really_used_up_the_next_smaller_size_is_tried(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Limited(Noisy):
        def forward(self, inputs: Tensor) -> Tensor:
            features = super().forward(inputs)
            if len(inputs) >= limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return features

    one, data = model(), Batch({k: torch.randn(12, INPUTS).double() for k in ("image", "text")}, torch.arange(12))
    one.towers["image"] = Limited().double()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    before = copy.deepcopy(one.state_dict())
    if limit == 2:
        with pytest.raises(RunError, match="single row"):
            micro_batch_that_fits(one, {"infonce": InfoNCE()}, data, FP32)
    else:
        assert micro_batch_that_fits(one, {"infonce": InfoNCE()}, data, FP32) == {7: 4, 12: 8, 13: 12}[limit]
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert all(parameter.grad is None for parameter in one.parameters())


def test_a_step_with_the_micro_batch_that_fits_does_fit_where_weights_are_most_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, width = model(), 256
    for tower in one.towers.values():
        layers = [module for _ in range(6) for module in (nn.Linear(width, width), nn.GELU())]
        tower.net = nn.Sequential(nn.Linear(INPUTS, width), *layers, nn.Linear(width, WIDTH))
    one = one.double()
    rows = 4096
    data = Batch({k: torch.randn(rows, INPUTS, dtype=torch.float64) for k in one.towers}, torch.arange(rows))
    losses: dict[str, Loss] = {"pull": Pull()}
    found = []
    for free in (60e6, 90e6, 1e9):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free))
        found.append(micro_batch_that_fits(one, losses, data, FP32))
        with Peak() as peak:
            training_step(one, losses, Recorder(one.parameters(), lr=1), data, FP32, None, found[-1], SEED)
        assert peak.bytes <= free
    assert 8 < found[0] < found[1] < rows
    assert found[2] == rows


def test_free_memory_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert 100e6 < free < 1e14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(torch.device("cpu")) < free / 2


def test_running_out_of_memory_names_what_can_be_changed() -> None:
    with pytest.raises(RunError, match="grad_checkpointing"), running_out_is_explained(1, 512, 1024):
        torch.empty(2**58)
    with pytest.raises(RunError, match="micro_batch_size, such as 32"), running_out_is_explained(64, 512, 1024):
        torch.empty(2**58)
    told = pytest.raises(RunError, match=r"512 rows at a time.*global_batch_size=1024")
    with told, running_out_is_explained(None, 512, 1024):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), running_out_is_explained(None, 512, 1024):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.slow
def test_the_trainer_finds_a_size_once_and_computes_the_same_with_it(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(config: TrainConfig) -> list[dict[str, float]]:
        return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]

    whole = tiny_config("run.name=whole")
    Trainer(whole).run()
    calls: list[int] = []

    def find(*arguments: Any) -> int:
        calls.append(len(arguments[2].indices))
        return 6

    monkeypatch.setattr(memory, "micro_batch_that_fits", find)
    auto = tiny_config("run.name=auto", "micro_batch_size=auto")
    Trainer(auto).run()
    for ours, theirs in zip(rows(auto), rows(whole), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
    kept = auto.folder / "micro_batch_size.json"
    assert json.loads(kept.read_text()) == {"micro_batch_size": 6, "rows": 16, "device": "cpu"}
    Trainer(tiny_config("run.name=auto", "micro_batch_size=auto", "duration=9steps")).run()
    assert calls == [16]
    for other in ({"rows": 8}, {"device": "NVIDIA H100"}):
        kept.write_text(json.dumps({"micro_batch_size": 4, "rows": 16, "device": "cpu", **other}))
        steps = 10 + len(calls)
        Trainer(tiny_config("run.name=auto", "micro_batch_size=auto", f"duration={steps}steps")).run()
    assert calls == [16, 16, 16], "on other ranks, or another device, it is found anew"


def test_running_out_in_the_search_is_explained(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def used_up(*_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "_batch_bytes", used_up)
    with pytest.raises(RunError, match=r"search for a micro_batch_size.*global_batch_size=16"):
        Trainer(tiny_config("micro_batch_size=auto", "duration=1steps")).run()


@pytest.mark.parametrize(
    ("knobs", "copies"),
    [
        (("checkpoint.every=2steps",), 1),
        (("checkpoint.every=2steps", "ema.decay=0.9"), 2),
        (("checkpoint.every=2steps", "checkpoint.background=false"), 0),
        (("checkpoint.every=never", "checkpoint.best=null"), 0),
    ],
)
def test_the_search_leaves_room_for_the_copy_that_is_saved(
    knobs: tuple[str, ...], copies: int, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (one, data) = tiny_config(*knobs), deep()
    config.folder.mkdir(parents=True)
    budgets = []

    def sizes(*arguments: Any) -> list[int]:
        budgets.append(arguments[-1])
        return [1]

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(memory, "_batch_bytes", lambda *_: 0)
    monkeypatch.setattr(memory, "_sizes", sizes)
    memory.kept_micro_batch(config, one, data, FP32)
    micro_batch_that_fits(one, config.loss, data, FP32)
    trained = sum(p.nbytes for p in one.parameters() if p.requires_grad)
    weights = sum(x.nbytes for x in one.state_dict().values())
    assert budgets[1] - budgets[0] == (copies * weights + 2 * trained if copies else 0)


def _search_with_other_devices(config: TrainConfig) -> tuple[int, int]:
    """What a rank takes, and how often it searched, where only the first has the device that is written down."""
    searches = []

    def find(*_: Any) -> int:
        searches.append(1)
        return distributed.smallest(4 + distributed.rank())

    memory.micro_batch_that_fits = find  # type: ignore[assignment]
    memory._name = lambda device: f"device {distributed.rank()}"
    one, data = deep(16)
    return memory.kept_micro_batch(config, one, data, FP32), len(searches)


@pytest.mark.slow
def test_ranks_search_together_where_their_devices_differ(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    config.folder.mkdir(parents=True)
    kept = {"micro_batch_size": 8, "rows": 16, "device": "device 0"}
    (config.folder / "micro_batch_size.json").write_text(json.dumps(kept))
    assert on_ranks(2, _search_with_other_devices, config) == [(4, 1), (4, 1)]

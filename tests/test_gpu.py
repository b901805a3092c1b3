"""The laws that only a GPU shows: it computes what a CPU does, nothing waits for it, and runs go on bit for bit."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, Interrupt, TinyConfig, composed
from tiny_runs import CLOCK, assert_same_run, crash, named, rows, weights, with_checkpoint
from torch import Tensor
from torch.amp import GradScaler

import multimodal
from multimodal import checkpoint, step
from multimodal.assemble import Problems, assemble, be_deterministic, evaluate, load, open_evaluations
from multimodal.batch import Batch
from multimodal.config import TrainConfig, check
from multimodal.data.loader import training_batches
from multimodal.data.order import Batches
from multimodal.ema import Ema
from multimodal.memory import FOUND, free_bytes
from multimodal.optim import parameter_groups
from multimodal.parts import Sources
from multimodal.step import replay_tolerance, training_step
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.usefixtures("no_pictures", "as_before"),
]
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once in a process, for deterministic=true
GPU = "device=cuda"
RESNET = ("tower@towers.image=resnet_tiny", "towers.image.image_size=32")
LARGE = 2.0**30
"""A scale at which features in fp16 get gradients beyond its range."""


@pytest.fixture
def as_before() -> Iterator[None]:
    """What is set for a whole process is not left to the tests behind."""
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def tiny(tiny_config: TinyConfig, tmp_path: Path) -> TinyConfig:
    """The same as `tiny_config`, also where the image tower is not a ViT."""

    def make(*words: str) -> TrainConfig:
        if not set(RESNET) <= set(words):
            return tiny_config(*words)
        others = [word for word in TINY if "towers.image" not in word]
        return check(composed(*others, f"paths.runs={tmp_path / 'runs'}", *words), TrainConfig)

    return make


class Training:
    """What a configuration describes, as the trainer puts it together, to be taken step by step."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.source = config.dataset.build(Path(config.paths.datasets))
        self.assembled = assemble(config, self.source, None)
        self.model = self.assembled.model.to(dtype).train()
        tunings = {name: tower.tuning for name, tower in config.towers.items()}
        self.optimizer = config.optimizer.build(parameter_groups(self.model, config.optimizer, tunings))
        order = Batches(len(self.source), config.seed, config.global_batch_size, 0, 1, start=0, stop=100)
        self.batches = training_batches(self.source, self.assembled.readers, order, config.seed, 0)

    def batch(self) -> Batch:
        """The next one, on the device."""
        batch = next(self.batches)
        inputs = self.model.lengths(batch.inputs)
        moved = batch.to(self.model.logit_scale.device)
        return Batch(moved.inputs, moved.indices, moved.ids, lengths=inputs)

    def step(self, batch: Batch, scaler: GradScaler | None = None) -> dict[str, Tensor]:
        config = self.config
        size = config.micro_batch_size
        assert not isinstance(size, str)
        given = self.assembled.context, config.max_grad_norm, size, (config.seed, 0)
        return training_step(self.model, config.loss, self.optimizer, batch, *given, scaler)

    def steps(self, number: int) -> list[dict[str, float]]:
        """What was measured in each."""
        measured = [self.step(self.batch()) for _ in range(number)]
        return [{name: float(value) for name, value in of.items() if value.ndim == 0} for of in measured]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state, copied to the CPU."""
        flat = checkpoint.whole_tensors(Ema(self.model, None), self.optimizer)
        return {f"{file}/{name}": tensor for file, named in flat.items() for name, tensor in named.items()}


# --- a GPU computes what a CPU does ---------------------------------------------------------------------------------

KINDS = {
    "plain": (),
    "clipped": ("max_grad_norm=0.01",),
    "micro-batches": ("micro_batch_size=5",),
    "sigmoid": ("loss=[sigmoid]", "model.logit_bias=-10"),
    "masked": ("loss.infonce.duplicates=masked", "loss.infonce.label_smoothing=0.1"),
    "checkpointed": ("towers.image.grad_checkpointing=true", "towers.text.grad_checkpointing=true"),
    "ResNet": RESNET,
    "both ways": ("towers.text.causal=false", "towers.text.mask_padding=true"),
}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Of weights after three steps of 1e-3: some gradients are all rounding, and AdamW moves by their sign. Lion moves by
nothing else, so that its weights are those of no other device."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_a_cpu(
    tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(step, "kernels", lambda context: nullcontext())  # without TF32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    words = ("optimizer.lr=1e-3", "optimizer.eps=1e-4", *KINDS[kind])
    there, here = (Training(tiny(device, *words), dtype) for device in (GPU, "device=cpu"))
    before = there.tensors()
    for ours, theirs in zip(there.steps(3), here.steps(3), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype]), name
    after = there.tensors()
    for name, value in here.tensors().items():
        if name.startswith("model"):
            torch.testing.assert_close(after[name], value, rtol=0, atol=TOLERANCE[dtype], msg=name)
    assert sum(not torch.equal(value, before[name]) for name, value in after.items() if name in before) > 20


@pytest.mark.parametrize("size", [1, 5, 8])
def test_micro_batches_are_the_whole_batch(tiny_config: TinyConfig, size: int) -> None:
    whole, parts = (Training(tiny_config(GPU, f"micro_batch_size={n}"), torch.float64) for n in ("null", size))
    for ours, theirs in zip(parts.steps(3), whole.steps(3), strict=True):
        assert ours.pop("replay_error") < 1e-12
        assert ours == pytest.approx(theirs, rel=1e-9)
    expected = whole.tensors()
    for name, value in parts.tensors().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_in_less_precision_is_near(tiny_config: TinyConfig, precision: str) -> None:
    exact = Training(tiny_config(GPU), torch.float64)
    rounded = Training(tiny_config(GPU, f"precision={precision}", "micro_batch_size=5"))
    (expected,), (measured,) = exact.steps(1), rounded.steps(1)
    for name in ("loss", "grad_norm", "grad_norm/image", "grad_norm/text"):
        assert measured[name] == pytest.approx(expected[name], rel=2e-2), name
        assert measured[name] != expected[name]
    assert measured["updated"] == 1
    assert measured["replay_error"] <= replay_tolerance(rounded.assembled.context) / 2


def test_evaluations_and_features_are_those_of_a_cpu(tiny_run: Path) -> None:
    evals = (
        "evals=[shapes,shapes_retrieval]",
        "evals.shapes.dataset.size=200",
        "evals.shapes_retrieval.dataset.size=100",
    )
    found, made = {}, {}
    for device in ("cpu", "cuda"):
        others = [word for word in TINY if not word.startswith(("device=", "precision="))]
        config = check(composed(*others, *evals, f"device={device}", "precision=fp32"), TrainConfig)
        problems = Problems()
        evaluations = open_evaluations(config.evals, Sources(config.paths.datasets), problems)
        problems.report()
        _, assembled = load(checkpoint.find(tiny_run), device=device)
        reports = evaluate(evaluations, assembled.encoder(workers=0))
        found[device] = {
            f"{k}/{name}": float(value) for k, report in reports.items() for name, value in report.metrics.items()
        }
        made[device] = multimodal.load(tiny_run, device=device).encode_text(["a red circle", "two green stars"])
    torch.testing.assert_close(made["cuda"], made["cpu"], rtol=0, atol=1e-5)
    assert found["cuda"].keys() == found["cpu"].keys()
    assert len(found["cpu"]) > 5
    for name, value in found["cpu"].items():
        assert found["cuda"][name] == pytest.approx(value, abs=0.02, rel=0.02, nan_ok=True), name


# --- fp16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["null", "5"])
def test_an_overflow_in_fp16_leaves_out_the_update_and_halves_the_scale(tiny_config: TinyConfig, size: str) -> None:
    training = Training(tiny_config(GPU, "precision=fp16", f"micro_batch_size={size}"))
    scaler, batch = GradScaler("cuda", init_scale=2.0**8), training.batch()
    assert float(training.step(batch, scaler)["updated"]) == 1
    scaler.update(LARGE)
    before = training.tensors()
    measured = {name: value.cpu() for name, value in training.step(batch, scaler).items()}
    assert (measured["updated"], measured["finite"], measured["grad_scale"]) == (0, 1, LARGE)
    assert scaler.get_scale() == LARGE / 2
    assert all(torch.equal(value, before[name]) for name, value in training.tensors().items())
    scales = [float(training.step(batch, scaler)["grad_scale"]) for _ in range(30)]
    assert scales[-1] == scales[-2] > 1, "once it is small enough it stays"
    assert any(not torch.equal(value, before[name]) for name, value in training.tensors().items())


def test_a_run_in_fp16_trains(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(GradScaler, init_scale=2.0**26))
    config = tiny_config(GPU, "precision=fp16", "duration=80steps", "optimizer.lr=3e-3")
    Trainer(config).run()
    taken = rows(config)
    assert taken[0]["train/skipped_updates"] == 1
    assert sum(row["train/skipped_updates"] for row in taken[40:]) == 0
    first, last = (sum(row["train/loss"] for row in some) / 8 for some in (taken[:8], taken[-8:]))
    assert last < first - 0.2


# --- nothing waits --------------------------------------------------------------------------------------------------

RUNS = {
    "plain": (),
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16",),
    "micro-batches": ("micro_batch_size=5", "precision=bf16"),
    "mean": ("ema.decay=0.9",),
    "masks": ("towers.image.patch_dropout=0.5", "towers.image.drop_path=0.5", "augment=crop_flip"),
    "Lion": ("optimizer=lion",),
    "Muon": ("optimizer=muon",),
    "sigmoid": ("loss=[sigmoid]", "model.logit_bias=-10"),
    "ids": ("loss.infonce.duplicates=masked",),
    "ResNet": RESNET,
    "both ways": ("towers.text.causal=false", "towers.text.mask_padding=true"),
    "checkpointed": ("towers.image.grad_checkpointing=true", "towers.text.grad_checkpointing=true"),
    "workers": ("workers=1",),
}


@pytest.mark.parametrize("kind", RUNS)
def test_no_step_waits_for_the_device(tiny: TinyConfig, interrupt: Interrupt, kind: str) -> None:
    config = tiny(GPU, "duration=9steps", "log.every=100steps", *RUNS[kind])
    interrupt(4, lambda: torch.cuda.set_sync_debug_mode("error"))
    interrupt(8, lambda: torch.cuda.set_sync_debug_mode("default"))
    assert Trainer(config).run()["status"] == "finished"


def test_batches_come_in_pinned_memory(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original, pinned = Batch.to, []

    def to(batch: Batch, device: torch.device) -> Batch:
        pinned.extend(x.is_pinned() for x in (*batch.inputs.values(), batch.indices, *batch.ids.values()))
        return original(batch, device)

    monkeypatch.setattr(Batch, "to", to)
    Trainer(tiny_config(GPU, "duration=2steps")).run()
    assert len(pinned) >= 8
    assert all(pinned)


# --- bit for bit ----------------------------------------------------------------------------------------------------

EXACT: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bf16, masks": ("precision=bf16", "towers.image.patch_dropout=0.5", "towers.image.drop_path=0.5"),
    "fp16": ("precision=fp16",),
    "micro-batches, mean": ("micro_batch_size=5", "precision=bf16", "ema.decay=0.9"),
    "Muon": ("optimizer=muon",),
    "larger": ("towers.image.width=128", "towers.image.heads=2", "global_batch_size=64", "dataset.size=640"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_deterministic_runs_are_equal_and_go_on_bit_for_bit(
    tiny_config: TinyConfig, interrupt: Interrupt, kind: str
) -> None:
    whole = named(tiny_config(GPU, "deterministic=true", *EXACT[kind]), "whole")
    whole = with_checkpoint(whole, every=Cadence.parse("2steps"))
    again, parted = named(whole, "again"), named(whole, "parted")
    for config in (whole, again):
        Trainer(config).run()
    assert_same_run(again, whole)
    interrupt(6, crash)
    with pytest.raises(ZeroDivisionError):
        Trainer(parted).run()
    assert checkpoint.steps(parted.folder)[-1] == 4
    Trainer(parted).run()
    assert_same_run(parted, whole)


def test_a_checkpoint_is_what_stood_when_it_was_begun(tiny_config: TinyConfig) -> None:
    be_deterministic(True)
    found = []
    for waits in (True, False):
        training = Training(tiny_config(GPU))
        batches = [training.batch() for _ in range(4)]
        for batch in batches:
            training.step(batch)
        if waits:
            torch.cuda.synchronize()
        found.append(training.tensors())
        training.step(batches[0])
    waited, under_way = found
    for name, value in under_way.items():
        assert torch.equal(value, waited[name]), name


# --- compiled, several processes, what fits -------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["null", "6"])
def test_compiled_towers_compute_the_same(tiny_config: TinyConfig, size: str) -> None:
    def train(compile: bool) -> TrainConfig:
        words = ("towers.image.patch_dropout=0.5", f"micro_batch_size={size}", "duration=4steps")
        config = named(tiny_config(GPU, f"compile={compile}", *words), f"compile_{compile}")
        Trainer(config).run()
        return config

    compiled, plain = rows(train(True)), rows(train(False))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.pop("train/graph_breaks") == 0
        for name in theirs.keys() - {*CLOCK, "train/replay_error"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2), name


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_rank_beside_others_computes_the_same(tiny_config: TinyConfig, tmp_path: Path, sharding: str) -> None:
    def words(of: str, *more: str) -> TrainConfig:
        return named(tiny_config(GPU, "deterministic=true", "ema.decay=0.9", "micro_batch_size=5", *more), of)

    alone, member = words("alone"), words("member", f"sharding={sharding}")
    Trainer(alone).run()
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    Trainer(member).run()
    assert not dist.is_initialized()
    expected = weights(alone)
    for name, value in weights(member).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0 if sharding == "none" else 1e-4, msg=name)


def test_micro_batches_that_fit_are_found(tiny_config: TinyConfig) -> None:
    config = tiny_config(GPU, "micro_batch_size=auto", "duration=2steps")
    before = free_bytes(torch.device("cuda", 0))
    held: Any = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert before - free_bytes(torch.device("cuda", 0)) == pytest.approx(2**28, rel=0.2)
    del held
    assert free_bytes(torch.device("cuda", 0)) == pytest.approx(before, rel=0.05), "what torch keeps may be used again"
    Trainer(config).run()
    assert '"micro_batch_size": 16' in (config.folder / FOUND).read_text()

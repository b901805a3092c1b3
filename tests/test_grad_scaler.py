"""The laws of precision fp16: scaled gradients are the same gradients, and one that overflows costs one update."""

import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import test_micro_batches as micro
import torch
from conftest import Interrupt, TinyConfig
from test_ranks import mine, on_ranks
from test_step import ROWS, Build, Spoilt, adamw, batch, lion, muon, small_model, snapshot
from tiny_runs import assert_same_run, crash, named, rows, with_checkpoint
from torch import Tensor
from torch.amp import GradScaler

from multimodal import checkpoint, distributed, trainer
from multimodal.batch import Batch, Features
from multimodal.config import ConfigError
from multimodal.dry_run import dry_run
from multimodal.ema import Ema
from multimodal.losses.infonce import InfoNCE
from multimodal.model import Model
from multimodal.parts import Loss
from multimodal.step import training_step
from multimodal.trainer import Trainer
from multimodal.units import Cadence

pytestmark = pytest.mark.usefixtures("no_pictures")
FP32, FP16 = (torch.autocast("cpu", torch.float16, enabled=enabled) for enabled in (False, True))
INFONCE: dict[str, Loss] = {"infonce": InfoNCE()}
LARGE = 2.0**30
"""A scale at which features in fp16 get gradients beyond its range."""


def in_float32(seed: int = 0) -> Batch:
    return Batch({name: x.float() for name, x in batch(seed).inputs.items()}, torch.arange(ROWS))


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_whose_gradients_are_scaled_is_the_step_whose_gradients_are_not(
    size: int | None, max_grad_norm: float | None, dtype: torch.dtype
) -> None:
    data = micro.batch()
    data = Batch({name: x.to(dtype) for name, x in data.inputs.items()}, data.indices, data.ids)
    ours, theirs = (micro.model().to(dtype) for _ in range(2))
    before = {name: p.clone() for name, p in ours.named_parameters()}
    scaler = GradScaler("cpu", init_scale=2.0**20)
    steps = [(one, torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, fused=True)) for one in (ours, theirs)]
    for number in range(3):
        given = data, FP32, max_grad_norm, size, (0, number)
        scaled, plain = (
            training_step(one, micro.LOSSES, optimizer, *given, with_)
            for (one, optimizer), with_ in zip(steps, (scaler, None), strict=True)
        )
        assert scaled.pop("grad_scale") == 2.0**20
        assert scaled.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(scaled[name], value, msg=name)
        assert scaled["updated"] == scaled["finite"] == 1
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), msg=name)
        assert not torch.equal(p, before[name])


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("build", [adamw, lion, muon])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(build: Build, size: int | None) -> None:
    model = small_model().float()
    optimizer, ema = build(model), Ema(model, 0.9)
    scaler = GradScaler("cpu", init_scale=2.0**8)

    def step(number: int) -> dict[str, Tensor]:
        measured = training_step(model, INFONCE, optimizer, in_float32(number), FP16, 1.0, size, (0, 0), scaler)
        ema.update(measured["updated"])
        return measured

    assert step(0)["updated"] == 1
    scaler.update(LARGE)
    before, means = snapshot(model, optimizer), [mean.clone() for mean in ema.means]
    assert any(not torch.equal(mean, p) for mean, p in zip(means, ema.weights, strict=True))
    measured = step(1)
    assert (measured["updated"], measured["finite"], measured["grad_scale"]) == (0, 1, LARGE)
    assert not measured["grad_norm"].isfinite()
    assert scaler.get_scale() == LARGE / 2
    after = snapshot(model, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(mean, old) for mean, old in zip(ema.means, means, strict=True))

    scales = [float(step(1)["grad_scale"]) for _ in range(30)]
    assert scales[:2] == [LARGE / 2, LARGE / 4]
    assert scales[-1] == scales[-2] > 1, "once it is small enough it stays"
    assert any(not torch.equal(value, before[name]) for name, value in snapshot(model, optimizer).items())


def test_the_scale_doubles_after_so_many_updates_in_a_row() -> None:
    model = small_model().float()
    optimizer, scaler = adamw(model), GradScaler("cpu", init_scale=4.0, growth_interval=2)
    losses: dict[str, Loss] = {"sometimes": _Sometimes(broken=(2,))}
    scales = []
    for number in range(7):
        data = Batch(in_float32().inputs, torch.arange(ROWS), {"step": torch.tensor(number)})
        scales.append(
            float(training_step(model, losses, optimizer, data, FP32, 1.0, None, (0, 0), scaler)["grad_scale"])
        )
    assert scales == [4, 4, 8, 4, 4, 8, 8]


class _Sometimes(InfoNCE):
    """Has a gradient that is not finite at some steps."""

    broken: tuple[int, ...]

    def __call__(self, features: Features) -> Tensor:
        loss = super().__call__(features)
        return loss + Spoilt()(features) if int(features.ids["step"]) in self.broken else loss


class _NotFinite(InfoNCE):
    """Overflows by itself."""

    def __call__(self, features: Features) -> Tensor:
        return super().__call__(features) * torch.inf


@pytest.mark.parametrize("size", [None, 4])
def test_what_no_scale_mends_is_an_alarm(size: int | None) -> None:
    def step(data: Batch, losses: dict[str, Loss], scaler: GradScaler) -> tuple[float, float]:
        model = small_model().float()
        measured = training_step(model, losses, adamw(model), data, FP32, 1.0, size, (0, 0), scaler)
        return float(measured["finite"]), float(measured["updated"])

    spoilt: dict[str, Loss] = {"infonce": InfoNCE(), "spoilt": Spoilt()}
    scaler = GradScaler("cpu", init_scale=2.0)
    assert step(in_float32(), spoilt, scaler) == (1, 0)
    assert scaler.get_scale() == 1
    assert step(in_float32(), spoilt, scaler) == (0, 0), "at a scale of 1"

    broken = in_float32()
    broken.inputs["text"][0, 0] = torch.nan
    assert step(broken, INFONCE, GradScaler("cpu")) == (0, 0)
    assert step(broken, {"spoilt": Spoilt()}, GradScaler("cpu")) == (0, 0), "no loss has read the features"
    assert step(in_float32(), {"loss": _NotFinite()}, GradScaler("cpu")) == (0, 0), "all features are finite"


# --- ranks ----------------------------------------------------------------------------------------------------------


def _steps_with_an_overflow(size: int | None) -> tuple[dict[str, Tensor], list[dict[str, float]], float]:
    """Three steps; in the second one a gradient overflows on the second rank."""
    one = micro.model().float()
    data = micro.batch()
    inputs = {k: mine(x).float() for k, x in data.inputs.items()}
    share = Batch(inputs, mine(data.indices), {"caption": mine(data.ids["caption"])})
    optimizer, scaler = adamw(one), GradScaler("cpu", init_scale=2.0**8)
    found = []
    for number in range(3):
        hook = (
            one.towers["image"]
            .net[0]
            .weight.register_hook(  # type: ignore[union-attr,index,operator]
                lambda grad, number=number: grad * torch.inf if number == distributed.rank() == 1 else grad
            )
        )
        before = {name: p.detach().clone() for name, p in one.named_parameters()}
        measured = training_step(one, INFONCE, optimizer, share, FP32, 1.0, size, (0, number), scaler)
        hook.remove()
        moved = any(not torch.equal(p, before[name]) for name, p in one.named_parameters())
        names = ("grad_scale", "updated", "finite")
        found.append({"moved": moved, **{name: float(measured[name]) for name in names}})
    return {name: p.detach() for name, p in one.named_parameters()}, found, scaler.get_scale()


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 3])
def test_an_overflow_on_one_rank_leaves_out_the_update_on_all(size: int | None) -> None:
    (ours, measured, scale), (theirs, others, other_scale) = on_ranks(2, _steps_with_an_overflow, size)
    assert [(one["updated"], one["moved"], one["finite"]) for one in measured] == [(1, 1, 1), (0, 0, 1), (1, 1, 1)]
    assert [one["grad_scale"] for one in measured] == [2.0**8, 2.0**8, 2.0**7]
    assert measured == others
    assert scale == other_scale == 2.0**7
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [dry_run, lambda config: Trainer(config).run()])
def test_training_in_fp16_is_refused_on_a_cpu(start: Any, tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match="precision: fp16 is for training on a GPU"):
        start(tiny_config("precision=fp16"))


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a CPU were made for it, with a scale that overflows at first and soon grows."""
    monkeypatch.setattr(trainer, "check_precision", lambda *_: None)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(GradScaler, init_scale=2.0**26, growth_interval=3))


@pytest.mark.parametrize("micro_batch_size", ["null", "6"])
@pytest.mark.usefixtures("on_a_cpu", "no_pictures")
def test_a_run_in_fp16_that_crashed_and_goes_on_is_the_run_that_did_not(
    tiny_config: TinyConfig, interrupt: Interrupt, micro_batch_size: str
) -> None:
    words = ("precision=fp16", "log.every=4steps", "duration=24steps", "ema.decay=0.9", "optimizer.lr=1e-4")
    whole = named(tiny_config(*words, f"micro_batch_size={micro_batch_size}"), "whole")
    whole = with_checkpoint(whole, every=Cadence.parse("3steps"))
    parted = named(whole, "parted")
    Trainer(whole).run()
    for number in (5, 9):
        interrupt(number, crash)
        with pytest.raises(ZeroDivisionError):
            Trainer(parted).run()
    Trainer(parted).run()
    assert_same_run(parted, whole)
    logged = rows(whole)
    scales = [row["train/grad_scale"] for row in logged]
    assert logged[0]["train/skipped_updates"] == 4
    assert min(row["train/skipped_updates"] for row in logged) < 2
    assert min(scales) < 2.0**24
    assert any(later > earlier for earlier, later in pairwise(scales)), scales
    stored = checkpoint.load_state(checkpoint.find(whole.folder))
    assert stored.grad_scaler == checkpoint.load_state(checkpoint.find(parted.folder)).grad_scaler
    assert stored.grad_scaler is not None
    assert stored.grad_scaler["growth_interval"] == 3


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_from_before_there_was_a_scale_goes_on_and_others_have_none(
    tiny_config: TinyConfig, interrupt: Interrupt
) -> None:
    config = with_checkpoint(tiny_config(), every=Cadence.parse("2steps"))
    interrupt(4, crash)
    with pytest.raises(ZeroDivisionError):
        Trainer(config).run()
    folder = checkpoint.find(config.folder)
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("grad_scaler") is None
    assert state.pop("skipped_updates") == 0
    (folder / "state.json").write_text(json.dumps({**state, "checksums": False}))
    (folder / "SHA256SUMS").unlink()
    Trainer(config).run()
    assert [row["step"] for row in rows(config)] == list(range(1, 9))
    assert not any("train/grad_scale" in row or "train/skipped_updates" in row for row in rows(config))


@pytest.mark.usefixtures("no_pictures")
def test_the_mean_of_the_weights_stays_where_an_update_is_left_out(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.training_step
    means: list[list[Tensor]] = []
    one = Trainer(tiny_config("ema.decay=0.5", "duration=3steps", "log.every=3steps"))

    def step(model: Model, *arguments: Any) -> dict[str, Tensor]:
        means.append([mean.clone() for mean in one.ema.means])
        measured = original(model, *arguments)
        return {**measured, "updated": measured["updated"] * (len(means) != 2)}

    monkeypatch.setattr(trainer, "training_step", step)
    one.run()
    first, second, third = means
    assert all(torch.equal(mean, old) for mean, old in zip(third, second, strict=True))
    assert not any(torch.equal(mean, old) for mean, old in zip(second, first, strict=True) if mean.ndim)

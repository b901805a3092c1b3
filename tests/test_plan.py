"""The laws of planning: what is rehearsed is what a step takes, and nothing is needed that one does not have."""

import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY, TinyConfig
from hydra import compose, initialize_config_dir

from multimodal import checkpoint, distributed, rehearsal
from multimodal.assemble import assemble
from multimodal.cli import CONF, plain, register_plugins
from multimodal.config import ConfigError, check
from multimodal.ema import Ema
from multimodal.hardware import Hardware
from multimodal.memory import Peak
from multimodal.optim import parameter_groups
from multimodal.plan import PlanConfig, Planner
from multimodal.step import kernels, training_step
from multimodal.trainer import Trainer

HARDWARE = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))
CPU = (*TINY, "hardware=cpu")
RESNET = ("tower@towers.image=resnet_tiny", "precision=fp32")
FROZEN = "towers.image.tuning.frozen=all"


def configured(*overrides: str) -> PlanConfig:
    register_plugins()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(plain(compose("plan", list(overrides))), PlanConfig)


def planner(*overrides: str) -> Planner:
    words = [word for word in CPU if RESNET[0] not in overrides or "towers.image" not in word]
    return Planner(configured(*words, *overrides))


@cache
def published(architecture: str) -> Planner:
    return Planner(configured(*TINY[-5:], "run.name=x", f"architecture=open_clip/{architecture}"))


# --- FLOPs and parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "millions", "gflops"),
    [("ViT-B-32", 151.28, 14.78), ("ViT-L-14", 427.62, 175.33), ("ViT-g-14", 1366.68, 581.15)],
)
def test_parameters_and_full_form_are_those_that_open_clip_publishes(
    architecture: str, millions: float, gflops: float
) -> None:
    """Its `docs/model_profile.csv` counts 2 for a multiplication with its addition, attention's products among them."""
    sizes = published(architecture).towers().values()
    beside = 1  # the scale
    assert round((sum(size.parameters for size in sizes) + beside) / 1e6, 2) == millions
    assert sum(size.full_form_flops for size in sizes) / 1e9 == pytest.approx(gflops, rel=1e-3)
    assert all(size.forward_flops <= size.full_form_flops for size in sizes)


def test_training_is_one_forward_and_two_backward_products_but_for_the_first_layer() -> None:
    one = planner()
    forward = sum(size.forward_flops for size in one.towers().values())
    assert 2.4 * forward < one.training_flops() - one._loss.flops / one.rows <= 3 * forward


def test_micro_batches_cost_a_second_forward_pass() -> None:
    whole, divided = planner(), planner("micro_batch_size=4")
    forward = sum(size.forward_flops for size in whole.towers().values())
    assert divided.training_flops() == pytest.approx(whole.training_flops() + forward)


def test_checkpointing_costs_a_second_forward_pass_of_the_blocks() -> None:
    kept, again = planner(), planner("towers.image.grad_checkpointing=true", "towers.text.grad_checkpointing=true")
    forward = sum(size.forward_flops for size in kept.towers().values())
    assert kept.training_flops() < again.training_flops() <= kept.training_flops() + forward


def test_a_frozen_tower_costs_its_forward_pass_only() -> None:
    trained, frozen = planner(), planner(FROZEN)
    image, text = (frozen.towers()[name] for name in ("image", "text"))
    assert image.trained == 0 < image.parameters
    assert frozen.training_flops() < trained.training_flops() - image.forward_flops
    of_text = 3 * text.forward_flops + 3 * frozen._loss.flops / frozen.rows
    assert frozen.training_flops() == pytest.approx(image.forward_flops + of_text, rel=0.03)


def test_kept_features_cost_nothing() -> None:
    kept = planner(FROZEN, "towers.image.tuning.keep_features=true")
    image = kept.towers()["image"]
    assert kept.training_flops() < planner(FROZEN).training_flops() - 0.9 * image.forward_flops


# --- memory ---------------------------------------------------------------------------------------------------------


def really(config: PlanConfig) -> int:
    """Bytes that exist at the peak of a second step, with real tensors."""
    source = config.dataset.build(Path())
    assembled = assemble(config, source, None)
    model = assembled.model.train()
    tunings = {name: tower.tuning for name, tower in config.towers.items()}
    optimizer = config.optimizer.build(parameter_groups(model, config.optimizer, tunings))
    rehearsal = Planner(config).rehearsal
    batch = rehearsal.batch(config.global_batch_size)
    real: Any = lambda tensors: {k: torch.zeros(x.shape, dtype=x.dtype) for k, x in tensors.items()}  # noqa: E731
    ids = torch.arange(config.global_batch_size)
    batch = type(batch)(real(batch.inputs), ids, {"caption": ids, "label": ids}, pooled=real(batch.pooled))
    context = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
    size: Any = config.micro_batch_size
    held: list[torch.Tensor] = [*model.parameters(), *model.buffers(), *Ema(model, config.ema.decay).means]
    for _ in range(2):
        state = [x for one in optimizer.state.values() for x in one.values()]
        with Peak([*held, *state, *batch.inputs.values(), ids]) as peak:
            training_step(model, config.loss, optimizer, batch, context, config.max_grad_norm, size, (0, 0))
    return sum(x.nbytes for x in [*held, *state]) + rehearsal.bytes_of(config.global_batch_size) + peak.bytes


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("global_batch_size=64",),
        ("precision=bf16", "global_batch_size=64"),
        ("global_batch_size=64", "micro_batch_size=8"),
        ("global_batch_size=64", "micro_batch_size=8", "loss=[sigmoid]", "model.logit_bias=-10.0"),
        ("global_batch_size=64", "towers.text.grad_checkpointing=true", "loss.infonce.duplicates=masked"),
        ("global_batch_size=64", "optimizer=muon", "ema.decay=0.9"),
        (*RESNET, "global_batch_size=64"),
        (FROZEN, "global_batch_size=64", "micro_batch_size=16"),
    ],
)
def test_planned_memory_is_what_a_real_step_takes(overrides: tuple[str, ...]) -> None:
    vocabulary = "towers.text.vocab_size=300"
    one = planner(vocabulary, *overrides)
    assert one.memory(one.micro_batch_size).peak == pytest.approx(
        really(one.config), rel=0.07
    )  # less than 0.01 but for checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("ema.decay=0.9", FROZEN), ("optimizer=lion",), ("optimizer=muon",)])
def test_a_checkpoint_that_is_written_while_a_cpu_trains_is_there_twice(
    tiny_config: TinyConfig, words: tuple[str, ...]
) -> None:
    config = tiny_config("towers.text.vocab_size=300", *words)
    one = Trainer(config)
    one.run()
    files = checkpoint.whole_tensors(one.ema, one.optimizer)
    copied = sum(x.nbytes for tensors in files.values() for x in tensors.values())
    found = {
        name: planner("towers.text.vocab_size=300", *words, *more).memory(None)
        for name, more in {
            "never": (),
            "during": ("checkpoint.every=4steps",),
            "waiting": ("checkpoint.every=4steps", "checkpoint.background=false"),
            "on a GPU": ("checkpoint.every=4steps", "hardware=a100"),
        }.items()
    }
    assert {name: memory.checkpoint for name, memory in found.items() if memory.checkpoint} == {"during": copied}
    assert found["during"].peak == found["never"].peak + copied == found["waiting"].peak + copied


def test_checkpointed_blocks_take_less_than_half() -> None:
    deep = ("global_batch_size=256", "towers.image.layers=6", "towers.text.layers=6")
    kept, again = (planner(*deep).memory(None, grad_checkpointing=on) for on in (False, True))
    assert again.activations < kept.activations / 2


def test_activations_are_linear_in_the_rows_of_a_rank() -> None:
    found = (planner(f"global_batch_size={rows}").memory(None) for rows in (1024, 2048, 4096))
    few, more, most = (memory.peak - memory.loss for memory in found)  # the peak of smaller batches is in a tower
    assert most - more == pytest.approx(2 * (more - few), rel=0.001)


def test_a_rank_of_several_has_its_own_rows_and_sums_gradients_once() -> None:
    one, eight = planner("global_batch_size=16"), planner("global_batch_size=128", "num_gpus=8")
    before, after = one.memory(None), eight.memory(None)
    assert after.batch == before.batch
    assert 0 <= after.peak - before.peak <= after.gradients + after.loss
    assert not torch.distributed.is_initialized()


def test_sharding_divides_what_ranks_hold_alike() -> None:
    whole, share = (planner("num_gpus=4", f"sharding={kind}").memory(None) for kind in ("none", "full"))
    assert 4 * share.optimizer == pytest.approx(whole.optimizer, rel=0.01)
    assert 4 * share.gradients == pytest.approx(whole.gradients, rel=0.01)


def test_under_autocast_of_a_gpu_norms_are_in_float32_and_attention_is_fused() -> None:
    context = torch.autocast("cpu", torch.bfloat16)
    x = torch.randn(1, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for kind, gpu in (("cpu", nullcontext()), ("gpu", rehearsal.kernels_of_a_gpu())):
        with context, kernels(context), gpu:
            norm, attended = F.layer_norm(x, (4,)), F.scaled_dot_product_attention(x, x, x)
        found[kind] = norm.dtype, "Flash" in str(attended.grad_fn)
    assert found == {"cpu": (torch.bfloat16, False), "gpu": (torch.float32, True)}
    memory = {kind: planner("precision=bf16", f"hardware={kind}").memory(None) for kind in ("cpu", "a100")}
    assert memory["a100"].activations < memory["cpu"].activations


def test_the_largest_micro_batch_fits_and_twice_as_many_do_not() -> None:
    at_128 = planner("global_batch_size=512", "micro_batch_size=128").memory(128).peak
    memory = f"hardware.memory_gb={1.01 * at_128 / 1e9 / 0.9}"
    one = planner("global_batch_size=512", memory)
    assert not one.fits(one.memory(None))
    assert one.largest_micro_batch() == 128
    assert one.fits(one.memory(128))
    assert not one.fits(one.memory(256))
    assert "micro_batch_size=128" in list(one.helps())
    assert planner("global_batch_size=512", memory, "micro_batch_size=auto").micro_batch_size == 128


def test_where_the_copy_of_a_checkpoint_does_not_fit_waiting_for_the_write_helps() -> None:
    peak = planner("global_batch_size=64").memory(None).peak
    one = planner("global_batch_size=64", "checkpoint.every=4steps", f"hardware.memory_gb={1.01 * peak / 1e9 / 0.9}")
    assert not one.fits(one.memory(None))
    assert "checkpoint.background=false" in list(one.helps())


def test_what_is_said_to_help_does() -> None:
    """Of each setting by itself."""
    peak = planner("global_batch_size=512").memory(None).peak
    base = ("global_batch_size=512", "num_gpus=2", f"hardware.memory_gb={0.3 * peak / 1e9 / 0.9}")
    helps = list(planner(*base).helps())
    assert helps
    for words in helps:
        helped = planner(*base, *words.split())
        assert helped.fits(helped.memory(helped.micro_batch_size)), words


# --- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_says_all_that_is_known_of_it(name: str) -> None:
    text = (CONF / "hardware" / f"{name}.yaml").read_text()
    raw = yaml.safe_load(text)
    hardware = Hardware.model_validate(raw)
    assert set(raw) == set(Hardware.model_fields)
    assert set(raw["tflops"]) == {"fp32", "bf16", "fp16"}
    assert text.startswith("#")
    assert "Peak:" in text
    assert hardware.precision("auto") == ("fp32" if hardware.tflops.bf16 is None else "bf16")


def test_a_gpu_without_bf16_is_planned_with_in_fp16() -> None:
    plans = [planner("precision=fp16", f"hardware={name}", "micro_batch_size=32") for name in ("v100", "a100")]
    other = planner("precision=bf16", "hardware=a100", "micro_batch_size=32")
    assert plans[1].memory(None) == other.memory(None)
    assert plans[0].samples_per_s() < plans[1].samples_per_s() == other.samples_per_s()


def test_time_is_samples_by_rate_and_cost_is_hours_by_price() -> None:
    one = planner("duration=1Msamples", "num_gpus=2", "hardware.price_per_hour=3.0")
    time = one.time()
    assert time is not None
    assert time.samples == time.steps * 16 >= 1_000_000
    assert time.hours * 3600 * one.samples_per_s() == pytest.approx(time.samples)
    assert time.gpu_hours == 2 * time.hours
    assert time.dollars == pytest.approx(3 * time.gpu_hours)
    faster = planner("duration=1Msamples", "num_gpus=2", "utilisation=0.3")
    assert faster.samples_per_s() == pytest.approx(2 * one.samples_per_s())


def test_epochs_need_the_size_of_the_data_and_the_data_itself_is_not_opened() -> None:
    data = ("dataset=shards", "dataset.urls=nowhere.tar", "duration=3epochs")
    overrides = [word for word in CPU if not word.startswith("dataset.")]
    assert Planner(configured(*overrides, *data)).time() is None
    time = Planner(configured(*overrides, *data, "samples_per_epoch=1600")).time()
    assert time is not None
    assert time.samples == 4800


def test_a_learnt_vocabulary_has_its_most_tokens() -> None:
    few, most = (planner(f"towers.text.tokenizer.vocab_size={size}").towers()["text"] for size in (300, 4096))
    assert most.parameters - few.parameters == 3796 * 32


def test_problems_are_said_together() -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*TINY[:-1], "hardware=v100", "precision=bf16", "num_gpus=3", "utilisation=2.0")
    assert {path for path, _ in caught.value.problems} == {"precision", "global_batch_size", "utilisation"}
    with pytest.raises(ConfigError, match="batch norm"):
        planner(*RESNET, "micro_batch_size=4")


def test_ranks_that_are_pretended_are_gone_afterwards() -> None:
    with distributed.pretended(4):
        assert distributed.world_size() == 4
        assert distributed.gather(torch.zeros(2, 3)).shape == (8, 3)
    assert distributed.world_size() == 1


@pytest.mark.slow
def test_what_does_not_fit_ends_with_status_1_and_says_what_helps(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "plan.py"
    words = (*CPU, "global_batch_size=512", "hardware.memory_gb=0.02", f"out={tmp_path / 'plan.json'}")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "micro_batch_size=" in done.stderr
    assert '"fits": false' in (tmp_path / "plan.json").read_text()

"""The laws of configurations: every mistake is told, at once, by dotted path, before anything expensive starts."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Compose, TinyConfig

from multimodal.cli import CONF
from multimodal.config import ConfigError, TrainConfig, _broken_rules, changed_identity, check

EXPERIMENT = """\
# @package _global_
defaults:
  - override /dataset: image_folder
  - override /evals: []
optimizer:
  weigth_decay: 0.2
  lr: fast
seed: -1
schedule:
  _target_: multimodal.optim.AdamW
model:
  logit_scale: 200.0
checkpoint:
  best: null
"""
MISTAKES = {
    "optimizer.weigth_decay": "unknown key. Did you mean 'weight_decay'?",
    "optimizer.lr": "got 'fast'",
    "seed": "greater than or equal to 0, got -1",
    "schedule._target_": "'AdamW' is the wrong kind of part",
    "dataset.path": "no value given",
    "model.logit_scale": "200.0 is above max_logit_scale=100.0",
}


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    """A folder for Hydra's search path with an experiment full of mistakes."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "hasty.yaml").write_text(EXPERIMENT)
    return tmp_path / "conf"


def problems(raw: dict[str, Any]) -> dict[str, str]:
    """What check says, by path; every path comes once."""
    with pytest.raises(ConfigError) as caught:
        check(raw, TrainConfig)
    assert len({path for path, _ in caught.value.problems}) == len(caught.value.problems)
    return dict(caught.value.problems)


def put(raw: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    inner = raw
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return raw


def test_all_mistakes_of_an_experiment_are_told_at_once(compose: Compose, experiments: Path) -> None:
    found = problems(compose(f"hydra.searchpath=[file://{experiments}]", "experiment=hasty"))
    assert found.keys() == MISTAKES.keys()
    for path, text in MISTAKES.items():
        assert text in found[path]


@pytest.mark.slow
def test_the_program_refuses_such_an_experiment_before_it_loads_any_tower(experiments: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(CONF.parent / "train.py"), "experiment=hasty"]
    command += [f"hydra.searchpath=[file://{experiments}]", f"paths.runs={tmp_path / 'runs'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "RANK": "0"})
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    told = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    headline, *told = told
    assert headline == f"{len(MISTAKES)} problems in the configuration:"
    assert {line.strip().split(": ")[0] for line in told} == MISTAKES.keys()
    assert "torch" in imported
    assert not {"open_clip", "torchvision", "multimodal.trainer", "wandb"} & imported
    assert not (tmp_path / "runs").exists()


def test_the_good_configuration_passes_and_breaks_no_rule(tiny_config: TinyConfig) -> None:
    assert _broken_rules(tiny_config(), whole=True) == []


def test_the_default_configuration_passes(compose: Compose) -> None:
    assert check(compose(), TrainConfig).run.name == "test"


RULES = {
    "loss.infonce": ("loss.infonce.pair", ["image", "audio"], "needs audio_features; there are"),
    "warmup": ("warmup", "9steps", "9steps is longer than duration=8steps"),
    "duration": ("duration", "0steps", "trains nothing"),
    "checkpoint.best": ("checkpoint.best", "eval/shapes/top1", "is not a metric of an evaluation. There are: none"),
    "early_stop.metric": ("early_stop.metric", "eval/shapes/top1", "is not a metric of an evaluation. There are: none"),
    "model.logit_scale": ("model.logit_scale", 100.1, "is above max_logit_scale"),
    "log.every": ("log.every", "1minutes", "should be in steps, epochs or samples"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("beside", [None, "seed"])
def test_a_broken_rule_is_told_also_beside_other_mistakes(
    tiny_raw: dict[str, Any], rule: str, beside: str | None
) -> None:
    path, value, text = RULES[rule]
    raw = put(tiny_raw, path, value)
    if beside:
        raw = put(raw, beside, "much")
    found = problems(raw)
    assert text in found[rule]
    assert found.keys() == {rule} | ({beside} if beside else set())


def test_each_rule_has_a_test_that_it_fires(tiny_raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    raw = tiny_raw
    for path, value, _ in RULES.values():
        raw = put(raw, path, value)
    found = problems(raw)
    assert found.keys() == {*RULES, "global_batch_size"}
    assert "16 is not divisible by the 3 ranks" in found["global_batch_size"]
    elsewhere = {"_evaluations_find_their_towers", "_kept_features_stay_the_same", "_shards_suffice"}
    assert len(found) + len(elsewhere) == len(TrainConfig.rules)


def test_an_evaluation_needs_its_towers(compose: Compose) -> None:
    raw = compose("evals=[shapes]")
    raw = put(raw, "towers", {"image": raw["towers"]["image"], "caption": raw["towers"]["text"]})
    raw = put(raw, "loss.infonce.pair", ["image", "caption"])
    assert problems(raw) == {"evals.shapes": "needs towers named text; there are: image, caption"}


def test_ranks_that_divide_the_batch_are_fine(tiny_raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    check(tiny_raw, TrainConfig)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("warmup", "8steps"),
        ("warmup", "100%"),
        ("model.logit_scale", 100.0),
        ("model.logit_scale", 14),
        ("checkpoint.every", "5minutes"),
        ("log.every", "2epochs"),
        ("max_grad_norm", None),
        ("model.logit_bias", -10.0),
    ],
)
def test_what_is_right_is_not_refused(tiny_raw: dict[str, Any], path: str, value: object) -> None:
    check(put(tiny_raw, path, value), TrainConfig)


def test_the_best_may_be_that_of_an_evaluation_that_runs_but_no_other(compose: Compose) -> None:
    raw = compose("evals=[shapes]")
    check(put(raw, "checkpoint.best", "eval/shapes/top1"), TrainConfig)
    for wrong in ("eval/shape/top1", "shapes/top1", "eval/shapes", "eval/shapes/topp1", "train/loss"):
        assert "eval/shapes/" in problems(put(raw, "checkpoint.best", wrong))["checkpoint.best"]
    of_the_mean = put(raw, "checkpoint.best", "eval_ema/shapes/top1")
    assert "checkpoint.best" in problems(of_the_mean)
    check(put(of_the_mean, "ema.decay", 0.9), TrainConfig)
    assert "got 1minutes" in problems(put(raw, "evals.shapes.every", "1minutes"))["evals.shapes.every"]


@pytest.mark.parametrize(
    ("path", "value", "at", "text"),
    [
        ("seed", True, "seed", "got True"),
        ("seed", "1", "seed", "got '1'"),
        ("global_batch_size", 16.0, "global_batch_size", "got 16.0"),
        ("global_batch_size", None, "global_batch_size", "got None"),
        ("optimizer.lr", float("nan"), "optimizer.lr", "finite number"),
        ("optimizer.betas", [0.9], "optimizer.betas.1", "no value given"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1", "less than 1, got 1.0"),
        ("optimizer.betas", ["0.9", 0.98], "optimizer.betas.0", "got '0.9'"),
        ("loss.infonce.pair", [1, "text"], "loss.infonce.pair.0", "got 1"),
        ("precision", "fp8", "precision", "got 'fp8'"),
        ("duration", 1000, "duration", "should be a number with a unit"),
        ("run.name", "a/b", "run.name", "got 'a/b'"),
        ("run.name", "", "run.name", "got ''"),
        ("towers.image.widht", 3, "towers.image.widht", "Did you mean 'width'?"),
        ("towers.image.width", 33, "towers.image.width", ""),
        ("towers.image.patch_size", 7, "towers.image.image_size", "32 is not divisible by patch_size=7"),
        ("towers.text.tokenizer", "byte_bpe", "towers.text.tokenizer", "should be a Tokenizer: a mapping"),
        ("towers.text.tokenizer.vocab_size", 2, "towers.text.tokenizer.vocab_size", "got 2"),
        ("optimizer", None, "optimizer", "should be a Optimizer"),
        ("optimiser", {}, "optimiser", "unknown key. Did you mean 'optimizer'?"),
        ("loss", {}, "loss", "at least 1 item"),
        ("model.embed_dim", "???", "model.embed_dim", "no value given"),
        ("towers.text.tokenizer.vocab_size", "???", "towers.text.tokenizer.vocab_size", "no value given"),
    ],
)
def test_a_mistake_is_told_at_its_own_path(
    tiny_raw: dict[str, Any], path: str, value: object, at: str, text: str
) -> None:
    if value == 33:
        tiny_raw, at, text = (
            put(tiny_raw, "towers.image.heads", 2),
            "towers.image.heads",
            "2 does not divide width=33",
        )
    found = problems(put(tiny_raw, path, value))
    assert found.keys() == {at}
    assert text in found[at]


def test_all_that_does_not_fit_in_a_part_is_told_at_once(tiny_raw: dict[str, Any]) -> None:
    """With what is wrong in other parts, but not beside fields that are wrong by themselves."""
    image = {**tiny_raw["towers"]["image"], "image_size": 33, "heads": 7, "tuning": {"unfrozen_blocks": 1}}
    text = {**tiny_raw["towers"]["text"], "mask_padding": True, "pool": "last", "heads": 5}
    assert problems({**tiny_raw, "towers": {"image": {**image, "tuning": {}}, "text": text}}).keys() == {
        "towers.image.image_size",
        "towers.image.heads",
        "towers.text.mask_padding",
        "towers.text.pool",
        "towers.text.heads",
    }
    found = problems({**tiny_raw, "towers": {**tiny_raw["towers"], "image": image}})
    assert found == {"towers.image.tuning.unfrozen_blocks": "is about a frozen tower: frozen is none"}


def test_a_section_that_is_left_out_is_told(tiny_raw: dict[str, Any]) -> None:
    del tiny_raw["schedule"], tiny_raw["optimizer"]["lr"], tiny_raw["run"]["name"]
    assert problems(tiny_raw) == dict.fromkeys(["schedule", "optimizer.lr", "run.name"], "no value given")


def test_the_message_counts_and_lists_the_problems() -> None:
    assert str(ConfigError([("a.b", "bad")])) == "1 problem in the configuration:\n  a.b: bad"
    assert str(ConfigError([("a", "x"), ("b", "y")], "file")) == "2 problems in the file:\n  a: x\n  b: y"


def test_what_is_written_is_read_as_the_same_configuration(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    assert check(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), TrainConfig) == config


def test_a_configuration_cannot_be_changed(tiny_config: TinyConfig) -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_config().seed = 3  # type: ignore[misc]


# --- identity -------------------------------------------------------------------------------------------------------

OPERATIONAL: dict[str, tuple[str, object]] = {
    "run": ("run.fresh", True),
    "paths": ("paths.datasets", "elsewhere"),
    "duration": ("duration", "9steps"),
    "device": ("device", "auto"),
    "compile": ("compile", True),
    "deterministic": ("deterministic", True),
    "profile": ("profile", True),
    "micro_batch_size": ("micro_batch_size", 4),
    "sharding": ("sharding", "full"),
    "workers": ("workers", 3),
    "timeout": ("timeout", "5minutes"),
    "max_broken": ("max_broken", 0.5),
    "evals": ("evals", {"other": {"_target_": "multimodal.evals.retrieval.Retrieval"}}),
    "checkpoint": ("checkpoint.keep", 7),
    "early_stop": ("early_stop.patience", 9),
    "log": ("log.every", "3steps"),
    "tracker": ("tracker", {"_target_": "somewhere.Else"}),
    "dry_run": ("dry_run", True),
}
IDENTITY: dict[str, tuple[str, object]] = {
    "seed": ("seed", 2),
    "warmup": ("warmup", "6%"),
    "global_batch_size": ("global_batch_size", 8),
    "max_grad_norm": ("max_grad_norm", None),
    "precision": ("precision", "bf16"),
    "model": ("model.embed_dim", 8),
    "init": ("init.weights", "other"),
    "towers": ("towers.text.tokenizer.vocab_size", 301),
    "loss": ("loss.infonce.weight", 2.0),
    "dataset": ("dataset.size", 32),
    "max_samples": ("max_samples", 30),
    "augment": ("augment.flip", 0.5),
    "optimizer": ("optimizer.lr", 0.5),
    "schedule": ("schedule.final_lr", 0.5),
    "ema": ("ema.decay", 0.5),
}


def test_every_field_is_either_identity_or_operational() -> None:
    assert not OPERATIONAL.keys() & IDENTITY.keys()
    assert OPERATIONAL.keys() | IDENTITY.keys() == TrainConfig.model_fields.keys()


@pytest.mark.parametrize("name", OPERATIONAL)
def test_a_changed_operational_setting_is_the_same_experiment(tiny_config: TinyConfig, name: str) -> None:
    new = tiny_config()
    assert changed_identity(put(new.model_dump(mode="json"), *OPERATIONAL[name]), new) == []


@pytest.mark.parametrize("name", IDENTITY)
def test_a_changed_identity_is_told_by_its_path(tiny_config: TinyConfig, name: str) -> None:
    new = tiny_config()
    path, value = IDENTITY[name]
    found = dict(changed_identity(put(new.model_dump(mode="json"), path, value), new))
    assert found.keys() == {path}
    assert found[path].startswith(f"{value} -> ")


def test_a_tower_more_or_less_is_told(tiny_config: TinyConfig) -> None:
    new = tiny_config()
    old = new.model_dump(mode="json")
    del old["towers"]["text"]
    assert [path for path, _ in changed_identity(old, new)] == ["towers.text"]
    more = put(new.model_dump(mode="json"), "towers.audio", {"width": 1})
    assert [path for path, _ in changed_identity(more, new)] == ["towers.audio"]


def test_a_field_with_a_default_that_older_runs_lack_is_no_change(tiny_config: TinyConfig) -> None:
    new = tiny_config()
    old = new.model_dump(mode="json")
    del old["loss"]["infonce"]["pair"]
    check(old, TrainConfig)
    assert changed_identity(old, new) == []


def test_a_warm_up_longer_than_the_run_is_told_whatever_its_multiplier(tiny_raw: dict[str, Any]) -> None:
    assert "warmup" in problems({**tiny_raw, "warmup": "1ksteps"})


def test_a_run_of_no_steps_is_refused(tiny_raw: dict[str, Any]) -> None:
    assert "duration" in problems({**tiny_raw, "duration": "0steps", "warmup": "0steps"})


@pytest.mark.parametrize("name", [".", ".."])
def test_a_run_is_not_the_folder_of_all_runs(tiny_raw: dict[str, Any], name: str) -> None:
    assert "run.name" in problems(put(tiny_raw, "run.name", name))

"""The laws of doing the same again: the stored settings, the same bits, and all that is not the same is told."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from hydra import compose, initialize_config_dir
from tiny_runs import assert_same_run

from multimodal.cli import CONF, plain, register_plugins
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.data.fingerprint import fingerprint
from multimodal.data.shapes import Shapes
from multimodal.provenance import differences
from multimodal.repeats import NODE, repeated
from multimodal.run_folder import not_the_same
from multimodal.trainer import Trainer

ROOT = Path(__file__).parent.parent


def asked(*words: str) -> TrainConfig:
    """What train.py makes of a command line."""
    rewritten = repeated(words)
    name = f"--config-name={NODE}"
    assert rewritten[0] == name
    register_plugins()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(plain(compose(NODE, rewritten[1:])), TrainConfig)


@pytest.fixture
def original(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


def told(config: TrainConfig) -> dict[str, tuple[str, str]]:
    found = json.loads((config.folder / "repeat.json").read_text())["not_the_same"]
    return {one["what"]: (one["was"], one["is"]) for one in found}


def stored(folder: Path) -> TrainConfig:
    return check(yaml.safe_load((folder / "config.yaml").read_text()), TrainConfig)


def test_a_repeat_is_the_same_to_the_bit_and_says_so(original: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = asked(f"run.repeat={original}")
    assert config.folder == original.parent / "a-repeat"
    with caplog.at_level("INFO"):
        Trainer(config).run()
    first = stored(original)
    kept = first.paths.model_copy(update={"runs": str(original.parent)})
    run = first.run.model_copy(update={"name": "a"})
    assert_same_run(first.model_copy(update={"paths": kept, "run": run}), config)
    assert told(config) == {}
    assert f"repeats {original}; settings, code, versions, threads and data are the same" in caplog.text


def test_overrides_and_whatever_else_is_not_the_same_are_told(original: Path) -> None:
    (environment,) = json.loads((original / "environment.json").read_text())
    environment["packages"]["torch"] = "2.0.0"
    environment["threads"] = 64
    environment["data"]["samples"] = "0123"
    del environment["device"]
    (original / "environment.json").write_text(json.dumps([environment]))
    (original / "uncommitted.diff").write_text("+ another line")
    config = asked(f"run.repeat={original}", "run.name=b", "seed=2", "duration=2steps", "workers=0", "log.every=2steps")
    Trainer(config).run()
    found = told(config)
    assert found.keys() == {
        *("seed", "duration", "packages.torch", "threads", "data.samples", "device", "uncommitted changes"),
    }
    assert found["seed"] == ("1", "2")
    assert found["device"] == ("None", "cpu")
    assert found["threads"] == ("64", "1")


def test_what_was_never_recorded_or_cannot_be_read_is_no_sameness(original: Path) -> None:
    config = asked(f"run.repeat={original}")
    (original / "environment.json").write_text("{")
    facts = {"revision": "abc", "data": {"num_samples": 64}}
    found = {what: was for what, was, _ in not_the_same(config, facts, original)}
    assert found["revision"] == found["data"] == "None"


def test_starts_that_were_not_alike_are_told(original: Path) -> None:
    (start,) = json.loads((original / "environment.json").read_text())
    (original / "environment.json").write_text(json.dumps([{**start, "threads": 64}, start]))
    config = asked(f"run.repeat={original}")
    found = {what: was for what, was, _ in not_the_same(config, start, original)}
    assert found["starts"] == "2, not all alike; the last counts here"


def test_the_same_command_again_continues_the_repeat(original: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = (f"run.repeat={original}", "run.name=short", "duration=2steps")
    Trainer(asked(*words)).run()
    with caplog.at_level("INFO"):
        Trainer(asked(*words)).run()
    assert "is finished, at step 2" in caplog.text


# --- whose settings -------------------------------------------------------------------------------------------------


def test_text_arrives_as_it_was_stored(original: Path) -> None:
    raw = yaml.safe_load((original / "config.yaml").read_text())
    raw["tracker"] = {"_target_": "multimodal.tracker.Wandb", "project": r"a\${b}${oc.env:HOME}", "entity": None}
    raw["tracker"] |= {"group": None, "tags": ["${x}"], "notes": "it's", "mode": "auto"}
    (original / "config.yaml").write_text(yaml.safe_dump(raw))
    tracker: Any = asked(f"run.repeat={original}").tracker
    assert (tracker.project, tracker.tags, tracker.notes) == (r"a\${b}${oc.env:HOME}", ("${x}",), "it's")


def test_a_run_of_an_older_version_has_all_knobs(original: Path) -> None:
    raw = yaml.safe_load((original / "config.yaml").read_text())
    for key in ("profile", "compile", "sharding", "ema"):
        del raw[key]
    del raw["run"]["repeat"]
    (original / "config.yaml").write_text(yaml.safe_dump(raw))
    assert asked(f"run.repeat={original}", "profile=true", "ema.decay=0.9").profile


def test_a_name_is_below_the_folder_of_runs_and_a_sweep_s_name_is_one(original: Path) -> None:
    swept = original.rename(original.with_name("a-lr=0.1-seed=2"))
    config = asked("run.repeat=a-lr=0.1-seed=2", f"paths.runs={original.parent}")
    assert config.folder == swept.with_name("a-lr=0.1-seed=2-repeat")


@pytest.mark.parametrize(
    ("change", "words", "path", "text"),
    [
        ({}, ["run.repeat=aa"], "run.repeat", "Did you mean 'a'?"),
        ({"hydra": {"launcher": {"_target_": "os.system"}}}, ["run.repeat=a"], "hydra", "unknown key"),
        ({"defaults": ["/somewhere"]}, ["run.repeat=a"], "defaults", "unknown key"),
        ({"loss": {"x": {"_target_": "os.system"}}}, ["run.repeat=a"], "loss.x._target_", "outside the packages"),
        ("- &a [1]\n- *a", ["run.repeat=a"], "run.repeat", "it has an alias"),
        ("!!python/object/apply:os.system [ls]", ["run.repeat=a"], "run.repeat", "not plain YAML"),
        (None, ["run.repeat=a"], "run.repeat", "config.yaml"),
    ],
)
def test_what_is_no_run_of_ours_is_refused_before_hydra_sees_it(
    original: Path, change: Any, words: Sequence[str], path: str, text: str
) -> None:
    file = original / "config.yaml"
    if change is None:
        file.unlink()
    elif isinstance(change, str):
        file.write_text(change)
    else:
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(ConfigError) as caught:
        repeated([*words, f"paths.runs={original.parent}"])
    assert text in dict(caught.value.problems)[path]


@pytest.mark.parametrize("words", [[], ["seed=1"], ["run.repeat=null", "seed=1"], ["run.repeat="]])
def test_other_command_lines_stay_as_they_are(words: list[str]) -> None:
    assert repeated(words) == words


# --- facts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["tracker=none", "+loss=sigmoid", "tower@towers.image=vit"])
def test_another_part_than_the_run_had_is_refused_by_name(original: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{word}: a repeat has the parts of its run")):
        repeated([f"run.repeat={original}", "seed=3", word])


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_a_grid_of_repeats_is_refused(original: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.repeat: repeats one run: not with -m"):
        repeated([option, f"run.repeat={original}", "seed=1,2"])
    assert repeated([option, "seed=1,2"]) == [option, "seed=1,2"]


def test_data_are_known_by_their_number_their_keys_and_their_samples(tmp_path: Path) -> None:
    def found(**changes: Any) -> dict[str, Any]:
        knobs = {"size": 40, "image_size": 32, **changes}
        return fingerprint(Shapes(**knobs).build(tmp_path))

    base = found()
    assert found() == base
    assert {key for key, value in found(size=41).items() if value != base[key]} >= {"num_samples", "keys"}
    assert {key for key, value in found(seed=2).items() if value != base[key]} >= {"samples"}


def test_differences_of_facts_are_by_path_and_of_what_matters_only() -> None:
    old = {"time": 1, "command": "a", "cpus": 2, "packages": {"a": "1", "b": "1"}, "gpus": []}
    new = {"time": 2, "command": "b", "cpus": 3, "packages": {"a": "1", "c": "1"}, "gpus": ["x"]}
    assert list(differences(old, new)) == [
        ("packages.b", "1", "None"),
        ("packages.c", "None", "1"),
        ("gpus", "[]", "['x']"),
    ]


@pytest.mark.slow
def test_a_command_repeats_a_run_to_the_bit(tmp_path: Path) -> None:
    def train(*words: str) -> str:
        command = [sys.executable, str(ROOT / "train.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    train(*TINY, "duration=4steps")
    said = train("run.repeat=runs/tiny")
    assert "repeats runs/tiny; settings, code, versions, threads and data are the same" in said
    first, second = (stored(tmp_path / "runs" / name) for name in ("tiny", "tiny-repeat"))
    at = {"paths": first.paths.model_copy(update={"runs": str(tmp_path / "runs")})}
    assert_same_run(first.model_copy(update=at), second.model_copy(update=at))

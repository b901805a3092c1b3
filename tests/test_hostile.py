"""Opening somebody else's checkpoint runs none of their code: what does not look like ours is refused, and told."""

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, composed
from safetensors.torch import load_file, save_file

from multimodal import assemble, checkpoint
from multimodal.config import TrainConfig, check
from multimodal.trainer import Trainer

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours."""
    config = check(composed(*TINY, f"paths.runs={tmp_path_factory.mktemp('runs')}"), TrainConfig)
    Trainer(config).run()
    return config.folder


@pytest.fixture
def stranger(sound: Path, tmp_path: Path) -> Path:
    """A sound checkpoint, to be damaged."""
    return checkpoint.find(Path(shutil.copytree(sound, tmp_path / "tiny", symlinks=True)))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.yaml"
    raw = yaml.safe_load(file.read_text())
    change(raw)
    file.write_text(yaml.safe_dump(raw, sort_keys=False))


def replaced(path: str, value: Any) -> Damage:
    """Another value at a dotted path of the configuration."""

    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            raw = raw[key]
        raw[last] = value

    return lambda folder: rewrite(folder, change)


def lying_header(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        told = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(told)) + told + data[8 + length :])

    return damage


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def grow(header: dict[str, Any]) -> None:
    first(header)["shape"] = [10**12]


def overlap(header: dict[str, Any]) -> None:
    first(header)["data_offsets"] = [0, 10**12]


def huge_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["towers.image.projection.weight"] = torch.zeros(3, 3)
    del tensors["logit_scale"]
    save_file({**tensors, "more": torch.zeros(1)}, folder / "model.safetensors")


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def pickled(folder: Path) -> None:
    (folder / "model.pkl").write_bytes(pickle.dumps(_Bomb()))


def pickled_instead(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))


def way_out(folder: Path) -> None:
    (folder / "text" / "tokenizer.json").unlink()
    (folder / "text" / "tokenizer.json").symlink_to("/etc/hostname")


def tagged(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text() + "note: !!python/object/apply:os.mkdir [exploded]\n")


def laughs(folder: Path) -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 40))]
    (folder / "config.yaml").write_text("\n".join(lines))


def another_tower(folder: Path) -> None:
    rewrite(folder, lambda raw: raw["towers"].update({"../../text": raw["towers"].pop("text")}))


ATTACKS: dict[str, tuple[Damage, str]] = {
    "os.system": (replaced("loss.infonce._target_", "os.system"), r"loss\.infonce\._target_: 'os\.system' is outside"),
    "eval": (
        replaced("towers.image._target_", "builtins.eval"),
        r"towers\.image\._target_: 'builtins\.eval' is outside",
    ),
    "stranger": (replaced("dataset._target_", "antigravity.Flying"), "'antigravity.Flying' is outside the packages"),
    "no part": (replaced("optimizer._target_", "multimodal.files.write_json"), "has no part 'write_json'"),
    "wrong kind": (replaced("optimizer._target_", "multimodal.optim.Cosine"), "wrong kind of part"),
    "by another part": (
        replaced("schedule._target_", "multimodal.parts.importlib.import_module"),
        "there is no module",
    ),
    "tower's name": (another_tower, r"towers\.\.\./\.\./text"),
    "run's name": (replaced("run.name", "../../other"), r"run\.name"),
    "pickle beside": (pickled, r"model\.pkl may hold code"),
    "pickle instead": (pickled_instead, "not a sound safetensors file"),
    "link": (way_out, "leads out of the checkpoint"),
    "yaml tag": (tagged, "not plain YAML"),
    "yaml aliases": (laughs, "not plain YAML.*alias"),
    "no mapping": (lambda folder: (folder / "config.yaml").write_text("- 1") and None, "holds no mapping"),
    "grown tensor": (lying_header(grow), "not a sound safetensors file"),
    "overlap": (lying_header(overlap), "not a sound safetensors file"),
    "huge header": (huge_header, "not a sound safetensors file"),
    "other weights": (other_shape, r"1 missing \(logit_scale\), 1 extra \(more\), 1 of other shape .*\[3, 3\]"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_checkpoint_is_refused_and_nothing_of_it_runs(
    stranger: Path, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = ATTACKS[attack]
    damage(stranger)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("ran a command"))
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        assemble.load(stranger)
    assert not (tmp_path / "exploded").exists()
    assert "antigravity" not in set(sys.modules) - before


def test_what_is_not_damaged_opens(stranger: Path) -> None:
    assemble.load(stranger)


def test_best_does_not_lead_out_of_the_run(stranger: Path, tmp_path: Path) -> None:
    run = stranger.parent.parent
    (tmp_path / "elsewhere").mkdir()
    best = run / checkpoint.FOLDER / checkpoint.BEST
    best.unlink(missing_ok=True)
    best.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the run"):
        checkpoint.find(run, "best")


@pytest.mark.parametrize("which", ["../../x", "..", "step-00000008", "-1"])
def test_a_checkpoint_is_not_a_path(stranger: Path, which: str) -> None:
    with pytest.raises(FileNotFoundError, match="steps with one: 8"):
        checkpoint.find(stranger.parent.parent, which)

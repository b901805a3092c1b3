"""Opening somebody else's checkpoint runs none of their code: what does not look like ours is refused, and told."""

import json
import os
import pickle
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, composed
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_hf_text import make_config, make_tokenizer
from tokenizers import Tokenizer as Vocabulary
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel

from multimodal import assemble, checkpoint, checksums
from multimodal.config import TrainConfig, check
from multimodal.towers import hf_network
from multimodal.trainer import Trainer

Damage = Callable[[Path], None]


@pytest.fixture
def stranger(tiny_run: Path, tmp_path: Path) -> Path:
    """A sound checkpoint, to be damaged."""
    return checkpoint.find(Path(shutil.copytree(tiny_run, tmp_path / "tiny", symlinks=True)))


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


def ten_gigabytes(header: dict[str, Any]) -> None:
    """A claim that agrees with itself, and not with the file's few kilobytes."""
    del header[next(key for key in header if key != "__metadata__")]
    end = max(value["data_offsets"][1] for key, value in header.items() if key != "__metadata__")
    header["towers.image.projection.weight"] = {"dtype": "U8", "shape": [10**10], "data_offsets": [end, end + 10**10]}


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


def truthful_but_huge(folder: Path) -> None:
    """A mask of context x context is in no file, and takes 40 GB beside a table of positions of some MB."""
    length = 100_000
    replaced("towers.text.context_length", length)(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["towers.text.net.positional_embedding"] = torch.zeros(length, 32)
    save_file(tensors, folder / "model.safetensors")


def written(name: str, text: str) -> Damage:
    """Another text in a file of the text tower."""

    def damage(folder: Path) -> None:
        (folder / "text" / name).write_text(text)

    return damage


def architecture(**values: Any) -> Damage:
    return written("architecture.json", json.dumps(values))


FOREIGN = Vocabulary(WordLevel({"a": 0, "b": 10**9}, unk_token="a")).to_str()
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
    "ten gigabytes": (lying_header(ten_gigabytes), "not a sound safetensors file"),
    "huge header": (huge_header, "not a sound safetensors file"),
    "huge space": (replaced("model.embed_dim", 10**12), "does not hold the weights of its config"),
    "huger space": (replaced("model.embed_dim", 10**30), "no model that can be built"),
    "huge width": (replaced("towers.image.width", 2**40), "no model that can be built"),
    "wide": (replaced("towers.image.width", 2**20), "does not hold the weights of its config"),
    "huge table": (replaced("towers.text.vocab_size", 10**13), "does not hold the weights of its config"),
    "endless blocks": (replaced("towers.image.layers", 10**12), "are far too few"),
    "huge mask": (truthful_but_huge, r"asks for 40,000,\d+,\d+ bytes beside the weights"),
    "no vocabulary": (written("tokenizer.json", "{}"), r"text/tokenizer\.json is not a sound vocabulary"),
    "foreign vocabulary": (written("tokenizer.json", FOREIGN), r"text/tokenizer\.json is no vocabulary of ours"),
    "other weights": (other_shape, r"1 missing \(logit_scale\), 1 extra \(more\), 1 of other shape .*\[3, 3\]"),
}


WATCHERS: list[list[str]] = []


def note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str):
        for watcher in WATCHERS:
            watcher.append(args[0])


sys.addaudithook(note)  # for good: it does nothing while nobody watches


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of all files that are opened; and nobody is asked for an address, or connected to."""

    def refused(*_: Any, **__: Any) -> None:
        pytest.fail("went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    names: list[str] = []
    WATCHERS.append(names)
    yield names
    WATCHERS.remove(names)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_checkpoint_is_refused_and_nothing_of_it_runs(
    stranger: Path, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = ATTACKS[attack]
    damage(stranger)
    checksums.write(stranger)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("ran a command"))
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        assemble.load(stranger)
    assert not (tmp_path / "exploded").exists()
    assert "antigravity" not in set(sys.modules) - before


def test_of_what_is_not_damaged_nothing_outside_is_read(stranger: Path, opened: list[str]) -> None:
    assemble.load(stranger)  # which loads the libraries
    opened.clear()
    assemble.load(stranger)
    assert any(name.endswith("config.yaml") for name in opened)
    own = (str(stranger.resolve()), sys.prefix, sys.base_prefix, str(Path(assemble.__file__).parent))
    assert [name for name in opened if not os.path.realpath(name).startswith(own)] == []


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network of timm and one of transformers, which says that both began with weights of others."""
    place = tmp_path_factory.mktemp("hub")
    make_config("bert", place)
    make_tokenizer("bert", place)
    AutoModel.from_config(AutoConfig.from_pretrained(place)).save_pretrained(place)
    small = [word for word in TINY if "towers." not in word]
    image = ("tower@towers.image=timm", "towers.image.name=convnext_atto", "towers.image.image_size=32")
    text = ("tower@towers.text=hf_text", f"towers.text.name={place}", "towers.text.context_length=32")
    config = check(composed(*small, *image, *text, f"paths.runs={tmp_path_factory.mktemp('runs')}"), TrainConfig)
    Trainer(config).run()
    replaced("towers.image.pretrained", True)(checkpoint.find(config.folder))
    checksums.write(checkpoint.find(config.folder))
    shutil.rmtree(place)
    return config.folder


@pytest.fixture
def lent(borrowed: Path, tmp_path: Path) -> Path:
    """Its checkpoint, to be damaged."""
    return checkpoint.find(Path(shutil.copytree(borrowed, tmp_path / "lent", symlinks=True)))


def test_a_run_that_began_with_weights_of_others_is_opened_without_them(lent: Path) -> None:
    config, assembled = assemble.load(lent)
    assert all(tower["pretrained"] for tower in config.model_dump()["towers"].values())
    stored = load_file(lent / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in assembled.model.state_dict().items())


BORROWED: dict[str, tuple[Damage, str]] = {
    "hub by timm": (replaced("towers.image.name", "hf-hub:evil/x"), "'hf-hub:evil/x' is not one of timm's names"),
    "folder by timm": (replaced("towers.image.name", "local-dir:/etc"), "'local-dir:/etc' is not one of timm's names"),
    "another network": (replaced("towers.image.name", "convnext_femto"), "does not hold the weights of its config"),
    "wrapper": (architecture(model_type="timm_wrapper", architecture="hf-hub:evil/x"), "'timm_wrapper' is none of"),
    "backbone": (architecture(model_type="detr", backbone="evil/x", use_timm_backbone=True), "'detr' is none of"),
    "wide": (architecture(model_type="bert", hidden_size=9600), "does not hold the weights of its config"),
    "deep": (architecture(model_type="bert", num_hidden_layers=10**7), "are far too few"),
    "facts": (written("tokenizer_facts.json", "{}"), r"text/tokenizer_facts\.json: vocab_size: no value given"),
}


@pytest.mark.parametrize("attack", BORROWED)
def test_what_towers_of_others_are_told_is_refused_and_nothing_fetched(lent: Path, attack: str) -> None:
    damage, message = BORROWED[attack]
    damage(lent)
    checksums.write(lent)
    with pytest.raises(ValueError, match=message):
        assemble.load(lent)


def test_the_hub_is_closed_while_a_checkpoint_is_opened(lent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second bolt: a tower that asks the hub all the same does not get to it."""

    def careless(*_: Any, **__: Any) -> Any:
        raise ValueError(f"offline: {constants.is_offline_mode()}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_network, "build", careless)
    with pytest.raises(ValueError, match="offline: True"):
        assemble.load(lent)
    assert not constants.is_offline_mode()


def test_no_file_is_opened_because_the_checksums_name_it(stranger: Path, opened: list[str]) -> None:
    with (stranger / checksums.NAME).open("a") as file:
        file.write(f"{'0' * 64}  ../../../../../../../../etc/hostname\n")
    with pytest.raises(ValueError, match="etc/hostname is missing"):
        assemble.load(stranger)
    assert not any(name.endswith("hostname") for name in opened)


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

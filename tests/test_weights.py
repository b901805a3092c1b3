"""Weights from files: read without running anything, fitted, resized as open_clip does, and reported."""

import json
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyConfig
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn

from multimodal import checkpoint
from multimodal.config import ConfigError, ModelSection
from multimodal.data.augment import Keep
from multimodal.interop import names, weights
from multimodal.interop.cfg_to_towers import from_open_clip
from multimodal.model import Model
from multimodal.towers.images import ImageTower
from multimodal.towers.text import TextPreprocessor, TextTower
from multimodal.trainer import Trainer

SECTION = ModelSection(embed_dim=16, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)


def make(size: int = 32, context: int = 12, width: int = 32, timm: bool = False) -> Model:
    vision: dict[str, Any] = {"image_size": size, "patch_size": 8, "width": width, "layers": 1, "head_width": 16}
    if timm:
        vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": size}
    text = {"context_length": context, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    _, towers = from_open_clip({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, {})
    image, words = towers["image"], towers["text"]
    assert isinstance(image, ImageTower)
    assert isinstance(words, TextTower)
    encoding: Any = SimpleNamespace(vocab_size=50, pad=0, end=49)
    built = {
        "image": image.build(image.preprocessor(list, Keep(), None), 16),
        "text": words.build(TextPreprocessor(encoding, context), 16),
    }
    return Model(built, SECTION)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return names.to_open_clip(make(), custom_text=False)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", ["state_dict", "model", None])
def test_files_of_torch_are_read_without_their_wrapping(
    state: dict[str, Tensor], tmp_path: Path, prefix: str, nested: str | None
) -> None:
    wrapped: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if nested:
        wrapped = {"epoch": 3, "name": "run", nested: wrapped, "optimizer": {"state": {}}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    assert_same(weights.read(tmp_path / "epoch_3.pt"), state)


def test_folders_are_searched_as_open_clip_does(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no file of weights"):
        weights.read(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for epoch in (9, 10):
        torch.save({"state_dict": {"x": torch.tensor(epoch)}}, tmp_path / "checkpoints" / f"epoch_{epoch}.pt")
    assert int(weights.read(tmp_path)["x"]) == 10
    (tmp_path / "other").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "other" / "epoch_11.pt")
    with pytest.raises(ValueError, match=r"checkpoints of several runs \(.*checkpoints, .*other\): name one"):
        weights.read(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    assert weights.read(tmp_path).keys() == {"x"}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    assert_same(weights.read(tmp_path), state)


def test_old_files_of_torch_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(weights.read(tmp_path / "old.pth"), state)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_what_is_pickled_in_a_file_is_not_run(tmp_path: Path, form: str) -> None:
    file, victim = tmp_path / "epoch_1.pt", tmp_path / "created"
    content = {"state_dict": {"x": torch.zeros(1)}, "extra": _Malicious(victim)}
    if form == "pickle":
        file.write_bytes(pickle.dumps({"extra": _Malicious(victim)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"epoch_1\.pt holds more than tensors and plain data.*nothing in it was run"):
        weights.read(file)
    assert not victim.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is a TorchScript archive"):
        weights.read(tmp_path / "model.pt")


def lying(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not at all",
        struct.pack("<Q", 2**60) + b"{}",
        lying({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
        lying({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, b"\0" * 16),
        lying({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, b"\0" * 16),
        lying({"x": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
    ],
)
def test_a_damaged_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a sound safetensors file"):
        weights.read(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half an archive"])
def test_a_damaged_file_of_torch_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pt"):
        weights.read(tmp_path / "bad.pt")


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no weights by name but list"):
        weights.read(tmp_path / "list.pt")
    torch.save({"x": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="holds 'epoch', which is not a tensor but int"):
        weights.read(tmp_path / "mixed.pt")
    (tmp_path / "model.npz").touch()
    with pytest.raises(ValueError, match=r"not a file of weights: known are \.safetensors"):
        weights.read(tmp_path / "model.npz")


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_source_is_a_path_or_a_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first" / "checkpoints" / "step-00000008").mkdir(parents=True)
    runs = tmp_path / "runs"
    assert weights.locate("first", runs) == runs / "first"
    assert weights.locate(str(tmp_path), runs) == tmp_path
    with pytest.raises(ValueError, match=r"no file or folder 'frist'.*with checkpoints: first\).*Did you mean 'first'"):
        weights.locate("frist", runs)
    with pytest.raises(ValueError, match="should be open_clip:ARCHITECTURE/TAG"):
        weights.locate("open_clip:ViT-B-32", runs)


def test_pretrained_weights_are_found_by_architecture_and_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(cfg: dict[str, Any]) -> str:
        asked.append(cfg["hf_hub"])
        return str(tmp_path / "file.safetensors")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    assert weights.locate("open_clip:ViT-B-32/openai", tmp_path) == tmp_path / "file.safetensors"
    assert asked == ["timm/vit_base_patch32_clip_224.openai/"]
    with pytest.raises(ValueError, match=r"no weights 'opnai' of ViT-B-32; there are: openai.*Did you mean 'openai'"):
        weights.tag("ViT-B-32", "opnai")
    with pytest.raises(ValueError, match=r"no weights of 'ViT-B-23'\. Did you mean"):
        weights.tag("ViT-B-23", "openai")


def test_without_network_it_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(cfg: dict[str, Any]) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    with pytest.raises(ValueError, match=r"cannot be downloaded from timm/.*no route to host.*give its path instead"):
        weights.tag("ViT-B-32", "openai")


# --- fitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["ours", "CLIP", "CustomTextCLIP"])
def test_all_of_a_model_is_loaded_under_either_naming(naming: str) -> None:
    old, new = make(), make()
    with torch.no_grad():
        old.logit_scale.fill_(1.5)
    state = state_of(old) if naming == "ours" else names.to_open_clip(old, naming == "CustomTextCLIP")
    report = weights.fit(new.double(), {name: tensor.clone() for name, tensor in state.items()}, "old")
    assert [*report.missing, *report.unexpected, *report.mismatched, *report.resized] == []
    assert sorted(report.loaded) == sorted(old.state_dict())
    assert_same(state_of(new), state_of(old.double()))


def test_positions_are_resized_as_open_clip_does() -> None:
    old, new = make(), make(size=56, context=20)
    state = names.to_open_clip(old, custom_text=False)
    expected = dict(state)
    network = SimpleNamespace(visual=new.towers["image"].net, positional_embedding=torch.empty(20, 32))
    resize_pos_embed(expected, network)  # type: ignore[no-untyped-call]
    resize_text_pos_embed(expected, network)  # type: ignore[no-untyped-call]
    report = weights.fit(new, state, "old")
    got = names.to_open_clip(new, custom_text=False)
    assert report.resized == {
        "towers.image.net.positional_embedding": ((17, 32), (50, 32)),
        "towers.text.net.positional_embedding": ((12, 32), (20, 32)),
    }
    assert_same(got, expected)
    assert [*report.missing, *report.unexpected, *report.mismatched] == []


def test_positions_of_timm_are_resized_by_timm() -> None:
    from timm.layers import resample_abs_pos_embed

    model = make(size=224, timm=True)
    state = names.to_open_clip(model, custom_text=False)
    own = state["visual.trunk.pos_embed"]
    larger = torch.randn(1, 17 * 17 + 1, own.shape[-1])
    report = weights.fit(model, {**state, "visual.trunk.pos_embed": larger}, "old")
    name = "towers.image.net.trunk.pos_embed"
    assert report.resized == {name: (tuple(larger.shape), tuple(own.shape))}
    expected = resample_abs_pos_embed(larger, new_size=[14, 14], num_prefix_tokens=1)
    assert torch.equal(model.state_dict()[name], expected)


def test_the_report_says_what_became_of_each_tensor() -> None:
    old, new = make(width=64), make()
    before = state_of(new)
    state = {**state_of(old), "towers.image.head": torch.zeros(2)}
    del state["logit_scale"]
    report = weights.fit(new, state, "elsewhere")
    assert report.missing == ["logit_scale"]
    assert report.unexpected == ["towers.image.head"]
    assert report.mismatched["towers.image.net.class_embedding"] == ((64,), (32,))
    assert all(name.startswith("towers.text.") or name.endswith("attn.num") for name in report.loaded)
    after = new.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in [*report.mismatched, *report.missing])
    lines = str(report).splitlines()
    assert lines[0] == f"weights from elsewhere: {len(report.loaded)} tensors loaded"
    assert "  1 not in the source, left as initialised: logit_scale" in lines
    assert any("towers.image.net.class_embedding [64] -> [32]" in line and "more)" in line for line in lines)
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_weights_of_another_kind_are_refused_with_examples() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"nothing in x fits.*Names there: encoder\.0; in the model: towers\.image\."):
        weights.fit(model, {"encoder.0": torch.zeros(1)}, "x")
    with pytest.raises(ValueError, match=r"nothing in x fits"):
        weights.fit(model, {"logit_scale": torch.zeros(())}, "x")


def test_a_run_starts_from_another_one(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    Trainer(config).run()
    folder = checkpoint.find(config.folder)
    source = weights.read(config.folder)
    assert_same(source, weights.read(folder))
    started = tiny_config("run.name=second", "init.weights=tiny", "optimizer.lr=1e-12", "seed=2")
    Trainer(started).run()
    second = weights.read(started.folder)
    assert all(torch.allclose(second[name].float(), source[name].float(), atol=1e-4) for name in source)
    report = json.loads((started.folder / "init.json").read_text())
    assert report["source"] == "tiny"
    assert sorted(report["loaded"]) == sorted(source)
    assert not (config.folder / "init.json").exists()


def test_a_learnt_vocabulary_comes_along_with_the_weights(tiny_config: TinyConfig) -> None:
    config = tiny_config("towers.text.tokenizer.vocab_size=320")
    Trainer(config).run()
    learnt = (checkpoint.find(config.folder) / "text" / "tokenizer.json").read_text()
    for source in ("tiny", str(checkpoint.find(config.folder))):
        others = ("dataset.seed=7", "towers.text.tokenizer.vocab_size=310", f"init.weights={source}", "run.fresh=true")
        started = tiny_config("run.name=second", *others)
        Trainer(started).run()
        assert (checkpoint.find(started.folder) / "text" / "tokenizer.json").read_text() == learnt
        assert not json.loads((started.folder / "init.json").read_text())["mismatched"]
    alone = tiny_config("run.name=third", "dataset.seed=7", "towers.text.tokenizer.vocab_size=310")
    Trainer(alone).run()
    assert (checkpoint.find(alone.folder) / "text" / "tokenizer.json").read_text() != learnt


def test_weights_that_cannot_be_found_are_a_problem_of_the_configuration(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=r"init\.weights: there is no file or folder 'nowhere'"):
        Trainer(tiny_config("init.weights=nowhere")).run()

"""Architectures: presets of both towers, ours and open_clip's, compose like any other group."""

import subprocess
import sys

import pytest
from conftest import Compose
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException

from multimodal.config import TrainConfig, check
from multimodal.interop import architectures
from multimodal.interop.config_source import OpenClipSource

SOURCE = OpenClipSource("open_clip", "openclip://")


@pytest.mark.parametrize(
    ("name", "embed_dim"),
    [("tiny", 128), ("vit_b_32", 512), ("vit_b_16", 512), ("vit_l_14", 768), ("rn50", 1024), ("siglip_b_16", 768)],
)
def test_presets_compose(compose: Compose, name: str, embed_dim: int) -> None:
    config = check(compose(f"architecture={name}"), TrainConfig)
    assert config.model.embed_dim == embed_dim
    assert config.init.weights is None


@pytest.mark.parametrize(("ours", "name"), [("vit_b_32", "ViT-B-32"), ("vit_l_14", "ViT-L-14"), ("rn50", "RN50")])
def test_presets_are_those_of_open_clip(compose: Compose, ours: str, name: str) -> None:
    one, other = (
        check(compose(f"architecture={choice}", "towers.text.vocab_size=49408"), TrainConfig)
        for choice in (ours, f"open_clip/{name}")
    )
    assert one.towers == other.towers
    assert one.model.embed_dim == other.model.embed_dim
    assert one.model.logit_scale == pytest.approx(other.model.logit_scale)


def test_an_architecture_of_open_clip_is_both_towers_and_the_space(compose: Compose) -> None:
    config = check(compose("architecture=open_clip/ViT-B-16-SigLIP"), TrainConfig)
    expected = architectures.architecture("ViT-B-16-SigLIP")
    assert config.towers["image"] == expected.towers["image"]
    assert config.towers["text"].model_dump()["tokenizer"] == expected.towers["text"].model_dump()["tokenizer"]
    assert (config.model.embed_dim, config.model.logit_bias) == (768, -10.0)
    assert config.init.weights is None


def test_a_tag_is_the_weights_and_what_they_were_trained_with(compose: Compose) -> None:
    raw = compose("architecture=open_clip/ViT-B-32/openai")
    assert raw["init"]["weights"] == "open_clip:ViT-B-32/openai"
    assert raw["towers"]["image"]["activation"] == raw["towers"]["text"]["activation"] == "quick_gelu"
    check(raw, TrainConfig)


def test_towers_and_their_own_groups_are_replaced_one_by_one(compose: Compose) -> None:
    raw = compose(
        "architecture=open_clip/ViT-B-32",
        "tower@towers.image=open_clip/RN50/image",
        "tower@towers.text=open_clip/ViT-L-14/openai/text",
        "tuning@towers.text.tuning=locked",
        "tokenizer@towers.text.tokenizer=byte_bpe",
        "model.embed_dim=64",
    )
    config = check(raw, TrainConfig)
    assert raw["towers"]["image"]["layers"] == [3, 4, 6, 3]
    assert raw["towers"]["text"]["width"] == 768
    assert config.towers["text"].tuning.frozen != "none"
    assert raw["towers"]["text"]["tokenizer"]["_target_"].endswith("ByteBPE")
    assert config.model.embed_dim == 64


def test_a_tower_is_replaced_within_the_default_architecture(compose: Compose) -> None:
    raw = compose("tower@towers.image=vit_tiny", "towers.image.width=64")
    assert raw["towers"]["image"]["_target_"].endswith("ViT")
    assert raw["towers"]["text"]["width"] == 64
    assert compose("experiment=cifar10_tiny")["towers"]["image"]["width"] == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("architecture=open_clip/ViT-B-33", "no architecture 'ViT-B-33'. Did you mean"),
        ("architecture=open_clip/ViT-B-32/opnai", "Did you mean 'openai'?"),
        ("architecture=open_clip/coca_ViT-B-32", "text decoder"),
        ("tower@towers.image=open_clip/ViT-B-33/image", "no architecture 'ViT-B-33'. Did you mean"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(compose: Compose, override: str, message: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose(override)
    assert message in str(caught.value)


def test_names_are_listed() -> None:
    assert SOURCE.list("", None) == ["architecture", "tower"]
    assert SOURCE.list("tower", ObjectType.GROUP) == ["open_clip"]
    assert SOURCE.list("architecture/open_clip", ObjectType.CONFIG) == architectures.names()
    assert SOURCE.list("tower/open_clip/RN50", ObjectType.CONFIG) == ["image", "text"]
    assert "openai" in SOURCE.list("architecture/open_clip/RN50", ObjectType.CONFIG)
    assert SOURCE.list("tower/open_clip/RN50/openai", None) == ["image", "text"]
    assert SOURCE.list("loss", None) == []
    assert not SOURCE.is_group("loss")
    assert not SOURCE.is_config("tower/vit")


@pytest.mark.slow
def test_listing_architectures_does_not_load_open_clip() -> None:
    code = (
        "import sys; from multimodal.interop.config_source import OpenClipSource as S; s = S('o', 'openclip://'); "
        "assert len(s.list('architecture/open_clip', None)) > 100; assert s.is_config('architecture/open_clip/RN50'); "
        "print(*({'open_clip', 'timm', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

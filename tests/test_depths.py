"""The laws of depth, on real towers of each family: what layer decay, frozen blocks and weight decay mean for them."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_text import make_config, make_tokenizer
from test_hf_text import tower as hf_tower
from test_timm_trunk import KNOBS
from test_towers import IMAGES, SECTION, TEXT, VIT, _Words
from transformers import T5Config

from multimodal.data.augment import Keep
from multimodal.model import Model
from multimodal.optim import AdamW, parameter_groups
from multimodal.parts import TowerModule, Tuning
from multimodal.towers.byte_bpe import ByteBPE
from multimodal.towers.resnet import ResNet
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.timm_trunk import TimmTrunk
from multimodal.towers.vit import ViT

ADAMW = AdamW(lr=1.0, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
TIMM = {**KNOBS, "image_size": 224}

# blocks, a parameter before them, of the first and of the last block, and of what follows it
EXAMPLES: dict[str, tuple[int, str, str, str, str]] = {
    "vit": (2, "net.conv1.weight", *(f"net.transformer.resblocks.{k}.ln_1.weight" for k in (0, 1)), "net.ln_post.bias"),
    "vit_attn": (
        2,
        "net.class_embedding",
        *(f"net.transformer.resblocks.{k}.ln_1.bias" for k in (0, 1)),
        "net.attn_pool.query",
    ),
    "resnet": (
        6,
        "net.conv1.weight",
        "net.layer1.0.conv1.weight",
        "net.layer4.1.bn3.bias",
        "net.attnpool.c_proj.weight",
    ),
    "text": (
        2,
        "net.token_embedding.weight",
        *(f"net.transformer.resblocks.{k}.ln_1.bias" for k in (0, 1)),
        "net.ln_final.bias",
    ),
    "convnext": (
        12,
        "net.trunk.stem.0.weight",
        "net.trunk.stages.0.blocks.0.gamma",
        "net.trunk.stages.3.blocks.1.gamma",
        "net.trunk.head.norm.weight",
    ),
    "timm_vit": (
        12,
        "net.trunk.pos_embed",
        *(f"net.trunk.blocks.{k}.norm1.bias" for k in (0, 11)),
        "net.trunk.norm.bias",
    ),
    "swin": (
        12,
        "net.trunk.patch_embed.proj.weight",
        "net.trunk.layers.0.blocks.0.attn.relative_position_bias_table",
        "net.trunk.layers.3.blocks.1.mlp.fc2.weight",
        "net.trunk.norm.weight",
    ),
    "bert": (
        2,
        "net.embeddings.word_embeddings.weight",
        "net.encoder.layer.0.output.dense.weight",
        "net.encoder.layer.1.output.dense.bias",
        "net.pooler.dense.weight",
    ),
    "t5": (
        2,
        "net.embed_tokens.weight",
        "net.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "net.block.1.layer.1.layer_norm.weight",
        "net.final_layer_norm.weight",
    ),
}


def build(kind: str, place: Path) -> TowerModule:
    torch.manual_seed(0)
    if kind in ("bert", "t5"):
        make_tokenizer("bert", place)
        if kind == "bert":
            make_config("bert", place)
        else:
            T5Config(vocab_size=30, num_layers=2, num_heads=2, d_model=32, d_ff=64, d_kv=16).save_pretrained(place)
        text = hf_tower(place, pool="pooler" if kind == "bert" else "mean")
        return text.build(text.preprocessor(list, Keep(), None), 24)
    if kind == "text":
        words = TextTransformer(**TEXT, tokenizer=ByteBPE(vocab_size=300, max_captions=1))
        return words.build(TextPreprocessor(_Words(), 16), 24)  # type: ignore[arg-type]
    parts: dict[str, Any] = {
        "vit": lambda: ViT(**IMAGES, **VIT, pool="tok"),
        "vit_attn": lambda: ViT(**IMAGES, **VIT, pool="attn", pool_queries=4),
        "resnet": lambda: ResNet(**IMAGES, layers=(1, 2, 1, 2), width=16, heads=8),
        "convnext": lambda: TimmTrunk(**{**TIMM, "name": "convnext_atto"}),
        "timm_vit": lambda: TimmTrunk(**{**TIMM, "name": "vit_tiny_patch16_224", "pool": "token"}),
        "swin": lambda: TimmTrunk(**{**TIMM, "name": "swin_tiny_patch4_window7_224"}),
    }
    part = parts[kind]()
    module: TowerModule = part.build(part.preprocessor(list, Keep(), None), 24)
    return module


@pytest.fixture(params=EXAMPLES)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def module(kind: str, tmp_path: Path) -> TowerModule:
    return build(kind, tmp_path)


def rates(module: TowerModule, tuning: Tuning) -> dict[str, tuple[float, float]]:
    """By name within the tower, of what is trained: peak learning rate and weight decay."""
    model = Model({"x": module}, SECTION)
    model.freeze({"x": tuning})
    found = {
        id(p): (group["peak_lr"], group["weight_decay"])
        for group in parameter_groups(model, ADAMW, {"x": tuning})
        for p in group["params"]
    }
    return {name: found[id(p)] for name, p in module.named_parameters() if p.requires_grad}


def test_every_parameter_has_one_depth_and_blocks_are_blocks(kind: str, module: TowerModule) -> None:
    depths = module.depths()
    placed = [id(p) for parameters in depths for p in parameters]
    projection = {id(p) for p in module.projection.parameters()}
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in module.parameters()} - projection
    assert len(depths) == 1 + EXAMPLES[kind][0]


def test_the_rate_falls_by_the_layer_decay_from_block_to_block(kind: str, module: TowerModule) -> None:
    blocks, before, first, last, after = EXAMPLES[kind]
    found = {name: lr for name, (lr, _) in rates(module, Tuning(layer_decay=0.5)).items()}
    assert found[after] == found[last] == 0.5
    assert found[first] == pytest.approx(0.5**blocks)
    assert found[before] == pytest.approx(0.5 ** (blocks + 1))
    assert all(found[name] == 1.0 for name in found if name.startswith("projection."))


def test_the_last_block_thaws_with_what_follows_it(kind: str, module: TowerModule) -> None:
    _, before, first, last, after = EXAMPLES[kind]
    trained = rates(module, Tuning(frozen="tower", unfrozen_blocks=1))
    assert {last, after} <= trained.keys()
    assert not {before, first} & trained.keys()


def test_a_tower_that_is_frozen_whole_has_a_projection_to_train_or_is_refused(kind: str, module: TowerModule) -> None:
    if kind == "resnet":
        with pytest.raises(ValueError, match="frozen=tower leaves nothing to train here: frozen=all, or unfrozen_blo"):
            rates(module, Tuning(frozen="tower"))
        return
    trained = rates(module, Tuning(frozen="tower"))
    assert trained
    assert all(name.startswith("projection.") for name in trained)


def test_weights_decay_as_in_open_clip(kind: str, module: TowerModule) -> None:
    def excluded(name: str, ndim: int) -> bool:  # open_clip_train.main
        return ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    parameters = dict(module.named_parameters())
    for name, (_, decay) in rates(module, Tuning()).items():
        assert decay == (0.0 if excluded(name, parameters[name].ndim) else 0.1), name


OPEN_CLIP = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
POOL = {f"net.attn_pool.attn.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}
TIMM_BLOCK = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
HIDDEN: dict[str, set[str]] = {
    "vit": {f"net.transformer.resblocks.*.{name}" for name in OPEN_CLIP},
    "vit_attn": {f"net.transformer.resblocks.*.{name}" for name in OPEN_CLIP} | POOL,
    "resnet": {f"net.attnpool.{name}_proj.weight" for name in "qkv"},  # not c_proj, which projects
    "text": {f"net.transformer.resblocks.*.{name}" for name in OPEN_CLIP},
    "convnext": set(),
    "timm_vit": {f"net.trunk.blocks.*.{name}" for name in TIMM_BLOCK},
    "swin": {f"net.trunk.layers.*.blocks.*.{name}" for name in TIMM_BLOCK}
    | {"net.trunk.layers.*.downsample.reduction.weight"},
    "bert": {
        f"net.encoder.layer.*.{name}.weight"
        for name in (
            *(f"attention.self.{name}" for name in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    }
    | {"net.pooler.dense.weight"},
    "t5": {f"net.block.*.layer.0.SelfAttention.{name}.weight" for name in "qkvo"}
    | {f"net.block.*.layer.1.DenseReluDense.{name}.weight" for name in ("wi", "wo")},
}


def test_hidden_are_the_matrices_that_blocks_multiply_by(kind: str, module: TowerModule) -> None:
    """Neither embeddings, nor tables of positions, queries, kernels, or what projects into the shared space."""
    model = Model({"x": module}, SECTION)
    groups = parameter_groups(model, ADAMW, {})
    hidden = {id(p) for group in groups if group["hidden"] for p in group["params"]}
    found = {name: id(p) in hidden for name, p in module.named_parameters()}
    assert {name for name in found if found[name]} == {
        name for name in found if any(fnmatchcase(name, pattern) for pattern in HIDDEN[kind])
    }
    assert all(any(fnmatchcase(name, pattern) for name in found) for pattern in HIDDEN[kind])


def test_layer_decay_is_refused_where_blocks_are_not_known() -> None:
    with torch.device("meta"):
        part = TimmTrunk(**{**TIMM, "name": "poolformer_s12"})
        model = Model({"x": part.build(part.preprocessor(list, Keep(), None), 24)}, SECTION)
    model.freeze({"x": Tuning(frozen="tower")})
    with pytest.raises(ValueError, match="layer_decay: it is not known how the blocks"):
        model.freeze({"x": Tuning(layer_decay=0.5)})
    with pytest.raises(ValueError, match="leaves nothing frozen of 0 blocks"):
        model.freeze({"x": Tuning(frozen="tower", unfrozen_blocks=1)})

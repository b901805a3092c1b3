"""Towers of open_clip in our terms: descriptions, names of weights and features are the same both ways."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor, nn

from multimodal.config import ModelSection
from multimodal.data.augment import Keep
from multimodal.interop import architectures, names
from multimodal.interop.cfg import PREPROCESS
from multimodal.interop.cfg_to_towers import from_open_clip
from multimodal.interop.towers_to_cfg import to_open_clip
from multimodal.model import Model
from multimodal.towers.byte_bpe import ByteBPE
from multimodal.towers.hf_tokenizer import HFTokenizer
from multimodal.towers.images import ImageTower
from multimodal.towers.text import TextPreprocessor, TextTower

TEXT = {"context_length": 12, "vocab_size": 500, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
SIGLIP_TEXT = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token"}
SMALL: dict[str, dict[str, Any]] = {
    "ViT": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "ViT-quickgelu": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True, "custom_text": True},
    "ViT-avg": {
        "embed_dim": 24,
        "vision_cfg": {
            **VISION,
            "pool_type": "avg",
            "final_ln_after_pool": True,
            "no_ln_pre": True,
            "ls_init_value": 0.1,
            "mlp_ratio": 2.5,
        },
        "text_cfg": {**TEXT, "ls_init_value": 0.1, "mlp_ratio": 3.0},
    },
    "ViT-attn": {
        "embed_dim": 24,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5},
        "text_cfg": {**TEXT, "proj_type": "none", "width": 24},
    },
    "RN": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 8, "head_width": 32},
        "text_cfg": TEXT,
        "quick_gelu": True,
    },
    "convnext": {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "convnext_atto", "image_size": 64, "timm_pool": "", "timm_proj": "mlp"},
        "text_cfg": TEXT,
    },
    "rot_attn": {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "resnet10t", "image_size": 64, "timm_pool": "rot_attn"},
        "text_cfg": TEXT,
    },
    "vit_tiny": {"embed_dim": 24, "vision_cfg": {**TIMM, "timm_proj": "linear"}, "text_cfg": TEXT},
    "vit_head": {"embed_dim": 24, "vision_cfg": {**TIMM, "timm_proj": None}, "text_cfg": TEXT, "custom_text": True},
    "SigLIP": {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": SIGLIP_TEXT,
    },
}
FULL = ("ViT-B-32", "ViT-L-14", "RN50", "ViT-B-16-SigLIP", "convnext_base", "ViT-bigG-14-CLIPA", "EVA02-B-16")


def encoding(cfg: dict[str, Any]) -> Any:
    text = cfg["text_cfg"]
    size = text.get("vocab_size", 49408)
    return SimpleNamespace(vocab_size=size, pad=0, end=text.get("eos_id", size - 1))


def theirs(cfg: dict[str, Any]) -> nn.Module:
    cfg = copy.deepcopy(cfg)
    custom = cfg.pop("custom_text", False)
    return (CustomTextCLIP if custom else CLIP)(**cfg).eval()  # type: ignore[no-untyped-call]


def ours(cfg: dict[str, Any]) -> Model:
    model, towers = from_open_clip(cfg, {})
    image, text = towers["image"], towers["text"]
    assert isinstance(image, ImageTower)
    assert isinstance(text, TextTower)
    built = {
        "image": image.build(image.preprocessor(list, Keep(), None), model["embed_dim"]),
        "text": text.build(TextPreprocessor(encoding(cfg), text.context_length), model["embed_dim"]),
    }
    return Model(built, section(model)).eval()


def section(model: dict[str, Any]) -> ModelSection:
    return ModelSection(**model, max_logit_scale=100.0, learn_logit_scale=True)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim and "running_var" not in name:
            tensor.normal_(0.0, 0.1, generator=generator)


@pytest.mark.parametrize("name", SMALL)
def test_features_are_those_of_open_clip_to_the_last_digits(name: str) -> None:
    cfg = SMALL[name]
    torch.manual_seed(0)
    reference, model = theirs(cfg).double(), ours(cfg).double()
    randomise(reference)
    assert_same_features(reference, model, cfg, 1e-10)


CONVNEXT_TINY: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "convnext_tiny", "image_size": 224, "timm_pool": "", "timm_proj": "linear"},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "RN50", "convnext_tiny"])
def test_features_are_those_of_open_clip_at_full_size(name: str) -> None:
    cfg = CONVNEXT_TINY if name == "convnext_tiny" else architectures.describe(name)[0]
    torch.manual_seed(0)
    reference, model = theirs(cfg), ours(cfg)
    assert_same_features(reference, model, cfg, 1e-5)
    assert_same_features(reference.double(), model.double(), cfg, 1e-10)


def assert_same_features(reference: nn.Module, model: Model, cfg: dict[str, Any], tolerance: float) -> None:
    """Of images and texts, after open_clip's weights have become ours; and these become the same again."""
    state = reference.state_dict()
    model.load_state_dict(names.from_open_clip(state, model))
    size, context = cfg["vision_cfg"]["image_size"], cfg["text_cfg"]["context_length"]
    vocab_size = cfg["text_cfg"]["vocab_size"]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    tokens = torch.randint(1, vocab_size - 100, (3, context))
    tokens[:, 5], tokens[:, 6:] = vocab_size - 1, 0
    image_tower: Any = model.towers["image"]
    pixels = (images.to(image_tower.mean.dtype) / 255 - image_tower.mean) / image_tower.std
    network: Any = reference
    with torch.no_grad():
        expected = network.encode_image(pixels, normalize=True), network.encode_text(tokens, normalize=True)
        got = model.encode("image", images), model.encode("text", tokens)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    assert_same(names.to_open_clip(model, cfg.get("custom_text", False)), state)


@pytest.mark.parametrize("name", ["ViT", "RN", "SigLIP"])
def test_weights_of_either_class_are_read(name: str) -> None:
    cfg = SMALL[name]
    model = ours(cfg)
    randomise(model)
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for custom in (False, True):
        state = names.to_open_clip(model, custom)
        state["logit_scale"] = state["logit_scale"].reshape(1)
        assert any(key.startswith("text.") for key in state) == custom
        assert_same(names.from_open_clip(state, model), plain)


def test_what_open_clip_has_no_place_for_is_refused() -> None:
    model = ours(SMALL["ViT"])
    model.towers["image"].projection = nn.Linear(64, 24)
    with pytest.raises(ValueError, match="no such projection behind this image tower"):
        names.to_open_clip(model, custom_text=False)
    model = ours(SMALL["ViT"])
    model.towers["text"].projection = nn.Sequential(nn.Linear(32, 24))
    with pytest.raises(ValueError, match="no such projection: only a linear one"):
        names.to_open_clip(model, custom_text=False)


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_have_the_names_and_shapes_of_open_clip(name: str) -> None:
    cfg, _ = architectures.describe(name)
    with torch.device("meta"):
        reference, model = theirs(cfg), ours(cfg)
    state = names.to_open_clip(model, cfg.get("custom_text", False))
    assert shapes(state) == shapes(reference.state_dict())
    assert shapes(names.from_open_clip(reference.state_dict(), model)) == shapes(model.state_dict())


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- descriptions ---------------------------------------------------------------------------------------------------

IRRELEVANT = {
    "vision": ("output_tokens", "timm_model_pretrained"),
    "text": ("output_tokens", "pad_id", "hf_model_pretrained", "tokenizer_mode", "final_ln_after_pool"),
}
"""What changes nothing in features."""


def whole(cfg: dict[str, Any]) -> dict[str, Any]:
    """A model_cfg with all defaults, without what the kind of tower does not read."""
    vision, text = vars(CLIPVisionCfg(**cfg["vision_cfg"])), vars(CLIPTextCfg(**cfg["text_cfg"]))
    for key in IRRELEVANT["vision"]:
        vision.pop(key)
    for key in IRRELEVANT["text"]:
        text.pop(key)
    if vision["timm_model_name"]:
        kept = ("image_size", "patch_dropout")
        vision = {key: value for key, value in vision.items() if key.startswith("timm_") or key in kept}
        vision["timm_proj"] = vision["timm_proj"] or None
    elif isinstance(vision["layers"], list):
        vision = {key: vision[key] for key in ("layers", "width", "head_width", "image_size")}
    if text["hf_model_name"]:
        kept = ("context_length", "tokenizer_kwargs")
        text = {key: value for key, value in text.items() if key.startswith("hf_") or key in kept}
    elif text["pool_type"] != "eos":
        text.pop("eos_id")
    if text["hf_tokenizer_name"]:
        text["tokenizer_kwargs"] = {"clean": "whitespace", "strip_sep_token": False, **(text["tokenizer_kwargs"] or {})}
    defaults = {"quick_gelu": False, "init_logit_bias": None}
    rest = {key: value for key, value in cfg.items() if key not in ("vision_cfg", "text_cfg", "custom_text")}
    return {**defaults, **rest, "vision_cfg": vision, "text_cfg": text}


@pytest.mark.parametrize("name", architectures.names())
def test_every_architecture_of_open_clip_is_told_and_told_back(name: str) -> None:
    model_cfg, preprocess_cfg = architectures.describe(name)
    if "multimodal_cfg" in model_cfg:
        with pytest.raises(ValueError, match=f"open_clip's {name}: is a CoCa, with a text decoder"):
            architectures.architecture(name)
        return
    model, towers = from_open_clip(model_cfg, preprocess_cfg)
    told, preprocess = to_open_clip(towers, section(model), encoding(model_cfg))
    assert whole(told) == whole(model_cfg)
    size = model_cfg["vision_cfg"].get("image_size", 224)
    assert preprocess == {**preprocess_cfg, "size": size}


def test_there_are_architectures() -> None:
    assert {"ViT-B-32", "RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP"} <= set(architectures.names())


def test_defaults_of_preprocessing_are_open_clips() -> None:
    from open_clip.transform import PreprocessCfg

    assert vars(PreprocessCfg()) == PREPROCESS


def test_a_tag_brings_its_preprocessing_and_activation() -> None:
    image = architectures.architecture("ViT-B-16-SigLIP").towers["image"].model_dump()
    assert (image["mean"], image["std"], image["resize"]) == ((0.5,) * 3, (0.5,) * 3, "squash")
    plain, openai = (architectures.architecture("ViT-B-32", tag) for tag in (None, "openai"))
    for kind in ("image", "text"):
        assert plain.towers[kind].model_dump()["activation"] == "gelu"
        assert openai.towers[kind].model_dump()["activation"] == "quick_gelu"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no architecture 'ViT-B-33'\. Did you mean 'ViT-B-"):
        architectures.architecture("ViT-B-33")
    with pytest.raises(ValueError, match=r"no weights 'opnai' of ViT-B-32; there are: openai, .*Did you mean 'openai'"):
        architectures.architecture("ViT-B-32", "opnai")


@pytest.mark.parametrize(
    ("where", "change", "reason"),
    [
        ("vision_cfg", {"qk_norm": True}, "qk_norm"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "positions are learnt here"),
        ("vision_cfg", {"invented": 1}, "settings that are not known here: invented"),
        ("vision_cfg", {"image_size": [32, 64]}, "images are square here"),
        ("vision_cfg", {"act_kwargs": {"inplace": True}}, "act_kwargs"),
        ("text_cfg", {"embed_cls": True}, "embed_cls"),
        ("text_cfg", {"pool_type": "none"}, "pool_type=none"),
        ("text_cfg", {"block_type": "custom"}, "block_type=custom"),
    ],
)
def test_what_our_towers_cannot_be_is_refused(where: str, change: dict[str, Any], reason: str) -> None:
    cfg = copy.deepcopy(SMALL["ViT"])
    cfg[where] |= change
    with pytest.raises(ValueError, match=reason):
        from_open_clip(cfg, {})


@pytest.mark.parametrize(("clean", "told"), [("none", {}), ("lower", {"clean": "lower"})])
def test_open_clip_is_told_how_captions_were_cleaned(clean: Any, told: dict[str, str]) -> None:
    model, towers = from_open_clip(SMALL["ViT"], {})
    learnt = ByteBPE(vocab_size=300, max_captions=1, clean=clean)
    text = towers["text"].model_copy(update={"tokenizer": learnt})
    cfg, _ = to_open_clip({**towers, "text": text}, section(model), encoding(SMALL["ViT"]), "here")
    assert cfg["text_cfg"]["tokenizer_kwargs"] == told
    assert cfg["text_cfg"]["hf_tokenizer_name"] == "here"
    theirs = HFTokenizer(name="here", clean=clean, strip_sep=False)
    text = towers["text"].model_copy(update={"tokenizer": theirs})
    cfg, _ = to_open_clip({**towers, "text": text}, section(model), encoding(SMALL["ViT"]))
    assert cfg["text_cfg"]["tokenizer_kwargs"] == {**told, "strip_sep_token": False}


def test_what_open_clip_cannot_be_is_refused() -> None:
    model, towers = from_open_clip(SMALL["ViT"], {})
    quick = towers["text"].model_copy(update={"activation": "quick_gelu"})
    with pytest.raises(ValueError, match="both transformers have activation=quick_gelu, or neither"):
        to_open_clip({**towers, "text": quick}, section(model))
    image = towers["image"].model_copy(update={"projection": "mlp"})
    with pytest.raises(ValueError, match="has projection=linear, this one mlp"):
        to_open_clip({**towers, "image": image}, section(model))
    with pytest.raises(ValueError, match="one image and one text tower; these are: image"):
        to_open_clip({"image": towers["image"]}, section(model))

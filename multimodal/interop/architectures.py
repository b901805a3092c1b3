"""open_clip's descriptions of models (`model_configs/*.json`) to our towers and back."""

import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from multimodal.config import ModelSection
from multimodal.parts import Encoding, Tokenizer, Tower, did_you_mean
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.hf_text import HFText
from multimodal.towers.hf_tokenizer import HFTokenizer
from multimodal.towers.images import ImageTower
from multimodal.towers.resnet import ResNet
from multimodal.towers.text import TextTower
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.timm_trunk import TimmTrunk
from multimodal.towers.transformer import Activation
from multimodal.towers.vit import ViT

Json = dict[str, Any]

PREPROCESS: Json = {
    "size": 224,
    "mode": "RGB",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
"""open_clip's defaults, of OpenAI's models."""
CLIP_VOCABULARY = 49408
LOGIT_SCALE = 1 / 0.07
EXTRAS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
"""Variants of blocks that none of open_clip's own architectures has, and ours do not either."""
POOLERS: dict[str, Any] = {
    "mean_pooler": "mean",
    "max_pooler": "max",
    "cls_pooler": "pooler",
    "cls_last_hidden_state_pooler": "cls",
}
NAMES = {
    "model": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
    | {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"},
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value"}
    | {"patch_dropout", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type"}
    | {"final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs", "block_type", *EXTRAS}
    | {"timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"}
    | {"timm_drop_path"},
    "text_cfg": {"context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "width"}
    | {"heads", "layers", "mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "eos_id", "no_causal_mask"}
    | {"final_ln_after_pool", "pool_type", "proj_bias", "proj_type", "output_tokens", "act_kwargs", "norm_kwargs"}
    | {"block_type", *EXTRAS, "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}
"""What open_clip knows; anything else is a newer version's, and not to be passed over."""


class Architecture(NamedTuple):
    """A model of open_clip in our terms."""

    model: Json
    """Of `ModelSection`: embed_dim, logit_scale, logit_bias."""
    towers: dict[str, Tower]
    """"image" and "text"."""


# --- what there is --------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """open_clip's `model_configs`, found without importing it; None if it is not installed."""
    spec = find_spec("open_clip")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "model_configs" if places else None


def names() -> list[str]:
    """All architectures that open_clip describes."""
    place = folder()
    return sorted(path.stem for path in place.glob("*.json")) if place else []


def tags(name: str) -> list[str]:
    """The pretrained weights that open_clip knows of an architecture."""
    from open_clip.pretrained import list_pretrained_tags_by_model

    return list(list_pretrained_tags_by_model(name))


def describe(name: str, tag: str | None = None) -> tuple[Json, Json]:
    """open_clip's model_cfg and preprocess_cfg of an architecture, of its first pretrained tag unless one is given.

    With a tag the activation is the one that its weights were trained with, of which open_clip only warns.
    ValueError for names that it does not know.
    """
    place = folder()
    if place is None:
        raise ValueError("open_clip is not installed")
    if name not in names():
        raise ValueError(f"open_clip has no architecture '{name}'.{did_you_mean(name, names())}")
    from open_clip.pretrained import get_pretrained_cfg

    model_cfg: Json = json.loads((place / f"{name}.json").read_text())
    known = tags(name)
    if tag is not None:
        weights: Json = get_pretrained_cfg(name, tag)
        if not weights:
            have = ", ".join(known) or "none"
            raise ValueError(
                f"open_clip has no weights '{tag}' of {name}; there are: {have}.{did_you_mean(tag, known)}"
            )
        model_cfg["quick_gelu"] = weights.get("quick_gelu", False) or model_cfg.get("quick_gelu", False)
        if "hf_model_name" in model_cfg["text_cfg"]:
            model_cfg["text_cfg"]["hf_model_pretrained"] = False  # they are in the tag's weights
    else:
        weights = get_pretrained_cfg(name, known[0]) if known else {}
    siglip: Json = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"} if "SigLIP" in name else {}
    given = {key: weights[key] for key in PREPROCESS if weights.get(key) is not None}
    return model_cfg, {**PREPROCESS, **(given or siglip)}


def architecture(name: str, tag: str | None = None) -> Architecture:
    """A named architecture in our terms; ValueError, naming it, where it cannot be told."""
    model_cfg, preprocess_cfg = describe(name, tag)
    try:
        return from_open_clip(model_cfg, preprocess_cfg)
    except ValueError as error:
        raise ValueError(f"open_clip's {name}: {error}") from None


# --- reading --------------------------------------------------------------------------------------------------------


def from_open_clip(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> Architecture:
    """Our towers for a model of open_clip; ValueError says what of it ours cannot be."""
    if "multimodal_cfg" in model_cfg:
        raise ValueError("is a CoCa, with a text decoder that captions images; only pairs of encoders are trained here")
    _refuse_unknown("model", model_cfg)
    vision, text = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    quick = bool(model_cfg.get("quick_gelu", False))
    scale, bias = model_cfg.get("init_logit_scale"), model_cfg.get("init_logit_bias")
    model = {
        "embed_dim": model_cfg["embed_dim"],
        "logit_scale": LOGIT_SCALE if scale is None else math.exp(scale),
        "logit_bias": None if bias is None else float(bias),
    }
    towers: dict[str, Tower] = {"image": _image(vision, preprocess_cfg, quick), "text": _text(text, quick)}
    return Architecture(model, towers)


def _refuse_unknown(where: str, cfg: Mapping[str, Any]) -> None:
    if unknown := sorted(set(cfg) - NAMES[where]):
        raise ValueError(f"{where} has settings that are not known here: {', '.join(unknown)}")
    for name in (*EXTRAS, "embed_cls"):
        if cfg.get(name):
            raise ValueError(f"{where} has {name}, which the towers here cannot do")
    if cfg.get("block_type") not in (None, "default"):
        raise ValueError(f"{where} has block_type={cfg['block_type']}, which the towers here cannot do")


def _image(cfg: Json, preprocess: Mapping[str, Any], quick: bool) -> ImageTower:
    _refuse_unknown("vision_cfg", cfg)
    size = cfg.get("image_size", 224)
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise ValueError(f"vision_cfg has image_size={list(size)}: images are square here")
        size = size[0]
    pre = {**PREPROCESS, **{key: value for key, value in preprocess.items() if value is not None}}
    if pre["mode"] != "RGB" or (pre["fill_color"] and pre["resize_mode"] == "longest"):
        raise ValueError("preprocess_cfg asks for other than RGB images, filled with black")
    shared = {
        "image_size": size,
        "mean": tuple(pre["mean"]),
        "std": tuple(pre["std"]),
        "interpolation": pre["interpolation"],
        "resize": pre["resize_mode"],
    }
    if cfg.get("timm_model_name"):
        return _timm(cfg, shared)
    layers, width, head_width = cfg.get("layers", 12), cfg.get("width", 768), cfg.get("head_width", 64)
    if isinstance(layers, (list, tuple)):
        return ResNet(**shared, layers=tuple(layers), width=width, heads=width * 32 // head_width)
    if cfg.get("pos_embed_type", "learnable") != "learnable":
        raise ValueError(f"vision_cfg has pos_embed_type={cfg['pos_embed_type']}: positions are learnt here")
    pool: Any = "attn" if cfg.get("attentional_pool") else cfg.get("pool_type", "tok")
    if pool not in ("attn", "tok", "avg"):
        raise ValueError(f"vision_cfg has pool_type={pool}: one vector stands for an image here")
    return ViT(
        **shared,
        patch_size=cfg.get("patch_size", 16),
        width=width,
        layers=layers,
        heads=width // head_width,
        mlp_ratio=cfg.get("mlp_ratio", 4.0),
        pool=pool,
        pool_queries=cfg.get("attn_pooler_queries", 256),
        pool_heads=cfg.get("attn_pooler_heads", 8),
        patch_dropout=cfg.get("patch_dropout", 0.0),
        layer_scale=cfg.get("ls_init_value"),
        activation=_activation(cfg, quick),
        norm_eps=_norm_eps(cfg),
        norm_first=not cfg.get("no_ln_pre", False),
        norm_after_pool=cfg.get("final_ln_after_pool", False),
    )


def _timm(cfg: Json, shared: Json) -> ImageTower:

    if cfg.get("timm_proj_bias"):
        raise ValueError("vision_cfg has timm_proj_bias: the projection of timm's networks has no bias here")
    return TimmTrunk(
        **shared,
        name=cfg["timm_model_name"],
        pretrained=cfg.get("timm_model_pretrained", False),
        pool=cfg.get("timm_pool", "avg") or "default",
        projection=cfg.get("timm_proj", "linear") or "head",
        drop=cfg.get("timm_drop", 0.0),
        drop_path=cfg.get("timm_drop_path"),
        patch_dropout=cfg.get("patch_dropout", 0.0),
    )


def _text(cfg: Json, quick: bool) -> TextTower:

    _refuse_unknown("text_cfg", cfg)
    tokenizer = _tokenizer(cfg)
    context = cfg.get("context_length", 77)
    if cfg.get("hf_model_name"):
        pooler = cfg.get("hf_pooler_type", "mean_pooler")
        if pooler not in POOLERS:
            raise ValueError(f"text_cfg has hf_pooler_type={pooler}; known are: {', '.join(POOLERS)}")
        return HFText(
            tokenizer=tokenizer,
            context_length=context,
            name=cfg["hf_model_name"],
            pretrained=cfg.get("hf_model_pretrained", True),
            pool=POOLERS[pooler],
            projection=cfg.get("hf_proj_type", "mlp") or "none",
        )
    pool, projection = cfg.get("pool_type", "argmax"), cfg.get("proj_type", "linear")
    pools: dict[str, Any] = {"argmax": "end", "eos": "end", "last": "last", "first": "first"}
    if pool not in pools or projection not in ("linear", "none"):
        raise ValueError(f"text_cfg has pool_type={pool}, proj_type={projection}, which the towers here cannot do")
    return TextTransformer(
        tokenizer=tokenizer,
        context_length=context,
        vocab_size=cfg.get("vocab_size", CLIP_VOCABULARY),
        width=cfg.get("width", 512),
        layers=cfg.get("layers", 12),
        heads=cfg.get("heads", 8),
        mlp_ratio=cfg.get("mlp_ratio", 4.0),
        causal=not cfg.get("no_causal_mask", False),
        pool=pools[pool],
        layer_scale=cfg.get("ls_init_value"),
        activation=_activation(cfg, quick),
        norm_eps=_norm_eps(cfg),
        projection="none" if projection == "none" else "linear_bias" if cfg.get("proj_bias") else "linear",
    )


def _tokenizer(cfg: Json) -> Tokenizer:

    options = dict(cfg.get("tokenizer_kwargs") or {})
    if cfg.get("tokenizer_mode"):
        raise ValueError(f"text_cfg has tokenizer_mode={cfg['tokenizer_mode']}, which the tokenizers here do not have")
    if not cfg.get("hf_tokenizer_name"):
        if options:
            raise ValueError("text_cfg has tokenizer_kwargs for CLIP's own tokenizer, which has no settings here")
        return ClipBPE()
    clean, strip = options.pop("clean", "whitespace"), options.pop("strip_sep_token", False)
    if options:
        raise ValueError(f"text_cfg has tokenizer_kwargs that are not known here: {', '.join(options)}")
    return HFTokenizer(name=cfg["hf_tokenizer_name"], clean=clean, strip_sep=strip)


def _activation(cfg: Json, quick: bool) -> Activation:
    options = cfg.get("act_kwargs") or {}
    if not options:
        return "quick_gelu" if quick else "gelu"
    if options != {"approximate": "tanh"} or quick:
        raise ValueError(f"has act_kwargs={options} with quick_gelu={quick}; known is the tanh approximation of GELU")
    return "gelu_tanh"


def _norm_eps(cfg: Json) -> float:
    options = dict(cfg.get("norm_kwargs") or {})
    eps = float(options.pop("eps", 1e-5))
    if options:
        raise ValueError(f"has norm_kwargs that are not known here: {', '.join(options)}")
    return eps


# --- writing --------------------------------------------------------------------------------------------------------


def to_open_clip(
    towers: Mapping[str, Tower],
    section: ModelSection,
    encoding: Encoding | None = None,
    tokenizer: str | None = None,
) -> tuple[Json, Json]:
    """open_clip's model_cfg and preprocess_cfg of towers "image" and "text"; ValueError says what it cannot do.

    `encoding` is what the text tower's tokenizer builds: needed where neither CLIP's nor the tower says the size of
    the vocabulary and the end token. `tokenizer` names, to transformers, a vocabulary that only we have.
    """
    image, text = towers.get("image"), towers.get("text")
    if set(towers) != {"image", "text"} or not isinstance(image, ImageTower) or not isinstance(text, TextTower):
        raise ValueError(f"open_clip's models have one image and one text tower; these are: {', '.join(towers)}")
    vision_cfg, vision_quick = _from_image(image, section.embed_dim)
    text_cfg, text_quick = _from_text(text, encoding, tokenizer)
    quick = {known for known in (vision_quick, text_quick) if known is not None}
    if len(quick) > 1:
        raise ValueError("in open_clip either both transformers have activation=quick_gelu, or neither")
    model_cfg: Json = {"embed_dim": section.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if quick == {True}:
        model_cfg["quick_gelu"] = True
    if not isinstance(text, TextTransformer) or not text.causal:
        model_cfg["custom_text"] = True
    if not math.isclose(section.logit_scale, LOGIT_SCALE, rel_tol=1e-6):
        model_cfg["init_logit_scale"] = math.log(section.logit_scale)
    if section.logit_bias is not None:
        model_cfg["init_logit_bias"] = section.logit_bias
    preprocess_cfg = {
        **PREPROCESS,
        "size": image.image_size,
        "mean": image.mean,
        "std": image.std,
        "interpolation": image.interpolation,
        "resize_mode": image.resize,
    }
    return model_cfg, preprocess_cfg


def _from_image(tower: ImageTower, embed_dim: int) -> tuple[Json, bool | None]:
    """vision_cfg, and whether it has QuickGELU, if it depends on that."""

    if isinstance(tower, TimmTrunk):
        return {
            "image_size": tower.image_size,
            "timm_model_name": tower.name,
            "timm_model_pretrained": False,
            "timm_pool": "" if tower.pool == "default" else tower.pool,
            "timm_proj": None if tower.projection == "head" else tower.projection,
            "timm_drop": tower.drop,
            "timm_drop_path": tower.drop_path,
            "patch_dropout": tower.patch_dropout,
        }, None
    if isinstance(tower, ResNet):
        width = tower.width * 32
        cfg = {"image_size": tower.image_size, "layers": list(tower.layers), "width": tower.width}
        return {**cfg, "head_width": width // tower.heads}, None
    if not isinstance(tower, ViT):
        raise ValueError(f"open_clip has no image tower like {type(tower).__name__}")
    if tower.projection != "linear":
        raise ValueError(f"the vision transformer of open_clip has projection=linear, this one {tower.projection}")
    cfg = {
        "image_size": tower.image_size,
        "layers": tower.layers,
        "width": tower.width,
        "head_width": tower.width // tower.heads,
        "patch_size": tower.patch_size,
        "mlp_ratio": tower.mlp_ratio,
        "patch_dropout": tower.patch_dropout,
        "ls_init_value": tower.layer_scale,
        "no_ln_pre": not tower.norm_first,
        "final_ln_after_pool": tower.norm_after_pool,
        **_options(tower),
    }
    if tower.pool == "attn":
        pooling = {"attn_pooler_queries": tower.pool_queries, "attn_pooler_heads": tower.pool_heads}
        cfg |= {"attentional_pool": True, **pooling}
    else:
        cfg["pool_type"] = tower.pool
    return cfg, tower.activation == "quick_gelu"


def _from_text(tower: TextTower, encoding: Encoding | None, tokenizer: str | None) -> tuple[Json, bool | None]:
    """text_cfg, and whether it has QuickGELU, if it depends on that."""

    cfg: Json = {"context_length": tower.context_length}
    if isinstance(tower.tokenizer, HFTokenizer):
        cfg["hf_tokenizer_name"] = tokenizer or tower.tokenizer.name or getattr(tower, "name", None)
        cfg["tokenizer_kwargs"] = {"clean": tower.tokenizer.clean, "strip_sep_token": tower.tokenizer.strip_sep}
    elif tokenizer is not None:
        cfg["hf_tokenizer_name"] = tokenizer
    elif not isinstance(tower.tokenizer, ClipBPE):
        raise ValueError(f"open_clip has no tokenizer like {type(tower.tokenizer).__name__}")
    if isinstance(tower, HFText):
        poolers = {ours: theirs for theirs, ours in POOLERS.items()}
        if tower.pool not in poolers:
            raise ValueError(f"open_clip's Hugging Face towers do not have pool={tower.pool}")
        projection = None if tower.projection == "none" else tower.projection
        names = {"hf_model_name": tower.name, "hf_model_pretrained": tower.pretrained}
        return {**cfg, **names, "hf_proj_type": projection, "hf_pooler_type": poolers[tower.pool]}, None
    if not isinstance(tower, TextTransformer):
        raise ValueError(f"open_clip has no text tower like {type(tower).__name__}")
    if tower.mask_padding:
        raise ValueError("open_clip's text towers do not have mask_padding")
    if tower.projection == "mlp":
        raise ValueError("the text transformer of open_clip has no projection=mlp")
    rows = tower.vocab_size or (encoding.vocab_size if encoding else None)
    clip = isinstance(tower.tokenizer, ClipBPE)
    rows = CLIP_VOCABULARY if rows is None and clip else rows
    if rows is None:
        raise ValueError("towers.text.vocab_size is not known without the tokenizer's vocabulary")
    cfg |= {
        "vocab_size": rows,
        "width": tower.width,
        "heads": tower.heads,
        "layers": tower.layers,
        "mlp_ratio": tower.mlp_ratio,
        "ls_init_value": tower.layer_scale,
        "no_causal_mask": not tower.causal,
        "proj_type": "none" if tower.projection == "none" else "linear",
        "proj_bias": tower.projection == "linear_bias",
        **_pool(tower, encoding, clip),
        **_options(tower),
    }
    return cfg, tower.activation == "quick_gelu"


def _pool(tower: TextTransformer, encoding: Encoding | None, clip: bool) -> Json:
    if tower.pool != "end":
        return {"pool_type": tower.pool}
    if clip:
        return {"pool_type": "argmax"}  # the end token has the highest id
    if encoding is None or encoding.end is None:
        raise ValueError(
            "towers.text.pool=end: which token ends a text is not known without the tokenizer's vocabulary"
        )
    return {"pool_type": "eos", "eos_id": encoding.end}


def _options(tower: ViT | TextTransformer) -> Json:
    activation = {"act_kwargs": {"approximate": "tanh"}} if tower.activation == "gelu_tanh" else {}
    norm = {} if tower.norm_eps == 1e-5 else {"norm_kwargs": {"eps": tower.norm_eps}}
    return {**activation, **norm}

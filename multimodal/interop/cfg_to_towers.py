"""open_clip's descriptions of models (model_cfg, preprocess_cfg) to our towers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from multimodal.interop.cfg import (
    CLIP_VOCABULARY,
    EXTRAS,
    LOGIT_SCALE,
    NAMES,
    NORM_EPS,
    POOLERS,
    PREPROCESS,
    TANH,
    Json,
)
from multimodal.parts import Tokenizer, Tower
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


class Architecture(NamedTuple):
    """A model of open_clip in our terms."""

    model: Json
    """Of `ModelSection`: embed_dim, logit_scale, logit_bias."""
    towers: dict[str, Tower]
    """"image" and "text"."""


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
    if options != TANH or quick:
        raise ValueError(f"has act_kwargs={options} with quick_gelu={quick}; known is the tanh approximation of GELU")
    return "gelu_tanh"


def _norm_eps(cfg: Json) -> float:
    options = dict(cfg.get("norm_kwargs") or {})
    eps = float(options.pop("eps", NORM_EPS))
    if options:
        raise ValueError(f"has norm_kwargs that are not known here: {', '.join(options)}")
    return eps

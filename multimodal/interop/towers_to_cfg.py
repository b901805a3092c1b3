"""Our towers to open_clip's descriptions of models (model_cfg, preprocess_cfg)."""

import math
from collections.abc import Mapping

from multimodal.config import ModelSection
from multimodal.interop.cfg import CLIP_VOCABULARY, LOGIT_SCALE, NORM_EPS, POOLERS, PREPROCESS, TANH, Json
from multimodal.parts import Encoding, Tower
from multimodal.towers.byte_bpe import ByteBPE
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.hf_text import HFText
from multimodal.towers.hf_tokenizer import HFTokenizer
from multimodal.towers.images import ImageTower
from multimodal.towers.resnet import ResNet
from multimodal.towers.text import TextTower
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.timm_trunk import TimmTrunk
from multimodal.towers.vit import ViT


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
    vision_cfg, vision_quick = _from_image(image)
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


def _from_image(tower: ImageTower) -> tuple[Json, bool | None]:
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
        cfg["tokenizer_kwargs"] = {**_clean(tower.tokenizer), "strip_sep_token": tower.tokenizer.strip_sep}
    elif isinstance(tower.tokenizer, ByteBPE) and tokenizer is not None:
        cfg |= {"hf_tokenizer_name": tokenizer, "tokenizer_kwargs": _clean(tower.tokenizer)}
    elif tokenizer is not None:
        cfg["hf_tokenizer_name"] = tokenizer
    elif not isinstance(tower.tokenizer, ClipBPE):
        raise ValueError(f"open_clip has no tokenizer like {type(tower.tokenizer).__name__}")
    if isinstance(tower, HFText):
        poolers = {ours: theirs for theirs, ours in POOLERS.items() if ours != "max"}  # theirs fails
        if tower.pool not in poolers or tower.projection == "linear_bias":
            told = f"pool={tower.pool}, projection={tower.projection}"
            raise ValueError(f"open_clip's Hugging Face towers cannot have {told}")
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


def _clean(tokenizer: HFTokenizer | ByteBPE) -> Json:
    return {} if tokenizer.clean == "none" else {"clean": tokenizer.clean}


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
    activation = {"act_kwargs": TANH} if tower.activation == "gelu_tanh" else {}
    norm = {} if tower.norm_eps == NORM_EPS else {"norm_kwargs": {"eps": tower.norm_eps}}
    return {**activation, **norm}

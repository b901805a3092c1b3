"""What open_clip's descriptions of models (model_cfg, preprocess_cfg) are made of."""

from typing import Any

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
NORM_EPS = 1e-5
TANH = {"approximate": "tanh"}
"""act_kwargs of gelu_tanh."""
EXTRAS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
"""Variants of blocks that none of open_clip's own architectures has, and ours do not either."""
POOLERS: dict[str, Any] = {
    "mean_pooler": "mean",
    "max_pooler": "max",
    "cls_pooler": "pooler",
    "cls_last_hidden_state_pooler": "cls",
}
"""hf_pooler_type, and `pool` of our Hugging Face towers."""
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

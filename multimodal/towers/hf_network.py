"""Networks of transformers, made from data alone: none of a repository's own code is run."""

import json
from typing import Any

from torch import nn

NOT_DATA = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config", "custom_pipelines")
"""Entries of a Hugging Face configuration that can make it fetch or run something."""
WIDTHS = ("hidden_size", "d_model", "dim")
"""What configurations call the width of their network."""


def describe(name: str) -> dict[str, Any]:
    """The configuration of a network on the hub, or in a local folder; ValueError if there is none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"name: '{name}' is no local folder and cannot be had from the hub ({reason}); "
            "a folder with config.json works without a network"
        ) from None
    described: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return described


def build(
    name: str,
    architecture: dict[str, Any],  # as described, or kept in a checkpoint
    pretrained: bool,
) -> tuple[Any, int]:
    """The encoder, and its width; ValueError if it is none of text, or its weights cannot be had."""
    from transformers import MODEL_MAPPING, AutoModel

    config = _plain_config(architecture)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"name: '{name}' is of model_type {config.model_type}, which AutoModel of transformers is not")
    width = next((int(getattr(config, key)) for key in WIDTHS if hasattr(config, key)), None)
    if width is None:
        raise ValueError(
            f"name: '{name}', of model_type {config.model_type}, is no encoder of text by itself: its configuration "
            f"has none of {', '.join(WIDTHS)}"
        )
    if pretrained:
        try:
            net: Any = AutoModel.from_pretrained(name, config=config, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"pretrained: no safetensors weights of '{name}' can be had ({reason})") from None
    else:
        net = AutoModel.from_config(config, trust_remote_code=False)
    net = net.encoder if getattr(config, "is_encoder_decoder", False) else net
    if not isinstance(net.get_input_embeddings(), nn.Embedding):
        raise ValueError(f"name: '{name}' is no encoder of text: it has no table of tokens")
    return net, width


def _plain_config(architecture: dict[str, Any]) -> Any:
    """The configuration without what could make transformers fetch or run something."""
    from transformers import AutoConfig

    kept = _plain(architecture)
    kind = kept.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError("the stored architecture of the text tower has no model_type")
    try:
        return AutoConfig.for_model(kind, **kept)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the stored architecture of the text tower is not known to transformers: {error}") from None


def _plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _plain(item) for key, item in value.items() if key not in NOT_DATA and not key.startswith("_")}

"""Networks of transformers, made from data alone: none of a repository's own code is run, and nothing is fetched."""

import json
from dataclasses import fields
from typing import Any

import torch

from multimodal.parts import did_you_mean

FAMILIES = (
    *("albert", "bart", "bert", "camembert", "clip_text_model", "data2vec-text", "deberta", "deberta-v2"),
    *("distilbert", "electra", "ernie", "gpt2", "llama", "m2m_100", "mbart", "mistral", "modernbert", "mpnet", "mt5"),
    *("qwen2", "qwen3", "rembert", "roberta", "roberta-prelayernorm", "t5", "umt5", "xlm", "xlm-roberta"),
    "xlm-roberta-xl",
)
"""Values of `model_type` that a text tower may have, for each of which the tests hold what towers promise.

Others are refused: the configurations of some make transformers fetch a second network or read a folder.
"""
MORE_FIELDS = {
    "deberta": {"talking_head"},
    "deberta-v2": {"attention_head_size", "conv_act", "conv_groups", "conv_kernel_size", "norm_rel_ebd"}
    | {"position_buckets", "share_att_key"},
}
"""What families read of their configurations without declaring it."""
NESTED = "rope_parameters"
"""The one field that may hold values by name."""
LARGEST = 10**7
"""Whole numbers in a configuration are not above it; some are the length of a list that is made at once."""


def describe(name: str) -> dict[str, Any]:
    """What makes the network on the hub, or in a local folder, as plain data; ValueError if it is no text encoder."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        raw, _ = PreTrainedConfig.get_config_dict(name)
        known = raw.get("model_type") in (None, *FAMILIES)  # by its name, where it is an old one that does not tell
        config = AutoConfig.from_pretrained(name, trust_remote_code=False) if known else None
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise ValueError(
            f"name: '{name}' is no local folder and cannot be had from the hub ({reason}); "
            "a folder with config.json works without a network"
        ) from None
    described = raw if config is None else json.loads(config.to_json_string(use_diff=False))
    return plain(described, f"name: '{name}'")


def plain(
    architecture: dict[str, Any],
    origin: str,  # for messages
) -> dict[str, Any]:
    """A description without all that is not a plain field of its family's own; ValueError if it is of no such family.

    What goes is what all configurations share: dtype, names of classes and repositories, how attention is computed.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = architecture.get("model_type")
    if kind not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES)
        known = ", ".join(FAMILIES)
        raise ValueError(f"{origin}: model_type {kind!r} is none of the text encoders known here ({known}).{hint}")
    own = {field.name for field in fields(CONFIG_MAPPING[kind])} - {field.name for field in fields(PreTrainedConfig)}
    own |= MORE_FIELDS.get(kind, set())
    kept = {key: value for key, value in architecture.items() if key in own}
    for key, value in kept.items():
        if not _is_plain(value, nested=key == NESTED):
            raise ValueError(f"{origin}: {key} is not a plain value, or a number above {LARGEST:,}")
    return {"model_type": kind, **kept}


def _is_plain(value: Any, nested: bool) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item, nested=False) for item in value)
    if isinstance(value, dict):
        return nested and all(_is_plain(item, nested) for item in value.values())
    return value is None or isinstance(value, (str, float)) or (isinstance(value, int) and value <= LARGEST)


def build(
    name: str,
    architecture: dict[str, Any],  # plain
    pretrained: bool,
    origin: str,  # for messages
) -> tuple[Any, int]:
    """The encoder in float32, and its width; ValueError if it cannot be built, or its weights cannot be had."""
    from transformers import CONFIG_MAPPING, AutoModel

    try:
        values = {key: value for key, value in architecture.items() if key != "model_type"}
        config = CONFIG_MAPPING[architecture["model_type"]](**values)
        net: Any = None if pretrained else AutoModel.from_config(config, dtype=torch.float32)
    except Exception as error:  # of all kinds: whatever its numbers and names lead to
        raise ValueError(f"{origin} describes no network that can be built: {_first_line(error)}") from None
    if pretrained:
        try:
            net = AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = _first_line(error)
            raise ValueError(f"pretrained: no safetensors weights of '{name}' can be had ({reason})") from None
    return net.encoder if config.is_encoder_decoder else net, config.hidden_size


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

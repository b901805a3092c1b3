"""open_clip's architectures by name (`model_configs/*.json`)."""

import json
from importlib.util import find_spec
from pathlib import Path

from multimodal.interop.cfg import PREPROCESS, Json
from multimodal.interop.cfg_to_towers import Architecture, from_open_clip
from multimodal.resolve import did_you_mean


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

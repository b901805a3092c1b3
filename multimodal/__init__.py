"""Align image and text towers in one embedding space."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.api import ImageTextModel, load, open_clip

__all__ = ["ImageTextModel", "load", "open_clip"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'multimodal' has no attribute '{name}'")
    from multimodal import api  # here, so that importing a part does not import models

    return getattr(api, name)

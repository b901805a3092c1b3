"""Names of weights: ours and open_clip's, both ways, without loss.

open_clip's CLIP class has the text tower's weights beside `visual.`, its CustomTextCLIP below `text.`; both are read.
Projections that open_clip keeps as [W, D] matrices (`visual.proj`, `text_projection`) are linear layers [D, W] here.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from multimodal.model import Model
from multimodal.towers.resnet import ResNetEncoder
from multimodal.towers.text_transformer import TextTransformerEncoder
from multimodal.towers.vit import ViTEncoder

IMAGE, TEXT = "towers.image.", "towers.text."
PLAIN = ("text_projection", "positional_embedding", "token_embedding", "transformer.", "ln_final.")
"""How the text tower's names begin in open_clip's CLIP class."""


def is_open_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether names are open_clip's rather than ours."""
    return any(name.startswith("visual.") for name in state) and not any(name.startswith("towers.") for name in state)


def from_open_clip(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """open_clip's weights under the names of our `model`; names with no place in it stay as they are."""
    prefixed = any(name.startswith("text.") for name in state)
    image, text = _tower(model, "image"), _tower(model, "text")
    ours = {}
    for name, tensor in state.items():
        if name in ("logit_scale", "logit_bias"):
            ours[name] = tensor.reshape(()) if tensor.numel() == 1 else tensor
        elif name.startswith("visual.") and image is not None:
            ours.update([_image_from(name.removeprefix("visual."), tensor, image)])
        elif text is not None and (name.startswith("text.") or (not prefixed and name.startswith(PLAIN))):
            ours.update([_text_from(name.removeprefix("text."), tensor, text)])
        else:
            ours[name] = tensor
    return ours


def _tower(model: Model, name: str) -> nn.Module | None:
    return dict(model.towers.items()).get(name)


def _is_timm(tower: nn.Module) -> bool:
    return hasattr(tower.net, "trunk")


def _image_from(name: str, tensor: Tensor, tower: nn.Module) -> tuple[str, Tensor]:
    if _is_timm(tower) and name.startswith(("head.proj.", "head.mlp.")):
        return f"{IMAGE}projection.{name.removeprefix('head.')}", tensor
    if isinstance(tower, ViTEncoder) and name == "proj":
        return f"{IMAGE}projection.weight", tensor.T
    return f"{IMAGE}net.{name}", tensor


def _text_from(name: str, tensor: Tensor, tower: nn.Module) -> tuple[str, Tensor]:
    if isinstance(tower, TextTransformerEncoder):
        if name == "text_projection":
            return f"{TEXT}projection.weight", tensor.T
        if name.startswith("text_projection."):
            return f"{TEXT}projection.{name.removeprefix('text_projection.')}", tensor
        return f"{TEXT}net.{name}", tensor
    if name.startswith("proj."):
        return f"{TEXT}projection.{name.removeprefix('proj.')}", tensor
    return f"{TEXT}net.{name.removeprefix('transformer.')}", tensor


def to_open_clip(
    model: Model,
    custom_text: bool,  # for open_clip's CustomTextCLIP class, rather than CLIP
) -> dict[str, Tensor]:
    """Our weights under open_clip's names; ValueError where it has no place for them."""
    if set(model.towers) != {"image", "text"}:
        raise ValueError(f"open_clip's models have towers image and text; these are: {', '.join(model.towers)}")
    image, text = model.towers["image"], model.towers["text"]
    if not custom_text and not isinstance(text, TextTransformerEncoder):
        raise ValueError("open_clip has a text tower of this kind in its CustomTextCLIP class only")
    state = model.state_dict()
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith("towers.")}
    theirs |= {f"visual.{name}": tensor for name, tensor in _image_to(_below(state, IMAGE), image)}
    prefix = "text." if custom_text else ""
    return theirs | {f"{prefix}{name}": tensor for name, tensor in _text_to(_below(state, TEXT), text)}


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _image_to(state: Mapping[str, Tensor], tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    vit = isinstance(tower, ViTEncoder)
    projection = {name for name in state if name.startswith("projection.")}
    if (vit and projection != {"projection.weight"}) or (isinstance(tower, ResNetEncoder) and projection):
        raise ValueError("open_clip has no such projection behind this image tower: only a matrix behind a transformer")
    for name, tensor in state.items():
        if name not in projection:
            yield name.removeprefix("net."), tensor
        elif vit:
            yield "proj", tensor.T.contiguous()
        else:
            yield f"head.{name.removeprefix('projection.')}", tensor


def _text_to(state: Mapping[str, Tensor], tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    projection = {name for name in state if name.startswith("projection.")}
    if not isinstance(tower, TextTransformerEncoder):
        for name, tensor in state.items():
            last = name.removeprefix("projection.")
            yield (f"proj.{last}" if name in projection else f"transformer.{name.removeprefix('net.')}"), tensor
        return
    if projection - {"projection.weight", "projection.bias"}:
        raise ValueError("open_clip's text transformer has no such projection: only a linear one")
    for name, tensor in state.items():
        if name not in projection:
            yield name.removeprefix("net."), tensor
        elif projection == {"projection.weight"}:
            yield "text_projection", tensor.T.contiguous()
        else:
            yield f"text_{name}", tensor

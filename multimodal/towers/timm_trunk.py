"""Any image network of timm, with the head that open_clip puts on it."""

import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from torch import nn

from multimodal.parts import Operational, did_you_mean
from multimodal.resolve import problem
from multimodal.towers.batch_norm import normalise_globally
from multimodal.towers.images import Colour, ImageEncoder, ImagePreprocessor, ImageTower
from multimodal.towers.projection import check_width


class TimmEncoder(ImageEncoder):
    """The network is open_clip's `TimmModel`, whose head is our projection."""

    def depths(self) -> list[list[nn.Parameter]]:
        from timm.models._manipulate import group_parameters

        trunk = self.net.trunk
        if not hasattr(trunk, "group_matcher"):
            return [list(self.net.parameters())]
        groups = group_parameters(trunk, _with_what_follows(trunk.group_matcher(coarse=False)))
        found = [[trunk.get_parameter(name) for name in groups[depth]] for depth in sorted(groups)]
        found[-1] += self.net.head.parameters()
        return found


def _with_what_follows(matcher: Any) -> Any:
    """How timm sorts parameters by depth, but that what it leaves over (the head) is with the last block."""
    from timm.models._manipulate import MATCH_PREV_GROUP

    if isinstance(matcher, dict):
        return {**matcher, "what follows": [("", MATCH_PREV_GROUP)]}

    def depth(name: str) -> tuple[float, ...]:
        found = matcher(name)
        ordinal = tuple(found) if isinstance(found, Iterable) else (found,)
        return (*ordinal, *MATCH_PREV_GROUP) if ordinal == (math.inf,) else ordinal

    return depth


def _unknown(name: str) -> str:
    import timm

    return f"timm has no model '{name}'.{did_you_mean(name, timm.list_models())}"


class TimmTrunk(ImageTower):
    """A network of timm, by its name there, with a projection behind its own pooling.

    Its batch norms take the statistics of the global batch, as those of `resnet` do. Networks whose batch norm has an
    activation inside are refused on several ranks.
    """

    mean: Colour
    """Subtracted from pixels in 0 to 1, per channel; null for what the network's own weights want."""
    std: Colour
    """Divides pixels after that, per channel; null likewise."""
    name: str = Field(min_length=1)
    """Of timm, such as convnext_tiny or vit_base_patch16_siglip_224."""
    pretrained: bool
    """Start from timm's own weights, which are downloaded the first time."""
    pool: Literal["default", "avg", "token", "map", "abs_attn", "rot_attn"]
    """What stands for the image: the network's own choice, the mean, the class token, an attention pool of its own
    (map), or one put on it (abs_attn, rot_attn)."""
    projection: Literal["linear", "mlp", "none", "head"]
    """How the shared space is reached: a matrix, one hidden layer, nothing, or the network's own classifier (head)."""
    drop: float = Field(ge=0, lt=1)
    """Dropout before the projection."""
    drop_path: float | None = Field(ge=0, lt=1)
    """Share of samples that the last block passes by in training; null for the network's own."""
    patch_dropout: float = Field(ge=0, lt=1)
    """Share of patches left out in training (FLIP, Li et al. 2023); for transformers."""
    grad_checkpointing: Operational[bool] = False
    """Compute blocks a second time in the backward pass instead of keeping what they made: slower, with less memory."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_networks_own_colours(cls, value: Any) -> Any:
        """Where mean or std is null, so that a run's configuration says what they were."""
        if not isinstance(value, Mapping):
            return value
        missing = [knob for knob in ("mean", "std") if knob in value and value[knob] is None]
        if not missing or not isinstance(value.get("name"), str):
            return value
        from timm.models import get_pretrained_cfg

        own = get_pretrained_cfg(value["name"])
        if own is None:
            line = problem(_unknown(value["name"]), "name", value=value["name"])
            raise ValidationError.from_exception_data(cls.__name__, [line])
        return {**value, **{knob: getattr(own, knob) for knob in missing}}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"\w+(\.\w+)?", self.name):  # timm reads hf-hub:NAME and local-dir:FOLDER too
            yield "name", f"'{self.name}' is not one of timm's names, such as convnext_tiny"
        if self.projection in ("head", "none") and self.pool == "default":
            yield "pool", f"projection={self.projection} needs one by name, such as avg or token"

    def build(self, preprocessor: ImagePreprocessor, embed_dim: int, saved: bool = False) -> TimmEncoder:
        net = self._net(embed_dim, self.pretrained and not saved)
        trunk = net.trunk
        if self.grad_checkpointing:
            try:
                trunk.set_grad_checkpointing(True)
            except AssertionError:
                raise ValueError(f"grad_checkpointing: {self.name} cannot do it") from None
        normalise_globally(trunk)
        pool = net.head._modules.pop("pool", None)
        projection, net.head = net.head, nn.Sequential(OrderedDict(pool=pool) if pool else OrderedDict())
        own = getattr(trunk, "head_hidden_size", trunk.num_features)
        if own != trunk.num_features and (pool or self.projection in ("linear", "mlp")):
            raise ValueError(
                f"projection: {self.name} gives {own} features and open_clip puts a head for {trunk.num_features} on "
                "it: projection=head, with pool=avg"
            )
        width = embed_dim if self.projection == "head" or pool else own
        check_width(self.projection, width, embed_dim)
        return TimmEncoder(net, projection, width, self.mean, self.std)

    def _net(self, embed_dim: int, pretrained: bool) -> Any:
        import timm
        from open_clip.timm_model import TimmModel

        if not timm.is_model(self.name):
            raise ValueError(f"name: {_unknown(self.name)}")
        try:
            net = TimmModel(
                self.name,
                embed_dim,
                self.image_size,
                pool="" if self.pool == "default" else self.pool,
                proj=None if self.projection == "head" else self.projection,
                drop=self.drop,
                drop_path=self.drop_path,
                patch_drop=self.patch_dropout or None,
                pretrained=pretrained,
            )
        except (TypeError, AssertionError, AttributeError) as error:
            raise ValueError(self._cannot_be_built(error)) from None
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise ValueError(self._cannot_be_built(error)) from None
            raise ValueError(
                f"pretrained: the weights of {self.name} cannot be had ({error}); without a network, "
                "pretrained=false and init.weights=FILE"
            ) from None
        size = net.trunk.default_cfg.get("input_size", (3, self.image_size, self.image_size))[-1]
        if size != self.image_size:  # its own may leave pixels over: 384 by 14 in SigLIP
            patch = getattr(getattr(net.trunk, "patch_embed", None), "patch_size", None)
            if isinstance(patch, tuple) and any(self.image_size % side for side in patch):
                raise ValueError(f"image_size: {self.image_size} is not divisible by {patch[0]}, {self.name}'s patch")
            if hasattr(net.trunk, "set_input_size"):
                net.trunk.set_input_size(self.image_size)
            elif net.trunk.default_cfg.get("fixed_input_size"):
                raise ValueError(f"image_size: {self.name} reads images of {size} pixels only, not {self.image_size}")
        return net

    def _cannot_be_built(self, error: Exception) -> str:
        unusual = {"pool": self.pool, "drop_path": self.drop_path, "patch_dropout": self.patch_dropout or None}
        asked = ", ".join(f"{name}={value}" for name, value in unusual.items() if value not in (None, "default"))
        reason = str(error) or "it has no such thing"
        return f"timm's {self.name} cannot be built{' with ' if asked else ''}{asked}: {reason}"

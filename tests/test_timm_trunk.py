"""The laws of timm's networks as image towers."""

from typing import Any

import pytest
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor

from multimodal.data.augment import Keep
from multimodal.towers.timm_trunk import TimmEncoder, TimmTrunk

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
KNOBS: dict[str, Any] = {
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "image_size": 64,
    "pretrained": False,
    "pool": "default",
    "projection": "linear",
    "drop": 0.0,
    "drop_path": None,
    "patch_dropout": 0.0,
}
NETS = [
    {"name": "convnext_atto"},
    {"name": "convnext_atto", "pool": "avg", "projection": "mlp"},
    {"name": "vit_tiny_patch16_224", "image_size": 224, "pool": "token"},
    {"name": "vit_tiny_patch16_224", "image_size": 224, "pool": "avg", "projection": "head"},
    {"name": "vit_tiny_patch16_224", "image_size": 224, "pool": "token", "projection": "none"},
    {"name": "resnet18", "image_size": 224, "pool": "abs_attn"},
    {"name": "resnet18", "pool": "rot_attn", "projection": "none"},
]


def built(embed_dim: int = 32, **knobs: Any) -> TimmEncoder:
    torch.manual_seed(0)
    part = TimmTrunk(**{**KNOBS, **knobs})
    return part.build(part.preprocessor(list, Keep(), None), embed_dim).double().eval()


def pixels(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def width_of(net: dict[str, Any]) -> int:
    return 192 if net.get("projection") == "none" and "vit" in net["name"] else 32


@pytest.mark.parametrize("net", NETS)
def test_the_network_is_that_of_open_clip(net: dict[str, Any]) -> None:
    knobs = {**KNOBS, **net}
    ours = built(width_of(net), **net)
    theirs = TimmModel(
        net["name"],
        width_of(net),
        knobs["image_size"],
        pool="" if knobs["pool"] == "default" else knobs["pool"],
        proj=None if knobs["projection"] == "head" else knobs["projection"],
    )
    weights = {f"trunk.{k}": v for k, v in ours.net.trunk.state_dict().items()}
    weights |= {f"head.{k}": v for k, v in (ours.net.head.state_dict() | ours.projection.state_dict()).items()}
    theirs.load_state_dict(weights)
    x = pixels(knobs["image_size"])
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    normalised = (x.double() / 255 - mean) / std
    pooled = ours(x)
    assert pooled.shape == (2, ours.width)
    torch.testing.assert_close(ours.projection(pooled), theirs.double().eval()(normalised), rtol=0, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_has_one_depth(net: dict[str, Any]) -> None:
    module = built(width_of(net), **net)
    placed = [id(p) for parameters in module.depths() for p in parameters]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in module.net.parameters()}
    assert len(module.depths()) > 5


def test_another_image_size_resizes_what_has_one() -> None:
    assert built(name="vit_tiny_patch16_224", image_size=96, pool="token")(pixels(96)).shape == (2, 192)


def test_a_network_takes_its_own_image_size_though_patches_leave_pixels_over() -> None:
    with torch.device("meta"):
        module = built(name="vit_so400m_patch14_siglip_384", image_size=384, pool="map")
    assert module.net.trunk.patch_embed.grid_size == (27, 27)


def test_patches_are_dropped_and_blocks_checkpointed_with_the_same_gradient() -> None:
    net = {"name": "vit_tiny_patch16_224", "image_size": 224, "pool": "token"}
    dropping = built(**net, patch_dropout=0.5).train()
    assert not torch.equal(dropping(pixels(224)), dropping(pixels(224)))
    grads = []
    for checkpointing in (False, True):
        module = built(**net, grad_checkpointing=checkpointing).train()
        module(pixels(224)).sum().backward()
        grads.append([p.grad for p in module.net.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "convnext_tny"}, "timm has no model 'convnext_tny'. Did you mean 'convnext_tiny'"),
        ({"name": "convnext_atto", "pool": "token"}, "convnext_atto cannot be built with pool=token: Invalid pool"),
        ({"name": "convnext_atto", "projection": "none"}, r"needs model\.embed_dim=320, the tower's width; it is 32"),
        ({"name": "resnet18", "patch_dropout": 0.5}, "resnet18 cannot be built with patch_dropout=0.5: "),
        (
            {"name": "vit_tiny_patch16_224", "pool": "rot_attn"},
            "with pool=rot_attn: it has no such thing",
        ),
        (
            {"name": "vit_tiny_patch16_224", "pool": "token", "image_size": 100},
            "100 is not divisible by 16",
        ),
        ({"name": "convnext_atto", "projection": "head"}, "projection=head needs one by name"),
    ],
)
def test_settings_that_do_not_fit_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**knobs)


def test_weights_that_cannot_be_had_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"pretrained: .* cannot be had \(no network\).*init\.weights=FILE"):
        built(name="convnext_atto", pretrained=True)

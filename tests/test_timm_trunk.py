"""The laws of timm's networks as image towers."""

from typing import Any

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from multimodal.config import ModelSection
from multimodal.data.augment import Keep
from multimodal.model import Model
from multimodal.parts import Tuning
from multimodal.towers.timm_trunk import TimmEncoder, TimmTrunk

SECTION = ModelSection(embed_dim=32, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)
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
    {"name": "mobilenetv3_small_050", "pool": "avg", "projection": "head"},
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


# name: blocks, of which the last has what follows them (a norm, an attention pool)
BLOCKS = {
    "convnext_atto": 2 + 2 + 6 + 2,
    "vit_tiny_patch16_224": 12,
    "vit_base_patch16_siglip_224": 12,
    "eva02_tiny_patch14_224": 12,
    "beit_base_patch16_224": 12,
    "vit_relpos_small_patch16_224": 12,
    "swin_tiny_patch4_window7_224": 2 + 2 + 6 + 2,
    "resnet18": 2 + 2 + 2 + 2,
    "mobilenetv3_small_050": 1 + 2 + 3 + 2 + 3 + 1,
    "tiny_vit_5m_224": 2 + 2 + 6 + 2,
    "levit_128s": 2 + 3 + 4,
    "hiera_tiny_224": 12,
    "davit_tiny": 1 + 1 + 3 + 1,
    "densenet121": 6 + 12 + 24 + 16,
    "cait_xxs24_224": 24,
    "xcit_nano_12_p16_224": 12 + 2,
    "poolformer_s12": 0,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_follows_the_last_block_is_with_it(name: str) -> None:
    with torch.device("meta"):
        net = nn.Module()
        net.trunk, net.head = timm.create_model(name, num_classes=0), nn.Sequential()
        depths = TimmEncoder(net, nn.Identity(), 1, MEAN, STD).depths()
    placed = [id(p) for parameters in depths for p in parameters]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in net.parameters()}
    assert len(depths) == 1 + BLOCKS[name]
    assert any(p.ndim > 1 and p.numel() > 1000 for p in depths[-1])


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
        (
            {"name": "convnext_atto", "pool": "avg", "projection": "none"},
            r"needs model\.embed_dim=320, the tower's width; it is 32",
        ),
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
        ({"name": "convnext_atto", "projection": "none"}, "projection=none needs one by name"),
        (
            {"name": "vit_tiny_patch16_224", "pool": "token", "image_size": 230},
            "230 is not divisible by 16",
        ),
        ({"name": "mobilenetv3_small_050"}, "gives 1024 features and open_clip puts a head for 288 on it"),
        ({"name": "hgnetv2_b0", "pool": "rot_attn"}, "gives 2048 features"),
        (
            {"name": "twins_svt_small", "image_size": 224, "grad_checkpointing": True},
            "grad_checkpointing: twins_svt_small cannot do it",
        ),
        ({"name": "gemma4_vit_570m_enc"}, "gemma4_vit_570m_enc cannot be built"),
    ],
)
def test_settings_that_do_not_fit_are_refused(knobs: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        built(**knobs)


@pytest.mark.parametrize("name", ["hf-hub:evil/x", "local-dir:/etc", "timm/convnext_atto", "hf_hub:evil", "a.b.c", ""])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_name_is_a_name_and_no_place(name: str, pretrained: bool) -> None:
    with pytest.raises(ValueError, match="name"):
        TimmTrunk(**{**KNOBS, "name": name, "pretrained": pretrained})


def test_colours_that_are_left_open_are_those_of_the_network_and_are_then_written_down() -> None:
    knobs = {**KNOBS, "name": "convnext_tiny", "mean": None}
    part = TimmTrunk(**knobs)
    assert part.mean == (0.485, 0.456, 0.406)
    assert part.std == STD
    stored = part.model_dump(mode="json")
    assert stored["mean"] == [0.485, 0.456, 0.406]
    assert TimmTrunk(**{key: value for key, value in stored.items() if key != "_target_"}) == part
    siglip = TimmTrunk(**{**knobs, "name": "vit_base_patch16_siglip_224", "std": None})
    assert siglip.mean == siglip.std == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"timm has no model 'convnext_tny'\. Did you mean 'convnext_tiny'"):
        TimmTrunk(**{**knobs, "name": "convnext_tny"})


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_saved_tower_takes_no_other_weights(pretrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def watched(*args: Any, pretrained: bool, **knobs: Any) -> Any:
        asked.append(pretrained)
        return create(*args, pretrained=False, **knobs)

    monkeypatch.setattr(timm, "create_model", watched)
    part = TimmTrunk(**{**KNOBS, "name": "convnext_atto", "pretrained": pretrained})
    preprocessor = part.preprocessor(list, Keep(), None)
    part.build(preprocessor, 32)
    part.build(preprocessor, 32, saved=True)
    assert asked == [pretrained, False]


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "levit_128s"])
@pytest.mark.parametrize("tuning", [Tuning(frozen="tower", unfrozen_blocks=3), Tuning(frozen_names=("*attn*",))])
def test_partly_frozen_networks_that_keep_their_attention_biases_are_checkpointed(name: str, tuning: Tuning) -> None:
    """In evaluation they keep them from one forward pass to the next, so the second would do less than the first."""
    grads = []
    for checkpointing in (False, True):
        module = built(name=name, image_size=224, pool="avg", grad_checkpointing=checkpointing)
        model = Model({"image": module}, SECTION)
        model.freeze({"image": tuning})
        model.train()
        model.encode("image", pixels(224)).sum(0)[0].backward()
        grads.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=0, atol=1e-10)


def test_weights_that_cannot_be_had_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"pretrained: .* cannot be had \(no network\).*init\.weights=FILE"):
        built(name="convnext_atto", pretrained=True)

"""The laws of pooling one token: the last block computes no other, and nobody can tell from what comes out."""

import copy
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import PatchDropout
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal.data.augment import Keep
from multimodal.parts import TowerModule
from multimodal.towers.byte_bpe import ByteBPE
from multimodal.towers.images import ImageEncoder
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.transformer import Attention
from multimodal.towers.vit import ViT

CONTEXT, END, PAD = 9, 299, 0
BLOCKS: dict[str, Any] = {"width": 16, "heads": 2, "mlp_ratio": 2.0}
TEXTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal, last": {"pool": "last"},
    "both ways": {"causal": False},
    "both ways, last": {"causal": False, "pool": "last"},
    "masked": {"causal": False, "mask_padding": True},
    "masked, first": {"causal": False, "mask_padding": True, "pool": "first"},
}
KNOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"layers": 1},
    "drop path": {"drop_path": 0.5},
    "layer scale": {"layer_scale": 0.3},
    "checkpointed": {"grad_checkpointing": True, "drop_path": 0.5},
}


def text(**knobs: Any) -> TowerModule:
    torch.manual_seed(0)
    words = ByteBPE(vocab_size=300, max_captions=1)
    tower = TextTransformer(**BLOCKS, **{"layers": 3, **knobs}, tokenizer=words, context_length=CONTEXT)
    encoding: Any = SimpleNamespace(vocab_size=300, pad=PAD, end=END)
    return tower.build(TextPreprocessor(encoding, CONTEXT), 8)


def vit(**knobs: Any) -> TowerModule:
    torch.manual_seed(0)
    colours: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    tower = ViT(
        **BLOCKS, **{"layers": 3, "pool": "tok", "patch_dropout": 0.0, **knobs}, **colours, image_size=16, patch_size=4
    )
    return tower.build(tower.preprocessor(list, Keep(), None), 8)


def captions() -> Tensor:
    """Padded; one ends nowhere, one has words that are as the padding, one has words behind its end."""
    ids = torch.randint(1, END, (6, CONTEXT), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((9, 4, 2, 6, 7)):
        ids[row, length - 1], ids[row, length:] = END, PAD
    ids[3, 2] = PAD
    ids[4, 7:] = torch.tensor([7, END])
    return ids


def pixels() -> Tensor:
    return torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def in_full(module: TowerModule, inputs: Tensor) -> Tensor:
    """As open_clip's own forward pass has it: all tokens in all blocks."""
    features: Tensor
    if isinstance(module, ImageEncoder):
        features = ImageEncoder.features(module, (inputs.to(module.mean.dtype) / 255 - module.mean) / module.std)
    else:
        features = module.net(inputs)  # type: ignore[operator]
    return features


def made(module: TowerModule, forward: Any, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Features, and the gradient of something of them with respect to every weight."""
    module.zero_grad()
    torch.manual_seed(1)
    features = forward(module, inputs)
    weights = torch.randn(features.shape, dtype=features.dtype, generator=torch.Generator().manual_seed(2))
    (features * weights).sum().backward()
    return features.detach(), {name: p.grad for name, p in module.named_parameters()}


def assert_same_as_in_full(module: TowerModule, inputs: Tensor) -> None:
    module = module.double()
    features, grads = made(module, type(module).__call__, inputs)
    expected, expected_grads = made(module, in_full, inputs)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)
    assert [name for name, grad in grads.items() if grad is None] == list(
        dict(module.projection.named_parameters(prefix="projection"))
    )
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("kind", "knobs", "training"), list(product(TEXTS, KNOBS, [True, False])))
def test_a_text_tower_is_the_same_as_in_full(kind: str, knobs: str, training: bool) -> None:
    assert_same_as_in_full(text(**TEXTS[kind], **KNOBS[knobs]).train(training), captions())


@pytest.mark.parametrize("mask", ["none", "for all", "for each"])
@pytest.mark.parametrize("inputs", ["one", "two", "three"])
def test_attention_is_that_of_torch(inputs: str, mask: str) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 2, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    ours = copy.deepcopy(theirs)
    ours.__class__ = Attention
    x = torch.randn(3, CONTEXT, 16, dtype=torch.float64, requires_grad=True)
    query = x if inputs == "one" else x[:, :4].sin()
    given = query, x, x.cos() if inputs == "three" else x
    shape = {"none": None, "for all": (query.shape[1], CONTEXT), "for each": (6, query.shape[1], CONTEXT)}[mask]
    attn_mask = None if shape is None else torch.randn(shape, dtype=torch.float64)
    made = [attention(*given, need_weights=False, attn_mask=attn_mask)[0] for attention in (ours, theirs)]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-12)
    weights = torch.randn_like(made[0])
    grads = [
        torch.autograd.grad((features * weights).sum(), [x, *attention.parameters()], retain_graph=True)
        for features, attention in zip(made, (ours, theirs), strict=True)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("knobs", "training"), list(product(KNOBS, [True, False])))
@pytest.mark.parametrize("more", [{}, {"patch_dropout": 0.5}, {"norm_after_pool": True}, {"norm_first": False}])
def test_a_vision_transformer_is_the_same_as_in_full(knobs: str, training: bool, more: dict[str, Any]) -> None:
    assert_same_as_in_full(vit(**KNOBS[knobs], **more).train(training), pixels())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from([PAD, 1, 2, END]), min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_tokens_are_read_the_same(rows: list[list[int]]) -> None:
    module, ids = text().double(), torch.tensor(rows)
    theirs = copy.deepcopy(module.net)
    theirs.attn_mask = theirs.attn_mask[:5, :5]
    torch.testing.assert_close(module(ids), theirs(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("module", [vit(), *(text(**knobs) for knobs in TEXTS.values())])
def test_the_last_block_computes_one_token(module: TowerModule) -> None:
    seen = []
    *_, before, last = module.net.transformer.resblocks  # type: ignore[union-attr,misc]
    for block in (before, last):
        block.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    inputs = pixels() if isinstance(module, ImageEncoder) else captions()
    module(inputs)
    assert seen == [17 if isinstance(module, ImageEncoder) else CONTEXT, 1]


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


@pytest.mark.parametrize("module", [vit(), text()])
def test_the_last_block_norms_and_projects_each_of_its_inputs_once(module: TowerModule) -> None:
    seen: dict[str, list[int]] = {"norm": [], "product": []}
    last = module.net.transformer.resblocks[-1]  # type: ignore[union-attr,index]
    last.ln_1.register_forward_hook(lambda _, given, __: seen["norm"].append(given[0].shape[1]))

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and _shares_memory(args[1], last.attn.in_proj_weight):
                seen["product"].append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    with Products():
        module(pixels() if isinstance(module, ImageEncoder) else captions())
    tokens = 17 if isinstance(module, ImageEncoder) else CONTEXT
    assert {name: sorted(lengths) for name, lengths in seen.items()} == {name: [1, tokens] for name in seen}


@pytest.mark.parametrize("pool", ["avg", "attn"])
def test_a_vision_transformer_that_pools_all_patches_has_them_all(pool: str) -> None:
    module = vit(pool=pool, pool_queries=3, pool_heads=2)
    seen = []
    module.net.transformer.resblocks[-1].mlp.register_forward_hook(  # type: ignore[union-attr,index]
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    assert torch.equal(module(pixels()), in_full(module, pixels()))
    assert seen == [17, 17]


@pytest.mark.parametrize("build", [vit, text])
def test_in_bf16_it_is_as_near_to_the_truth_as_in_full(build: Any) -> None:
    module, inputs = build(), pixels() if build is vit else captions()
    truth = module(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(inputs), in_full(module, inputs)
    assert ours.dtype == theirs.dtype
    assert 0 < (ours - truth).norm() < 1.5 * (theirs - truth).norm()


@pytest.mark.parametrize("build", [vit, text])
def test_a_copy_has_weights_of_its_own(build: Any) -> None:
    module, inputs = build(), pixels() if build is vit else captions()
    before = module(inputs)
    other = copy.deepcopy(module)
    assert other.state_dict().keys() == module.state_dict().keys()
    with torch.no_grad():
        other.net.transformer.resblocks[-1].ln_1.weight.mul_(3)
    assert torch.equal(module(inputs), before)
    torch.testing.assert_close(other(inputs), in_full(other, inputs), rtol=0, atol=1e-5)
    assert not torch.allclose(other(inputs), before, atol=1e-3)


def test_a_network_has_the_weights_of_open_clips_own_and_no_other() -> None:
    for name in vit().state_dict() | text().state_dict():
        assert "kv" not in name


# --- patch dropout ----------------------------------------------------------------------------------------------------


def test_patches_are_left_out_as_open_clip_does_bit_for_bit() -> None:
    ours = vit(patch_dropout=0.4).train().net.patch_dropout  # type: ignore[union-attr]
    theirs = PatchDropout(0.4)
    x = torch.randn(3, 17, 16)
    for training in (True, False):
        made = []
        for module in (ours.train(training), theirs.train(training)):  # type: ignore[operator,union-attr]
            torch.manual_seed(5)
            made.append(module(x))
        assert torch.equal(*made)
        assert made[0].shape[1] == (10 if training else 17)


def test_patches_are_drawn_on_the_device_of_the_images() -> None:
    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            assert all(x.device.type == "meta" for x in tree_leaves(output) if isinstance(x, Tensor)), func
            return output

    module = vit(patch_dropout=0.4).train().net.patch_dropout  # type: ignore[union-attr]
    x = torch.empty(3, 17, 16, device="meta")
    with Devices():
        module(x)  # type: ignore[operator]

"""A folder that transformers loads as CLIPModel and CLIPProcessor's parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from multimodal.export.exported import TEXTS, Exported, differences_of_logits, largest, pictures
from multimodal.export.tokenizer import save_tokenizer
from multimodal.parts import Format
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.vit import ViT

BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}

LEGACY_END = 2
"""Of old configurations, for which transformers takes the highest id for the end token."""

USAGE = """\
from PIL import Image
from transformers import AutoProcessor, CLIPModel

model = CLIPModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")  # resizes images as in training
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(images=[Image.open("a.jpg")], text=texts, padding=True, truncation=True, return_tensors="pt")
probabilities = model(**inputs).logits_per_image.softmax(dim=-1)"""


class HuggingFace(Format):
    """CLIPModel of transformers: a vision transformer with class token beside a causal text transformer."""

    library: ClassVar[str] = "transformers"

    def write(self, exported: Exported, folder: Path) -> str:
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

        image, text = _expressible(exported)
        encoding = exported.text.encoding
        config = CLIPConfig(
            text_config={
                **_shared(text),
                "vocab_size": text.vocab_size or encoding.vocab_size,
                "max_position_embeddings": text.context_length,
                "eos_token_id": encoding.end,
                "bos_token_id": None,
                "pad_token_id": encoding.pad,
                "projection_dim": exported.model.embed_dim,
            },
            vision_config={
                **_shared(image),
                "image_size": image.image_size,
                "patch_size": image.patch_size,
                "projection_dim": exported.model.embed_dim,
            },
            projection_dim=exported.model.embed_dim,
        )
        model = CLIPModel(config)
        model.load_state_dict(dict(_renamed(exported.model.state_dict())))
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        edge = {"height": image.image_size, "width": image.image_size}
        CLIPImageProcessor(
            size=edge if image.resize == "squash" else {"shortest_edge": image.image_size},
            crop_size=edge,
            resample=2 if image.interpolation == "bilinear" else 3,
            image_mean=list(image.mean),
            image_std=list(image.std),
        ).save_pretrained(folder)
        save_tokenizer(text.tokenizer, exported.text, folder)
        return USAGE

    @torch.no_grad()
    def differences(self, exported: Exported, folder: Path) -> dict[str, float]:
        from transformers import AutoProcessor, CLIPModel

        model: Any = CLIPModel.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        images, texts = exported.features()
        theirs = processor(images=pictures(), return_tensors="pt").pixel_values
        length = exported.text.context_length
        ids = processor(
            text=list(TEXTS), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        unit = torch.nn.functional.normalize
        return {
            "pixels": largest(exported.normalised(), theirs),
            "image features": largest(images, unit(_pooled(model.get_image_features(pixel_values=theirs)), dim=-1)),
            "token ids": _different_ids(exported, ids),
            "text features": largest(texts, unit(_pooled(model.get_text_features(input_ids=ids)), dim=-1)),
            **differences_of_logits(exported, model.logit_scale.exp().item(), None),
        }


def _pooled(output: Any) -> Tensor:
    found: Tensor = getattr(output, "pooler_output", output)
    return found


def _different_ids(exported: Exported, ids: Tensor) -> float:
    """0 if tokens agree up to the end of each text; CLIP's tokenizer pads with the end token there."""
    ours = exported.ids()
    ends = torch.eq(ours, exported.text.encoding.end or 0).int()
    upto = ends.cumsum(1) - ends == 0
    return float(((ours != ids) & upto).any())


def _expressible(exported: Exported) -> tuple[ViT, TextTransformer]:
    image, text = exported.towers
    if not isinstance(image, ViT) or image.pool != "tok" or not image.norm_first or image.norm_after_pool:
        told = f"CLIPModel has a vision transformer with class token for images, this model {type(image).__name__}"
        raise ValueError(f"{told}; to=open_clip can do others, and so can onnx and sentence_transformers")
    if not isinstance(text, TextTransformer) or not text.causal or text.pool != "end":
        raise ValueError("CLIPModel has a causal transformer with end token for text; to=open_clip can do others")
    if image.projection != "linear" or text.projection != "linear" or image.layer_scale or text.layer_scale:
        raise ValueError("CLIPModel has plain blocks and linear projections; to=open_clip can do others")
    if exported.logit_bias is not None:
        raise ValueError("CLIPModel adds no logit_bias; to=open_clip can do it")
    if exported.text.encoding.end == LEGACY_END:
        raise ValueError(f"CLIPModel reads another token than the end token where its id is {LEGACY_END}")
    if image.resize == "longest":
        raise ValueError("the image processor of transformers has no resize=longest")
    return image, text


def _shared(tower: ViT | TextTransformer) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights under the names of CLIPModel."""
    yield "logit_scale", state["logit_scale"]
    for tower, prefix, own in (("image", "vision_model.", VISION), ("text", "text_model.", TEXT)):
        yield (
            f"{'visual' if tower == 'image' else 'text'}_projection.weight",
            state[f"towers.{tower}.projection.weight"],
        )
        for name, tensor in state.items():
            inner = name.removeprefix(f"towers.{tower}.net.")
            if inner == name:
                continue
            if inner.startswith("transformer.resblocks."):
                yield from _block(prefix, inner.removeprefix("transformer.resblocks."), tensor)
            elif inner in own:
                yield prefix + own[inner], tensor
            else:
                module, _, last = inner.rpartition(".")
                yield f"{prefix}{own[module]}.{last}", tensor


def _block(prefix: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    number, _, inner = name.partition(".")
    place = f"{prefix}encoder.layers.{number}."
    module, _, last = inner.rpartition(".")
    if inner.startswith("attn.in_proj_"):
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{place}self_attn.{part}_proj.{inner.removeprefix('attn.in_proj_')}", piece
    elif module == "attn.out_proj":
        yield f"{place}self_attn.out_proj.{last}", tensor
    else:
        yield f"{place}{BLOCK[module]}.{last}", tensor

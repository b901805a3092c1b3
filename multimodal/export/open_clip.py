"""A folder that open_clip loads by "local-dir:"."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch

from multimodal.export.exported import TEXTS, Exported, differences_of_logits, largest, pictures, save_tensors
from multimodal.export.tokenizer import save_tokenizer
from multimodal.interop import names, towers_to_cfg
from multimodal.parts import Format
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.hf_text import HFText

USAGE = """\
import open_clip
from PIL import Image

place = "local-dir:FOLDER"
model, _, preprocess = open_clip.create_model_and_transforms(place, require_pretrained=True)
tokenizer = open_clip.get_tokenizer(place)
model.eval()  # open_clip leaves it in training mode
images = model.encode_image(preprocess(Image.open("a.jpg"))[None], normalize=True)
texts = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
cosines = images @ texts.T"""


class OpenClip(Format):
    """Configuration, weights and vocabulary as open_clip has them."""

    library: ClassVar[str] = "open_clip"

    def write(self, exported: Exported, folder: Path) -> str:
        text = exported.towers[1]
        if isinstance(text, HFText) and (Path(text.name).is_absolute() or Path(text.name).exists()):
            raise ValueError(
                f"open_clip looks a text tower's architecture up by its name, and '{text.name}' is a folder on this "
                "machine: to=onnx can do it"
            )
        tokenizer = text.tokenizer
        own = not isinstance(tokenizer, ClipBPE)  # which open_clip has
        if own:
            save_tokenizer(tokenizer, exported.text, folder)
        model_cfg, preprocess_cfg = towers_to_cfg.to_open_clip(
            exported.config.towers,
            exported.config.model,
            exported.text.encoding,
            "in this folder" if own else None,
        )
        model_cfg["text_cfg"] |= {"hf_model_pretrained": False} if isinstance(text, HFText) else {}
        described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2))
        state = names.to_open_clip(exported.model, bool(model_cfg.get("custom_text")))
        save_tensors(state, folder / "open_clip_model.safetensors")
        return USAGE

    @torch.no_grad()
    def differences(self, exported: Exported, folder: Path) -> dict[str, float]:
        import open_clip

        place = f"local-dir:{folder}"
        model: Any
        model, _, preprocess = open_clip.create_model_and_transforms(place, require_pretrained=True)
        model.eval()
        images, texts = exported.features()
        pixels = torch.stack([preprocess(picture) for picture in pictures()])
        ids = open_clip.get_tokenizer(place)(list(TEXTS))
        return {
            "pixels": largest(exported.normalised(), pixels),
            "image features": largest(images, model.encode_image(pixels, normalize=True)),
            "token ids": largest(exported.ids().float(), ids.float()),
            "text features": largest(texts, model.encode_text(ids, normalize=True)),
            **differences_of_logits(
                exported,
                model.logit_scale.exp().item(),
                None if model.logit_bias is None else model.logit_bias.item(),
            ),
        }

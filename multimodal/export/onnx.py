"""Both towers as ONNX networks, with a small program that reads images and texts for them."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.export import shipped
from multimodal.export.exported import TEXTS, Exported, differences_of_logits, largest, pictures
from multimodal.export.tokenizer import save_tokenizer
from multimodal.model import Model
from multimodal.parts import Format

PROGRAM = "onnx_model.py"
LIMIT = 1_900_000_000
"""Bytes of weights that go into one file, which may have 2 GiB; larger ones are beside it."""

USAGE = """\
import sys

sys.path.append("FOLDER")
from onnx_model import ImageTextModel  # needs onnxruntime, tokenizers, pillow and numpy

model = ImageTextModel()
cosines = model.encode_image(["a.jpg"]) @ model.encode_text(["a photo of a cat", "a photo of a dog"]).T"""


class Onnx(Format):
    """image.onnx from uint8 [n, 3, H, W] and text.onnx from int64 [n, L], to unit-norm float32 [n, D]."""

    library: ClassVar[str] = "onnx"

    def write(self, exported: Exported, folder: Path) -> str:
        image, text = exported.towers
        split_special_tokens = save_tokenizer(text.tokenizer, exported.text, folder)
        _write_network(exported.model, "image", "pixels", exported.pixels(), folder)
        _write_network(exported.model, "text", "ids", exported.ids(), folder)
        described = {
            "embed_dim": exported.model.embed_dim,
            "logit_scale": exported.logit_scale,
            "logit_bias": exported.logit_bias,
            "image_size": image.image_size,
            "resize": image.resize,
            "interpolation": image.interpolation,
            "context_length": text.context_length,
            "pad_id": exported.text.encoding.pad,
            "split_special_tokens": split_special_tokens,
        }
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        shutil.copy(Path(shipped.__path__[0]) / PROGRAM, folder / PROGRAM)
        return USAGE

    def differences(self, exported: Exported, folder: Path) -> dict[str, float]:
        spec = importlib.util.spec_from_file_location("onnx_model", folder / PROGRAM)
        assert spec is not None
        assert spec.loader is not None
        program: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        model = program.ImageTextModel(folder)
        images, texts = exported.features()
        pixels = torch.stack([torch.from_numpy(model.pixels(picture).copy()) for picture in pictures()])
        ids = torch.stack([torch.from_numpy(model.ids(text)) for text in TEXTS])
        return {
            "pixels": largest(exported.pixels().float(), pixels.float()),
            "image features": largest(images, torch.from_numpy(model.encode_image(pictures()))),
            "token ids": largest(exported.ids().float(), ids.float()),
            "text features": largest(texts, torch.from_numpy(model.encode_text(TEXTS))),
            **differences_of_logits(exported, model.config["logit_scale"], model.config["logit_bias"]),
        }


class _Encode(nn.Module):
    """One tower of a model and its projection."""

    def __init__(self, model: Model, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode(self.tower, inputs)


def _write_network(model: Model, tower: str, name: str, examples: Tensor, folder: Path) -> None:
    program = torch.onnx.export(
        _Encode(model, tower).eval(),
        (examples,),
        dynamo=True,
        input_names=[name],
        output_names=[f"{tower}_features"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        verbose=False,
    )
    assert program is not None
    large = sum(p.numel() * p.element_size() for p in model.towers[tower].parameters()) > LIMIT
    program.save(folder / f"{tower}.onnx", external_data=large)

"""The two networks in this folder with their preprocessing; needs onnxruntime, tokenizers, pillow and numpy.

from onnx_model import ImageTextModel

model = ImageTextModel()
cosines = model.encode_image(["a.jpg"]) @ model.encode_text(["a photo of a cat", "a photo of a dog"]).T
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


class ImageTextModel:
    """Embeds images and texts; `providers` are those of onnxruntime, such as CUDAExecutionProvider."""

    def __init__(
        self,
        folder: str | Path = Path(__file__).parent,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        batch_size: int = 64,
    ) -> None:
        folder = Path(folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.batch_size = batch_size
        self.networks = {
            kind: onnxruntime.InferenceSession(folder / f"{kind}.onnx", providers=list(providers))
            for kind in ("image", "text")
        }
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = self.config["split_special_tokens"]
        self.tokenizer.enable_truncation(self.config["context_length"])
        self.tokenizer.enable_padding(length=self.config["context_length"], pad_id=self.config["pad_id"])

    def encode_image(
        self,
        images: Sequence[str | Path | Image.Image],
    ) -> np.ndarray:  # float32 [n, D] unit norm
        """Embed image files or PIL images."""
        return self._encode("image", images)

    def encode_text(
        self,
        texts: Sequence[str],
    ) -> np.ndarray:  # float32 [n, D] unit norm
        """Embed texts; what does not fit the context is cut."""
        return self._encode("text", texts)

    def pixels(self, image: str | Path | Image.Image) -> np.ndarray:  # uint8 [3, H, W]
        """An image, resized and its centre cropped; the network normalises it."""
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        opened = opened.convert("RGB")
        size = self.config["image_size"]
        if opened.size != (size, size):
            opened = opened.resize(self._resized(*opened.size), Image.Resampling[self.config["interpolation"].upper()])
            left, top = (self._start(length, size) for length in opened.size)
            opened = opened.crop((left, top, left + size, top + size))  # black where it is smaller
        return np.asarray(opened).transpose(2, 0, 1)

    def ids(self, text: str) -> np.ndarray:  # int64 [L]
        """The tokens of a text, padded to the context."""
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        size, kind = self.config["image_size"], self.config["resize"]
        if kind == "squash":
            return size, size
        if kind == "longest":
            longest = max(width, height)
            return round(width * size / longest), round(height * size / longest)
        shortest = min(width, height)
        return int(size * width / shortest), int(size * height / shortest)

    @staticmethod
    def _start(length: int, size: int) -> int:
        return round((length - size) / 2) if length >= size else -((size - length) // 2)

    def _encode(self, kind: str, inputs: Sequence[Any]) -> np.ndarray:
        read = self.pixels if kind == "image" else self.ids
        network = self.networks[kind]
        parts = [np.zeros((0, self.config["embed_dim"]), np.float32)]
        for start in range(0, len(inputs), self.batch_size):
            batch = np.stack([read(value) for value in inputs[start : start + self.batch_size]])
            parts += network.run(None, {network.get_inputs()[0].name: batch})
        return np.concatenate(parts)

"""The module through which sentence-transformers runs the open_clip model in this folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import open_clip
import torch
from PIL import Image
from sentence_transformers.base.modality import infer_batch_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor


class OpenClipModule(InputModule):  # type: ignore[misc]
    """Embeds texts, and PIL images or image files."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        place = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(place, require_pretrained=True)
        self.tokenizer = open_clip.get_tokenizer(place)

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image"]

    def get_embedding_dimension(self) -> int:
        """D, of the shared space."""
        described = json.loads((Path(self.folder) / "open_clip_config.json").read_text())
        return int(described["model_cfg"]["embed_dim"])

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        if infer_batch_modality(inputs, supported_modalities=self.modalities) == "text":
            return {"modality": "text", "ids": self.tokenizer([f"{prompt or ''}{text}" for text in inputs])}
        return {"modality": "image", "pixels": torch.stack([self.transform(_opened(value)) for value in inputs])}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        if features["modality"] == "text":
            embeddings: Tensor = self.model.encode_text(features["ids"], normalize=True)
        else:
            embeddings = self.model.encode_image(features["pixels"], normalize=True)
        return {**features, "sentence_embedding": embeddings}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("copy the folder that it was loaded from")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:
        known = ("token", "cache_folder", "revision", "local_files_only")
        return cls(
            cls.load_dir_path(model_name_or_path, subfolder, **{key: kwargs[key] for key in known if key in kwargs})
        )


def _opened(value: Any) -> Image.Image:
    return value if isinstance(value, Image.Image) else Image.open(value)

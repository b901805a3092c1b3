"""An encoder that remembers: every image and every text is embedded once, however many evaluations use it."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from multimodal.data.loader import Reader
from multimodal.data.views import Inputs, Slice
from multimodal.encoder import Encoder
from multimodal.parts import Preprocessor, Source


class _Tokens:
    """A text tower's preprocessor that tokenises every text once."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self.preprocessor = preprocessor
        self.known: dict[str, Any] = {}

    @property
    def num_truncated(self) -> int:
        return self.preprocessor.num_truncated

    def __call__(self, value: Any, rng: Random | None) -> Tensor:
        if value not in self.known:
            self.known[value] = self.preprocessor(value, rng).to(torch.int32).numpy()
        return torch.from_numpy(self.known[value]).long()

    def save(self, folder: Path) -> None:
        self.preprocessor.save(folder)


class _Texts:
    """Features of texts, by text."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.features: list[Tensor] = []

    def encode(self, encoder: Encoder, tower: str, texts: Sequence[str]) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if missing or not self.features:
            self.features.append(encoder.encode(tower, missing))
            self.rows.update(zip(missing, range(len(self.rows), len(self.rows) + len(missing)), strict=True))
        if len(self.features) > 1:
            self.features = [torch.cat(self.features)]
        return self.features[0][[self.rows[text] for text in texts]]


class _Images:
    """Features of the samples of a source, by place."""

    def __init__(self, size: int, width: int) -> None:
        self.rows = torch.full((size,), -1, dtype=torch.int32)  # of features, by place
        self.features = torch.empty(0, width, dtype=torch.float32)  # whatever torch makes unless told

    def encode(self, encoder: Encoder, tower: str, inputs: Inputs) -> Tensor:
        places = torch.as_tensor(inputs.places)
        missing = (self.rows[places] < 0).nonzero().flatten()
        if len(missing):
            made = encoder.encode(tower, inputs if len(missing) == len(inputs) else Slice(inputs, missing.tolist()))
            first, self.features = len(self.features), torch.cat([self.features, made])
            self.rows[places[missing]] = torch.arange(first, len(self.features), dtype=torch.int32)
        rows = self.rows[places].long()
        return self.features if torch.equal(rows, torch.arange(len(self.features))) else self.features[rows]


class Remembering:
    """Features of texts, by text, and of the samples of a source, by place; other inputs are embedded each time."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.readers = encoder.readers = {
            name: Reader(reader.reads, _Tokens(reader.preprocessor)) if reader.reads == "text" else reader
            for name, reader in encoder.readers.items()
        }
        self.texts: dict[str, _Texts] = {}
        self.images: dict[tuple[str, str, Source], _Images] = {}

    @property
    def logit_scale(self) -> float:
        """The multiplier of cosines."""
        return self.encoder.logit_scale

    @property
    def num_truncated(self) -> int:
        """Texts so far that were longer than the context and are cut, each once."""
        return sum(reader.preprocessor.num_truncated for reader in self.readers.values())

    def forget(self) -> None:
        """The weights have changed: features are kept only of towers that are not trained, and all token ids."""
        frozen = {
            name
            for name in self.encoder.model.towers
            if not any(weight.requires_grad for weight in self.encoder.model.tower_parameters(name))
        }
        self.texts = {tower: texts for tower, texts in self.texts.items() if tower in frozen}
        self.images = {key: images for key, images in self.images.items() if key[0] in frozen}

    def encode(self, tower: str, inputs: Sequence[Any]) -> Tensor:
        """As the encoder does; what was asked for before may be the same tensor."""
        if isinstance(inputs, Inputs) and inputs.reads == self.readers[tower].reads == "image":
            key = tower, inputs.reads, inputs.source
            width = self.encoder.model.embed_dim
            images = self.images.setdefault(key, _Images(len(inputs.source), width))
            return images.encode(self.encoder, tower, inputs)
        if self.readers[tower].reads == "text":
            return self.texts.setdefault(tower, _Texts()).encode(self.encoder, tower, inputs)
        return self.encoder.encode(tower, inputs)

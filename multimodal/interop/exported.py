"""A trained model on its way to another library: what formats are given, and what they share."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from multimodal.config import TrainConfig
from multimodal.data.loader import Reader
from multimodal.model import Model
from multimodal.towers.byte_bpe import END, PAD, START
from multimodal.towers.byte_bpe import FILE as VOCABULARY
from multimodal.towers.text import TextPreprocessor

SIZES = ((64, 64), (500, 375), (120, 300), (37, 37), (224, 224))
TEXTS = ("a photo of a cat", "Two red circles above a blue square.", "a", "many words " * 60)


@dataclass(frozen=True)
class Exported:
    """A model in evaluation mode, in float32 on the CPU, with what it was trained by and on."""

    config: TrainConfig
    model: Model
    readers: dict[str, Reader]
    metrics: dict[str, float]
    """Of its evaluations."""

    @property
    def text(self) -> TextPreprocessor:
        """What reads texts; ValueError if there is no such tower."""
        reader = self.readers.get("text")
        if reader is None or not isinstance(reader.preprocessor, TextPreprocessor):
            raise ValueError("the model has no tower 'text' that reads text")
        return reader.preprocessor

    def ids(self) -> Tensor:
        """int64 [n, L], of `TEXTS`."""
        return torch.stack([self.text(text, None) for text in TEXTS])

    def pixels(self) -> Tensor:
        """uint8 [n, 3, H, W], of `pictures`."""
        return torch.stack([self.readers["image"].preprocessor(picture, None) for picture in pictures()])

    @torch.no_grad()
    def features(self) -> tuple[Tensor, Tensor]:
        """Of the pictures and the texts, [n, D] each, unit norm."""
        return self.model.encode("image", self.pixels()), self.model.encode("text", self.ids())


def pictures() -> list[Image.Image]:
    """Smooth noise of several sizes."""
    noise = np.random.default_rng(0)
    small = [Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in SIZES]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, SIZES, strict=True)]


def largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    return (ours - theirs).abs().max().item()


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Safetensors that others may read too, as files usually are."""
    file.touch()
    mode = file.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    file.chmod(mode)


def save_tokenizer(exported: Exported, folder: Path) -> bool:
    """Write the vocabulary as a fast tokenizer of Hugging Face; False if it is CLIP's own, which others have."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    encoding, length = exported.text.encoding, exported.text.context_length
    encoding.save(folder)
    file = folder / VOCABULARY
    if not file.exists():
        return False
    vocabulary = Tokenizer.from_file(str(file))
    named = {"pad_token": vocabulary.id_to_token(encoding.pad)}
    if vocabulary.token_to_id(START) is not None:  # learnt here: the marks are ours to put
        named |= {"pad_token": PAD, "bos_token": START, "eos_token": END}
        marks = [(mark, vocabulary.token_to_id(mark)) for mark in (START, END)]
        vocabulary.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    made = PreTrainedTokenizerFast(tokenizer_object=vocabulary, model_max_length=length, **named)
    made.save_pretrained(folder)
    return True


def write_card(exported: Exported, folder: Path, usage: str, differences: dict[str, float]) -> None:
    """README.md: what the model is, how it is used, what it was trained on, and how it does."""
    config = exported.config.model_dump(mode="json", include={"towers", "model", "dataset", "loss", "duration"})
    parts = [
        f"# {exported.config.run.name}\n",
        "An image-text model: two towers that project into one shared space.\n",
        f"```python\n{usage}\n```\n",
        "## Metrics\n",
        *(f"- {name}: {value:.4f}" for name, value in sorted(exported.metrics.items())),
        "\n## Training\n",
        f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```\n",
        "## Check of this export\n",
        "Largest differences from the model that was trained:\n",
        *(f"- {name}: {value:.1e}" for name, value in differences.items()),
    ]
    (folder / "README.md").write_text("\n".join(parts) + "\n")


def read_metrics(run: Path) -> dict[str, float]:
    """The evaluation metrics in a run's summary."""
    file = run / "summary.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {name: value for name, value in found.items() if name.startswith("eval/") and isinstance(value, float)}

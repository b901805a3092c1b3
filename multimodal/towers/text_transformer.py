"""The text transformer of CLIP, as open_clip builds it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from multimodal.parts import Augment, Encoding, Tokenizer, Tower, TowerModule


@dataclass(frozen=True)
class TextPreprocessor:
    """From a caption, or several of which one is drawn (the first, in evaluation), to token ids int64 [L]."""

    encoding: Encoding

    def __call__(self, value: str | tuple[str, ...], rng: Random | None) -> Tensor:
        if not isinstance(value, str):
            value = value[0] if rng is None else rng.choice(value)
        return self.encoding(value)

    def save(self, folder: Path) -> None:
        self.encoding.save(folder)


class TextEncoder(TowerModule):
    """A network on token ids."""

    def __init__(self, net: nn.Module, width: int) -> None:
        super().__init__()
        self.net = net
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        """From int64 [n, L] to [n, W]."""
        features: Tensor = self.net(inputs)
        return features


class TextTransformer(Tower):
    """Causal transformer over tokens in CLIP's form; the end token, which has the highest id, is pooled."""

    reads: ClassVar[str] = "text"

    tokenizer: Tokenizer
    """How captions are cut into tokens."""
    context_length: int = Field(ge=3)
    """Tokens in a caption, start and end included; longer ones are cut, keeping the end."""
    width: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Number of blocks."""
    heads: int = Field(gt=0)
    """Attention heads; divides the width."""
    mlp_ratio: float = Field(gt=0)
    """Hidden width of a block's MLP, as a multiple of the width."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self

    def preprocessor(
        self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None
    ) -> TextPreprocessor:
        return TextPreprocessor(self.tokenizer.build(captions, self.context_length, saved))

    def build(self, preprocessor: TextPreprocessor, embed_dim: int) -> TextEncoder:
        from open_clip.transformer import TextTransformer as Net

        net = Net(
            context_length=self.context_length,
            vocab_size=preprocessor.encoding.vocab_size,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp_ratio=self.mlp_ratio,
            output_dim=None,
        )
        return TextEncoder(net, self.width)

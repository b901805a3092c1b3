"""What all text towers share: from a caption to the token ids that fill the context."""

from abc import ABC
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from multimodal.parts import Augment, BadSample, Encoding, Tokenizer, Tower, TowerModule

TooLong = Literal["truncate", "refuse"]


class TextPreprocessor:
    """From a caption, or several of which one is drawn (the first, in evaluation), to token ids int64 [L]."""

    def __init__(self, encoding: Encoding, context_length: int, too_long: TooLong = "truncate") -> None:
        self.encoding, self.context_length, self.too_long = encoding, context_length, too_long
        self.num_truncated = 0

    def __call__(self, value: str | tuple[str, ...], rng: Random | None) -> Tensor:
        if not isinstance(value, str):
            value = value[0] if rng is None else rng.choice(value)
        ids, context = self.encoding(value), self.context_length
        if len(ids) > context:
            if self.too_long == "refuse":
                raise BadSample(f"caption of {len(ids)} tokens, more than context_length={context}: {value[:60]!r}")
            self.num_truncated += 1
            marked = ids[-1:] == self.encoding("")[-1:]
            ids = [*ids[: context - 1], ids[-1]] if marked else ids[:context]
        padded = torch.full((context,), self.encoding.pad)
        padded[: len(ids)] = torch.tensor(ids)
        return padded

    def save(self, folder: Path) -> None:
        self.encoding.save(folder)


def end_of(
    mask: Tensor,  # bool [n, L]
) -> Tensor:  # int64 [n]
    """How long rows are to the last place that is marked; 0 if none is."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


class TextEncoder(TowerModule, ABC):
    """A network on token ids."""

    net: Any

    def __init__(self, net: nn.Module, projection: nn.Module, width: int) -> None:
        super().__init__()
        self.net = net
        self.projection = projection
        self.width = width


class TextTower(Tower, ABC):
    """A tower that reads text."""

    reads: ClassVar[str] = "text"

    tokenizer: Tokenizer
    """How captions are cut into tokens."""
    context_length: int = Field(ge=3)
    """Tokens in a caption, marks of start and end included."""
    too_long: TooLong = "truncate"
    """What becomes of longer captions: cut, keeping the end token, and counted; or refused, as broken samples are."""

    @property
    def learns(self) -> bool:
        return self.tokenizer.learns

    def preprocessor(
        self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None
    ) -> TextPreprocessor:
        return TextPreprocessor(self.tokenizer.build(captions, saved), self.context_length, self.too_long)

"""CLIP's byte-pair encoding of 49,408 tokens."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from multimodal.parts import Tokenizer

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer


class _Encoding:
    pad = 0

    def __init__(self, tokenizer: "SimpleTokenizer") -> None:
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.vocab_size
        self.start: int = tokenizer.sot_token_id
        self.end: int = tokenizer.eot_token_id

    def __call__(self, text: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(text), self.end]

    def decode(self, ids: Tensor) -> str:
        tokens = ids[1 : int((ids == self.end).int().argmax())].tolist()
        text: str = self.tokenizer.decode(tokens)
        return text.strip()

    def save(self, folder: Path) -> None:
        """Nothing is learnt: the vocabulary comes with open_clip."""


class ClipBPE(Tokenizer):
    """CLIP's own vocabulary, for models that start from its weights or see many captions.

    Its table is most of a small model's weights; for those a vocabulary trained on the captions (`byte_bpe`) is better.
    """

    def build(self, captions: Callable[[], Iterable[str]], saved: Path | None) -> _Encoding:
        from open_clip.tokenizer import SimpleTokenizer

        return _Encoding(SimpleTokenizer())

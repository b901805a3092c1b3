"""Any fast tokenizer of Hugging Face, by name or from a local folder."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor

from multimodal.parts import Tokenizer
from multimodal.towers.clean import Clean, cleaner

VOCABULARY, FACTS = "tokenizer.json", "tokenizer_facts.json"


class HFEncoding:
    """The vocabulary, and what a checkpoint keeps of the tokenizer around it."""

    def __init__(self, vocabulary: Vocabulary, facts: dict[str, Any]) -> None:
        vocabulary.no_truncation()
        vocabulary.no_padding()
        self.vocabulary, self.facts, self.clean = vocabulary, facts, cleaner(facts["clean"])
        self.vocab_size: int = facts["vocab_size"]
        self.pad: int = facts["pad"]
        self.sep: int | None = facts["sep"]
        marked = vocabulary.encode("")
        self.marks = marked.ids
        """What every text has around it."""
        ids = vocabulary.encode("a").ids
        self.end: int | None = ids[-1] if self.marks and ids[-1] == self.marks[-1] else None
        self.first: int | None = ids[0] if self.marks and len(ids) > 1 and ids[0] == self.marks[0] else None
        """The id that every text starts with, if there is one (a class token)."""

    def __call__(self, text: str) -> list[int]:
        ids = self.vocabulary.encode(self.clean(text)).ids
        if self.facts["strip_sep"]:
            ids = [0 if token == self.sep else token for token in ids]
        return list(ids)

    def decode(self, ids: Tensor) -> str:
        text: str = self.vocabulary.decode([token for token in ids.tolist() if token != self.pad])
        return text.strip()

    def save(self, folder: Path) -> None:
        (folder / VOCABULARY).write_text(self.vocabulary.to_str(pretty=True))
        (folder / FACTS).write_text(json.dumps(self.facts, indent=2))


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer: ids equal those of open_clip's `HFTokenizer`, which pads and cuts to the context too.

    A checkpoint keeps the vocabulary, so it is read from elsewhere only when a new run starts.
    """

    name: str | None = Field(min_length=1)
    """On the hub, or a local folder with tokenizer.json; null for that of the Hugging Face tower that it is for."""
    clean: Clean
    """What is done to texts before: none, white space made single, lower case too, or punctuation removed (SigLIP)."""
    strip_sep: bool
    """Whether the end token is replaced by 0 (CLIPA)."""

    def build(self, captions: Callable[[], Iterable[str]], saved: Path | None) -> HFEncoding:
        if saved is not None:
            return HFEncoding(Vocabulary.from_file(str(saved / VOCABULARY)), json.loads((saved / FACTS).read_text()))
        if self.name is None:
            raise ValueError("tokenizer.name: no value given, and this tower has no tokenizer of its own")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, use_fast=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"tokenizer.name: '{self.name}' is no local folder and cannot be had from the hub ({reason}); "
                "a folder with tokenizer.json works without a network"
            ) from None
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer.name: '{self.name}' has no fast tokenizer (tokenizer.json)")
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer.name: '{self.name}' has neither a token for padding nor for the end of a text")
        facts = {
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "pad": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            "sep": tokenizer.sep_token_id,
            "clean": self.clean,
            "strip_sep": self.strip_sep,
        }
        return HFEncoding(Vocabulary.from_str(tokenizer.backend_tokenizer.to_str()), facts)

"""Any fast tokenizer of Hugging Face, by name or from a local folder."""

from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import Field
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor

from multimodal.parts import Section, Tokenizer
from multimodal.towers.clean import Clean, cleaner
from multimodal.towers.kept import num_ids, read_section, read_vocabulary

VOCABULARY, FACTS = "tokenizer.json", "tokenizer_facts.json"


class Facts(Section):
    """What a checkpoint keeps of a tokenizer beside its vocabulary."""

    vocab_size: int = Field(ge=1)
    """Ids are below it."""
    pad: int = Field(ge=0)
    """The id that fills up the context."""
    sep: int | None = Field(ge=0)
    """The id that strip_sep replaces."""
    clean: Clean
    strip_sep: bool


class HFEncoding:
    """The vocabulary, and the facts of the tokenizer around it; ValueError where they contradict each other."""

    def __init__(self, vocabulary: Vocabulary, facts: Facts) -> None:
        vocabulary.no_truncation()
        vocabulary.no_padding()
        size = num_ids(vocabulary)
        if facts.vocab_size != size or facts.pad >= size:
            raise ValueError(f"the vocabulary has {size} ids, told are {facts.vocab_size}, and {facts.pad} for padding")
        self.vocabulary, self.facts, self.clean = vocabulary, facts, cleaner(facts.clean)
        self.vocab_size, self.pad = size, facts.pad
        self.marks = vocabulary.encode("").ids
        """What every text has around it."""
        ids = vocabulary.encode("a").ids
        self.end: int | None = ids[-1] if self.marks and ids[-1] == self.marks[-1] else None
        if facts.strip_sep and self.end == facts.sep:
            self.end = None  # what stands in its place may stand elsewhere too
        self.first: int | None = ids[0] if self.marks and len(ids) > 1 and ids[0] == self.marks[0] else None
        """The id that every text starts with, if there is one (a class token)."""

    def __call__(self, text: str) -> list[int]:
        ids = self.vocabulary.encode(self.clean(text)).ids
        if self.facts.strip_sep:
            ids = [0 if token == self.facts.sep else token for token in ids]
        return list(ids)

    def decode(self, ids: Tensor) -> str:
        text: str = self.vocabulary.decode([token for token in ids.tolist() if token != self.pad])
        return text.strip()

    def save(self, folder: Path) -> None:
        (folder / VOCABULARY).write_text(self.vocabulary.to_str(pretty=True))
        (folder / FACTS).write_text(self.facts.model_dump_json(indent=2))


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
            facts, vocabulary = read_section(saved / FACTS, Facts), read_vocabulary(saved / VOCABULARY)
            try:
                return HFEncoding(vocabulary, facts)
            except ValueError as error:
                raise ValueError(f"{saved / FACTS}: {error}") from None
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
        vocabulary = Vocabulary.from_str(tokenizer.backend_tokenizer.to_str())
        facts = Facts(
            vocab_size=num_ids(vocabulary),
            pad=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            sep=tokenizer.sep_token_id,
            clean=self.clean,
            strip_sep=self.strip_sep,
        )
        return HFEncoding(vocabulary, facts)

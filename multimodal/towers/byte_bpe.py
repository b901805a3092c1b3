"""A byte-level byte-pair encoding trained on the captions."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor

from multimodal import distributed
from multimodal.parts import Tokenizer
from multimodal.towers.clean import Clean, cleaner
from multimodal.towers.kept import num_ids, read_vocabulary

FILE = "tokenizer.json"
PAD, START, END = "<pad>", "<start_of_text>", "<end_of_text>"


def _marks(vocab_size: int) -> list[int]:
    """The ids of padding, start and end."""
    return [0, vocab_size - 2, vocab_size - 1]


class _Encoding:
    pad = 0

    def __init__(self, vocabulary: Vocabulary, clean: Clean) -> None:
        self.made_of = vocabulary, clean
        self.vocabulary, self.clean = vocabulary, cleaner(clean)
        vocabulary.encode_special_tokens = True  # a caption that spells "<pad>" means these characters
        self.vocab_size = num_ids(vocabulary)
        _, self.start, self.end = _marks(self.vocab_size)

    def __reduce__(self) -> tuple[type["_Encoding"], tuple[Vocabulary, Clean]]:
        return _Encoding, self.made_of  # made anew: a vocabulary does not remember what was set

    def __call__(self, text: str) -> list[int]:
        return [self.start, *self.vocabulary.encode(self.clean(text)).ids, self.end]

    def decode(self, ids: Tensor) -> str:
        text: str = self.vocabulary.decode(ids.tolist(), skip_special_tokens=True)
        return text.strip()

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(self.vocabulary.to_str(pretty=True))


def train(captions: Iterable[str], vocab_size: int) -> Vocabulary:
    """A byte-level vocabulary: no text is unknown to it; the end token has the highest id, as in CLIP.

    It makes letters small and white space single by itself, so that every library that reads it does.
    """
    vocabulary = Vocabulary(models.BPE())
    single = normalizers.Replace(Regex(r"\s+"), " ")
    vocabulary.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), single, normalizers.Strip()]
    )
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    vocabulary.train_from_iterator(captions, trainer)
    vocabulary.add_special_tokens([START, END])
    return vocabulary


class ByteBPE(Tokenizer):
    """Byte-pair encoding learnt from the training captions, kept with the checkpoint."""

    learns: ClassVar[bool] = True

    vocab_size: int = Field(ge=300)
    """Most tokens there may be, the 256 bytes and 3 special ones included; fewer if the captions have no more pairs."""
    max_captions: int = Field(gt=0)
    """Learn from at most so many captions, the first ones."""
    clean: Clean = "none"
    """What is done to captions before: none, characters mended and white space made single, lower case too, or
    punctuation removed (canonicalize). open_clip has no none: it makes white space single."""

    def build(self, captions: Callable[[], Iterable[str]], saved: Path | None) -> _Encoding:
        if saved is not None:
            vocabulary = read_vocabulary(saved / FILE)
            if [vocabulary.token_to_id(mark) for mark in (PAD, START, END)] != _marks(num_ids(vocabulary)):
                raise ValueError(
                    f"{saved / FILE} is no vocabulary of ours: {PAD}, {START}, {END} are not first and last"
                )
            return _Encoding(vocabulary, self.clean)

        def learn() -> str:
            cleaned = map(cleaner(self.clean), islice(captions(), self.max_captions))
            return train(cleaned, self.vocab_size).to_str()

        return _Encoding(Vocabulary.from_str(distributed.on_first_rank(learn)), self.clean)

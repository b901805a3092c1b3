"""The laws of an exported vocabulary: other libraries cut any caption into the tokens that the model was trained on.

They hold where the other library is given the text that was trained on. open_clip cleans texts (characters mended, HTML
entities resolved, white space single), as `tokenizer.clean=whitespace` does here; after `clean=none` its ids are those
of the cleaned caption. transformers mends and resolves nothing: its ids are those of `clean=none`, and with another
value only those of captions that need no mending.
"""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, get_clean_fn
from torch import Tensor
from transformers import AutoTokenizer

from multimodal.export.tokenizer import save_tokenizer
from multimodal.towers.byte_bpe import ByteBPE
from multimodal.towers.text import TextPreprocessor

LENGTH = 48
LEARNT_FROM = ["a photo of a red cat", "two dogs & a cat, it's \u65e5\u672c", "caf\u00e9 na\u00efve"] * 10
SPACES = ["  ", "\t", "\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2003", "\u2028", "\x85", "\x0b", "\f"]
UNUSUAL = [
    *("\u00e9", "e\u0301", "\u0130", "\u1e9b\u0323", "\u1100\u1161", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
    *("\U0001f600", "\u65e5\u672c", "\u05e9\u05dc\u05d5\u05dd", "\ufeff", "\u200b", "\ufb01", "\uff21"),
    *("'s", "don't", "RED", "Cat", "42", "...", "!?", "<", ">", "|", "\u0120", "\\n", "a photo of", "dog"),
]
MENDED = ["&amp;", "&amp;amp;", "&lt;b&gt;", "&nbsp;", "&#39;", "\u2019", "\u00e2\u20ac\u2122", "\x1b[31m", "\x00"]
FIXED = ["", " ", "\n\t ", "a", "  a photo\tof\n\na cat  ", "word " * 500, "x" * 3000, "\U0001f600" * 200]


def pile(*kinds: list[str]) -> list[str]:
    """Awkward captions: the fixed ones, and pieces of these kinds at random between white space or nothing."""
    rng = Random(0)
    pieces = [piece for kind in kinds for piece in kind]
    drawn = (
        "".join(rng.choice(pieces) + rng.choice(["", " ", *SPACES]) for _ in range(rng.randint(1, 12)))
        for _ in range(400)
    )
    return [*FIXED, *SPACES, *pieces, *drawn]


def exported(folder: Path, clean: Any) -> TextPreprocessor:
    """What reads captions here, with its vocabulary written into the folder."""
    tokenizer = ByteBPE(vocab_size=400, max_captions=100, clean=clean)
    preprocessor = TextPreprocessor(tokenizer.build(lambda: LEARNT_FROM, None), LENGTH)
    save_tokenizer(tokenizer, preprocessor, folder)
    return preprocessor


def different(preprocessor: TextPreprocessor, captions: list[str], theirs: Tensor) -> list[str]:
    ours = torch.stack([preprocessor(caption, None) for caption in captions])
    return [caption for caption, same in zip(captions, (ours == theirs).all(1).tolist(), strict=True) if not same]


def by_transformers(folder: Path, captions: list[str]) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: Tensor = tokenizer(
        captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    return ids


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_open_clip_cuts_any_caption_into_the_same_tokens(clean: str, tmp_path: Path) -> None:
    preprocessor, captions = exported(tmp_path, clean), pile(UNUSUAL, MENDED)
    theirs = HFTokenizer(str(tmp_path), context_length=LENGTH, clean=clean)
    assert different(preprocessor, captions, theirs(captions)) == []


def test_transformers_does_after_training_on_captions_as_they_are(tmp_path: Path) -> None:
    preprocessor, captions = exported(tmp_path, "none"), pile(UNUSUAL, MENDED)
    assert different(preprocessor, captions, by_transformers(tmp_path, captions)) == []


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_transformers_does_where_nothing_is_to_be_mended(clean: str, tmp_path: Path) -> None:
    preprocessor = exported(tmp_path, clean)
    mend = get_clean_fn("whitespace")
    captions = [caption for caption in pile(UNUSUAL) if mend(caption) == " ".join(caption.split())]
    assert len(captions) > 50
    assert different(preprocessor, captions, by_transformers(tmp_path, captions)) == []

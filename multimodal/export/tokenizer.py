"""The text tower's vocabulary as a fast tokenizer of Hugging Face, whatever it is here."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, processors

from multimodal.parts import Tokenizer as TokenizerPart
from multimodal.towers.byte_bpe import END, PAD, START, ByteBPE
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.hf_tokenizer import HFTokenizer
from multimodal.towers.text import TextPreprocessor

SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
CLEANING: dict[str, list[Any]] = {
    "none": [],
    "whitespace": SPACES,
    "lower": [*SPACES, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Lowercase(),
        *SPACES,
    ],
}
"""What `clean` does to a text, but for HTML entities and wrongly decoded characters, which it mends."""


def save_tokenizer(
    part: TokenizerPart,
    text: TextPreprocessor,  # that it is in
    folder: Path,
) -> bool:
    """Write tokenizer.json and tokenizer_config.json for `AutoTokenizer`; ValueError if it cannot be expressed.

    What is returned is whether a text that spells a special token means these characters, and not the token; of this
    `AutoTokenizer` takes note (`split_special_tokens`), and tokenizer.json does not.
    """
    made = _clips_own(text.context_length) if isinstance(part, ClipBPE) else _wrapped(part, text)
    made.save_pretrained(folder)
    return bool(made.split_special_tokens)


def _wrapped(part: TokenizerPart, text: TextPreprocessor) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(part, ByteBPE | HFTokenizer):
        raise ValueError(f"a tokenizer like {type(part).__name__} has no form in other libraries")
    encoding: Any = text.encoding
    vocabulary = Tokenizer.from_str(encoding.vocabulary.to_str())
    named = {"pad_token": vocabulary.id_to_token(encoding.pad)}
    if isinstance(part, ByteBPE):  # learnt here: the marks are ours to put
        named |= {"pad_token": PAD, "bos_token": START, "eos_token": END}
        marks = [(mark, vocabulary.token_to_id(mark)) for mark in (START, END)]
        vocabulary.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    elif part.strip_sep:
        raise ValueError("fast tokenizers do not replace their end token (strip_sep); to=open_clip can do it")
    if cleaning := CLEANING[part.clean]:
        own = [] if vocabulary.normalizer is None else [vocabulary.normalizer]
        vocabulary.normalizer = normalizers.Sequence([*cleaning, *own])
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        model_max_length=text.context_length,
        split_special_tokens=encoding.vocabulary.encode_special_tokens,
        **named,
    )


def _clips_own(context_length: int) -> Any:
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    merges = [pair for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])]
    start, end = (theirs.decoder[token] for token in (theirs.sot_token_id, theirs.eot_token_id))
    marks = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return CLIPTokenizer(vocab=dict(theirs.encoder), merges=merges, model_max_length=context_length, **marks)

"""Reading what checkpoints keep of towers: files that may be damaged, or a stranger's."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from tokenizers import Tokenizer as Vocabulary

from multimodal.parts import Section

S = TypeVar("S", bound=Section)


def read_vocabulary(file: Path) -> Vocabulary:
    """A tokenizer.json; ValueError, naming the file, if it is none."""
    text = file.read_bytes()
    try:
        return Vocabulary.from_buffer(text)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{file} is not a sound vocabulary: {error}") from None


def read_mapping(file: Path) -> dict[str, Any]:
    """A JSON file that holds values by name; ValueError, naming the file, if it does not."""
    text = file.read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not sound JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no values by name")
    return found


def read_section(file: Path, kind: type[S]) -> S:
    """A JSON file that holds a section; ValueError, naming the file, with all that is wrong in it."""
    try:
        return kind.model_validate(read_mapping(file))
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, line['loc']))}: {line['msg']}" for line in error.errors(include_url=False))
        raise ValueError(f"{file}: {'; '.join(lines)}") from None


def num_ids(vocabulary: Vocabulary) -> int:
    """One more than the highest id."""
    return max(vocabulary.get_vocab().values(), default=-1) + 1

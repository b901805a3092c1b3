"""What is done to texts before they are cut into tokens, as open_clip's tokenizers do it."""

from collections.abc import Callable
from typing import Literal

Clean = Literal["none", "whitespace", "lower", "canonicalize"]


def cleaner(clean: Clean) -> Callable[[str], str]:
    """A text mended by ftfy, its HTML entities resolved, white space single; then lower case, or no punctuation."""
    if clean == "none":
        return str
    from open_clip.tokenizer import get_clean_fn

    found: Callable[[str], str] = get_clean_fn(clean)
    return found

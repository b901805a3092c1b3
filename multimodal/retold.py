"""What Hydra says of a composition that failed, in our words: where, what, and what was meant perhaps."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from multimodal.resolve import did_you_mean


def retold(
    message: str,
    conf: Path,  # the folder of configurations
    keys: Callable[[], Sequence[str]],  # that there are
) -> tuple[str, str]:
    """(Dotted path, text)."""
    lines = [line.strip() for line in message.partition("Config search path:")[0].splitlines() if line.strip()]
    path = next((line.split(": ", 1)[1] for line in lines if line.startswith("full_key: ")), "composition")
    text = " ".join(line for line in lines if not line.startswith(("full_key: ", "object_type=")))
    if match := re.search(r"Could not find '(?:[^']*/)?([^']+)'.*Available options in '[^']*': (.*)", text):
        text += f".{did_you_mean(match[1], match[2].split())}"
    elif match := re.search(r"Could not load '(.+)/([^'/]+)'", text):
        known = sorted(file.stem for file in (conf / match[1]).glob("*.yaml"))
        hint = did_you_mean(match[2], known) or f" There are: {', '.join(known) or 'none'}."
        path, text = match[1].replace("/", "."), f"there is no '{match[2]}'.{hint}"
    elif match := re.match(r"Could not override '([^']+)'", text):
        path, text = match[1], f"unknown key.{did_you_mean(match[1], keys())}"
    return path, text

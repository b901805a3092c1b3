"""What Hydra says of a composition that failed, in our words: where, what, and what was meant perhaps."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from multimodal.resolve import did_you_mean


def retold(
    message: str,
    conf: Path,  # the folder of configurations
    program: str,  # name of its own there
    words: Sequence[str],  # the command line
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
        path, text = match[1], f"unknown key.{did_you_mean(match[1], _keys(conf, program, words))}"
    return path, text


def _keys(conf: Path, program: str, words: Sequence[str]) -> list[str]:
    """All dotted keys of the configuration with the parts that are chosen, without any value that is set."""

    def keys(value: Any, path: str) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield f"{path}{key}"
            yield from keys(inner, f"{path}{key}.")

    parts = [word for word in words if "=" in word and (conf / re.split("[@=]", word)[0]).is_dir()]
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return list(keys(OmegaConf.to_container(hydra.compose(program, parts)), ""))
    except (HydraException, OmegaConfBaseException):
        return []

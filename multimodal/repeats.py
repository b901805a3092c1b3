"""`run.repeat=NAME`: what a run has stored is what a program starts from, in place of conf/train.yaml."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multimodal import checkpoint
from multimodal.cli import CONF, not_interpolated
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.report import folders
from multimodal.run_folder import CONFIG

KEY, NODE = "run.repeat", "repeated"


def repeated(words: Sequence[str]) -> list[str]:
    """The words of a command line, with those that make Hydra compose what the run has stored; unchanged without `KEY`.

    The stored file is read as data and checked, and only what came out of that is given to Hydra: a file that
    somebody else wrote could have Hydra build anything.
    """
    asked = [word for word in words if word.startswith(f"{KEY}=")]
    word = asked[-1].removeprefix(f"{KEY}=").strip("'\"") if asked else ""
    if word in ("", "null"):
        return list(words)
    if {"-m", "--multirun"} & set(words):
        raise ConfigError([(KEY, "repeats one run: not with -m, whose runs would not know of it")])
    runs = next((word.partition("=")[2].strip("'\"") for word in words if word.startswith("paths.runs=")), "runs")
    if chosen := [word for word in words if re.split("[@=]", word.lstrip("+~"))[0] in _groups()]:
        told = "a repeat has the parts of its run: values in them can be overridden, but no other part chosen"
        raise ConfigError([(word, told) for word in chosen])
    _store(stored(word, Path(runs)))
    return [f"--config-name={NODE}", *(word for word in words if word not in asked)]


def _groups() -> set[str]:
    return {folder.name for folder in CONF.iterdir() if folder.is_dir()}


def stored(word: str, runs: Path) -> dict[str, Any]:
    """The configuration of a repeat of a run that is named or whose folder is given; ConfigError if there is none.

    It goes beside the run, under another name. Data are where the environment says, or else where they were.
    """
    found, wrong = folders.find([word], runs)
    if wrong or len(found) > 1:
        raise ConfigError([(KEY, text) for text in wrong] or [(KEY, f"{word} is {len(found)} runs: one of them")])
    folder = found[0]
    try:
        config = check(checkpoint.read_config(folder / CONFIG), TrainConfig)
    except ConfigError as error:
        raise ConfigError(error.problems, f"configuration of {folder}") from None
    except (OSError, ValueError) as error:
        raise ConfigError([(KEY, str(error))]) from None
    raw = config.model_dump(mode="json")
    raw["run"] = {"name": f"{folder.resolve().name}-repeat", "fresh": False, "repeat": str(folder)}
    raw["paths"] = {
        "runs": str(folder.parent),
        "datasets": os.environ.get("MULTIMODAL_DATASETS", config.paths.datasets),
    }
    return raw


def _store(raw: dict[str, Any]) -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(NODE, _literal(raw))


def _literal(value: Any) -> Any:
    """Data that OmegaConf reads as they are."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return not_interpolated(value) if isinstance(value, str) else value

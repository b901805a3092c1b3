"""A run's directory: what it holds decides where a command continues, and whether it may."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from multimodal import checkpoint, provenance
from multimodal.config import ConfigError, TrainConfig, changed_identity
from multimodal.files import write_json

CONFIG, ENVIRONMENT, DIFF = "config.yaml", "environment.json", "uncommitted.diff"


def find_last(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, if there is one; ConfigError if it is of another experiment. Only reads."""
    folder = config.folder
    if config.run.fresh:
        if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
            raise ConfigError([("run.fresh", f"{folder} does not look like a run: it is left as it is")])
        return None
    if not checkpoint.steps(folder):
        return None
    last = checkpoint.find(folder)
    if changed := changed_identity(checkpoint.load_config(last), config):
        refuse(config, changed)
    return last


def refuse(config: TrainConfig, changed: list[tuple[str, str]]) -> None:
    """Say why the run in the folder cannot be continued."""
    hint = ("run.name", "another name starts another run; run.fresh=true starts this one over")
    raise ConfigError([*changed, hint], f"way of resuming {config.folder}: it was computed with other values")


def prepare(config: TrainConfig) -> dict[str, Any]:
    """Make the folder ready for a start, emptied if that is asked for; what was written down about this start."""
    folder = config.folder
    if config.run.fresh and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.clean(folder)
    (folder / CONFIG).write_text(config_text(config))
    facts = provenance.facts()
    environment = folder / ENVIRONMENT
    starts = json.loads(environment.read_text()) if environment.exists() else []
    write_json(environment, [*starts, facts])
    (folder / DIFF).write_text(provenance.uncommitted())
    return facts


def config_text(config: TrainConfig) -> str:
    """The resolved configuration as YAML; it launches the same run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

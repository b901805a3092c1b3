"""A run's directory: what it holds decides where a command continues, and whether it may."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from multimodal import checkpoint, provenance, run_lock
from multimodal.checkpoint import TrainerState
from multimodal.config import ConfigError, DamagedCheckpoint, RunError, TrainConfig, changed_identity
from multimodal.files import write_json

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, DIFF = "config.yaml", "environment.json", "uncommitted.diff"


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Turn what file systems say into a RunError that names the folder and the reason."""
    try:
        yield
    except OSError as error:
        raise RunError(f"the run's folder {folder} cannot be made ready: {error}") from error


def find_last(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, if there is one; ConfigError if it is of another experiment. Only reads."""
    folder = config.folder
    if config.run.fresh:
        if _holds_something(folder) and not (folder / CONFIG).exists():
            raise ConfigError([("run.fresh", f"{folder} does not look like a run: it is left as it is")])
        return None
    if not checkpoint.steps(folder):
        return None
    last = _newest_sound(folder)
    if changed := changed_identity(checkpoint.load_config(last), config):
        refuse(config, changed)
    return last


def _holds_something(folder: Path) -> bool:
    return folder.exists() and any(path.name != run_lock.NAME for path in folder.iterdir())


def _newest_sound(folder: Path) -> Path:
    """The newest checkpoint that is as it was written; RunError if none is."""
    damaged: list[str] = []
    for step in reversed(checkpoint.steps(folder)):
        found = checkpoint.step_folder(folder, step)
        try:
            checkpoint.verify(found)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        for told in damaged:
            logger.warning("%s: the run goes back to step %d", told, step)
        return found
    raise RunError(
        "no checkpoint of the run is sound, and nothing was deleted; run.fresh=true starts over\n  "
        + "\n  ".join(damaged)
    )


def refuse(config: TrainConfig, changed: list[tuple[str, str]]) -> None:
    """Say why the run in the folder cannot be continued."""
    where = f"way of resuming {config.folder}: it was computed with other values"
    ways = "The old values continue it; another run.name starts another run; run.fresh=true starts this one over"
    raise ConfigError(changed, where, ways)


def continued(config: TrainConfig, old: TrainerState, new: TrainerState) -> TrainerState:
    """The stored state under this configuration; refused where the rest would be computed otherwise."""
    changed = [
        (name, f"{getattr(old, attribute)} -> {getattr(new, attribute)}")
        for name, attribute in (("number of samples", "num_samples"), ("precision", "precision"))
        if getattr(old, attribute) != getattr(new, attribute)
    ]
    if new.total_steps < old.total_steps:
        changed.append(("duration", f"{old.total_steps} steps -> {new.total_steps}; it can only grow"))
    if changed:
        refuse(config, changed)
    update: dict[str, Any] = {"total_steps": new.total_steps}
    if old.best_of != new.best_of:
        update |= {"best_of": new.best_of, "best": None, "best_step": None}
    return old.model_copy(update=update)


def prepare(config: TrainConfig, step: int) -> dict[str, Any]:
    """Make the folder ready for a start after this step, emptied if asked to; what was written down about the start."""
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    if config.run.fresh:
        _empty(folder)
    checkpoint.set_aside(folder, step)
    (folder / CONFIG).write_text(config_text(config))
    facts = provenance.facts()
    environment = folder / ENVIRONMENT
    starts = json.loads(environment.read_text()) if environment.exists() else []
    write_json(environment, [*starts, facts])
    (folder / DIFF).write_text(provenance.uncommitted())
    return facts


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != run_lock.NAME:
            path.unlink()


def config_text(config: TrainConfig) -> str:
    """The resolved configuration as YAML; it launches the same run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

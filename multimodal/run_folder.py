"""A run's directory: what it holds decides where a command continues, and whether it may."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from multimodal import checkpoint, provenance, run_lock
from multimodal.checkpoint import TrainerState
from multimodal.config import ConfigError, DamagedCheckpoint, RunError, TrainConfig, changed_identity
from multimodal.files import write_json
from multimodal.tracker import SUMMARY

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, DIFF, REPEAT = "config.yaml", "environment.json", "uncommitted.diff", "repeat.json"

FINISHED = ("finished", "stopped early")
"""What the summary of a run says that has nothing left to do."""
EXTENDS = {"duration", "early_stop"}
"""Settings with which a finished run may go on."""
ROUNDING = ("duration", "micro_batch_size", "sharding", "compile", "deterministic")
"""Settings that are no part of a run's identity, and may change its numbers: by rounding, or by how long it is."""


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


def is_finished(config: TrainConfig) -> bool:
    """Whether a start would find nothing to do, by what the folder says alone; where that is not sure, it is not."""
    folder = config.folder
    try:
        if config.run.fresh or config.dry_run or json.loads((folder / SUMMARY).read_text())["status"] not in FINISHED:
            return False
        last = checkpoint.find(folder)
        stored, state = checkpoint.load_config(last), checkpoint.load_state(last)
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong is told when the run starts
        return False
    now = config.model_dump(mode="json", include=EXTENDS)
    same = all(stored.get(key, now[key]) == now[key] for key in EXTENDS)
    return state.is_over and same and not changed_identity(stored, config)


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
    patience = old.patience if old.patience.of == new.patience.of else new.patience
    enough = new.patience.of is not None and patience.waited >= config.early_stop.patience
    return old.model_copy(update={**update, "patience": patience, "stopped_early": enough})


def prepare(config: TrainConfig, step: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder ready for a start after this step, emptied if asked to.

    What was written down about the start, with `more` facts that are known of it. If it repeats a run, what is not the
    same is said and written down too.
    """
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    if config.run.fresh:
        _empty(folder)
    checkpoint.set_aside(folder, step)
    (folder / CONFIG).write_text(config_text(config))
    facts = {**provenance.facts(), **more}
    environment = folder / ENVIRONMENT
    write_json(environment, [*_starts(environment), facts])
    (folder / DIFF).write_text(provenance.uncommitted())
    if config.run.repeat is not None:
        _tell_differences(config, facts, Path(config.run.repeat))
    return facts


def _tell_differences(config: TrainConfig, facts: Mapping[str, Any], original: Path) -> None:
    found = [{"what": what, "was": was, "is": now} for what, was, now in not_the_same(config, facts, original)]
    write_json(config.folder / REPEAT, {"of": str(original), "not_the_same": found})
    told = [f"  {one['what']}: {one['was']} -> {one['is']}" for one in found]
    same = "settings, code, versions, threads and data are the same"
    logger.info("%s", "\n".join([f"repeats {original}; {'not the same:' if told else same}", *told]))


def not_the_same(
    config: TrainConfig, facts: Mapping[str, Any], original: Path
) -> Iterator[tuple[str, str, str]]:  # what, as it was, as it is
    """Where this start differs from the last one of the original in what is computed, as far as that was recorded."""
    stored = checkpoint.read_config(original / CONFIG)
    for path, change in changed_identity(stored, config):
        was, _, now = change.partition(" -> ")
        yield path, was, now
    settings = config.model_dump(mode="json", include=set(ROUNDING))
    for path in ROUNDING:
        if stored.get(path, settings[path]) != settings[path]:
            yield path, str(stored[path]), str(settings[path])
    starts = _starts(original / ENVIRONMENT)
    if any(True for start in starts for _ in provenance.differences(start, starts[-1])):
        yield "starts", f"{len(starts)}, not all alike; the last counts here", "1"
    yield from provenance.differences(starts[-1] if starts else {}, facts)
    before, after = (_digest(folder / DIFF) for folder in (original, config.folder))
    if before != after:
        yield "uncommitted changes", before, after


def _starts(file: Path) -> list[dict[str, Any]]:
    """What was written down about each; nothing where that cannot be read."""
    try:
        starts = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _digest(file: Path) -> str:
    text = file.read_bytes() if file.exists() else b""
    return hashlib.sha256(text).hexdigest()[:16] if text else "none"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != run_lock.NAME:
            path.unlink()


def config_text(config: TrainConfig) -> str:
    """The resolved configuration as YAML; it launches the same run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

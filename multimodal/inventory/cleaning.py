"""Checkpoints that a rule has no use for are deleted, but never those of a live run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from multimodal import checkpoint
from multimodal.config import ConfigError, DamagedCheckpoint, RunError
from multimodal.inventory.listing import Entry, Status, size_of, standing
from multimodal.report.folders import read_run
from multimodal.run_lock import RunLock

Rule = Literal["best_and_last", "last", "all", "damaged"]
Mark = tuple[int, int, int]
"""Of a folder: another one that has taken its name has another."""


@dataclass(frozen=True)
class Deletion:
    """Of a run."""

    name: str
    run: Path
    status: Status
    """How the run stood."""
    folders: dict[Path, Mark]
    """Of checkpoints."""
    size: int
    """Bytes of them."""

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(folder.name for folder in self.folders)}"


@dataclass
class Cleaned:
    """What became of a plan."""

    freed: int = 0
    """Bytes."""
    gone: list[str] = field(default_factory=list)
    """What was no longer there to delete."""
    left: list[str] = field(default_factory=list)
    """What is still there, and why."""


def planned(listed: Sequence[Entry], rule: Rule) -> tuple[list[Deletion], list[tuple[str, str]]]:
    """What a rule deletes of runs that are not live, and which runs are left alone, with the reason."""
    found, left = [], []
    for entry in listed:
        if entry.status == "live":
            if _divided(entry.folder, rule)[1]:
                left.append((entry.run.name, "is being trained"))
            continue
        try:
            folders = {folder: _mark(folder) for folder in _planned(entry.folder, rule)}
        except (DamagedCheckpoint, OSError) as error:
            left.append((entry.run.name, str(error)))
            continue
        if folders:
            found.append(Deletion(entry.run.name, entry.folder, entry.status, folders, sum(map(size_of, folders))))
    return found, left


def _planned(run: Path, rule: Rule) -> list[Path]:
    """The checkpoints of a run that go.

    Those that stay are read first, and DamagedCheckpoint is raised where one is: an older one may be all there is.
    """
    kept, folders = _divided(run, rule)
    if folders:
        for folder in kept:
            checkpoint.verify(folder)
    return folders


def _mark(folder: Path) -> Mark:
    found = folder.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _divided(run: Path, rule: Rule) -> tuple[list[Path], list[Path]]:
    """The checkpoints that stay and have to be sound, and those that go."""
    if rule == "damaged":
        return [], checkpoint.damaged(run)
    every = [checkpoint.step_folder(run, step) for step in checkpoint.steps(run)]
    kept = [] if rule == "all" else every[-1:]
    if rule == "best_and_last":
        best = (run / checkpoint.FOLDER / checkpoint.BEST).resolve()
        kept = [folder for folder in every if folder in kept or folder.resolve() == best]
    return kept, [folder for folder in every if folder not in kept]


def delete(planned: Sequence[Deletion], rule: Rule) -> Cleaned:
    """Do what was planned, as far as the rule says the same once more under each run's lock."""
    cleaned = Cleaned()
    for deletion in planned:
        if not deletion.run.exists():
            cleaned.gone.append(f"{deletion.name} was gone already")
            continue
        try:
            lock = RunLock(deletion.run)
        except (RunError, ConfigError) as error:
            cleaned.left.append(f"{deletion}: {error}")
            continue
        try:
            _delete(deletion, rule, cleaned)
        except (DamagedCheckpoint, OSError) as error:
            cleaned.left.append(f"{deletion}: {error}")
        finally:
            lock.release()
    return cleaned


def _delete(deletion: Deletion, rule: Rule, cleaned: Cleaned) -> None:
    status = standing(read_run(deletion.run, deletion.name))
    if status != deletion.status:
        cleaned.left.append(f"{deletion}: the run was {deletion.status} and is {status} now")
        return
    again = _planned(deletion.run, rule)
    agreed = []
    for folder, mark in deletion.folders.items():
        if not folder.exists():
            cleaned.gone.append(f"{deletion.name}: {folder.name} was gone already")
        elif folder not in again:
            cleaned.left.append(f"{deletion.name}: {folder.name} stays: the run has gone on, and the rule keeps it now")
        elif _mark(folder) != mark:
            cleaned.left.append(f"{deletion.name}: {folder.name} stays: it is another one than before")
        else:
            agreed.append(folder)
    size = sum(map(size_of, agreed))
    remaining = checkpoint.delete(deletion.run, agreed)
    cleaned.freed += size - sum(map(size_of, remaining))
    cleaned.left += [f"{deletion.name}: {place} cannot be deleted" for place in remaining]

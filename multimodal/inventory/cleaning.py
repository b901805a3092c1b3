"""Checkpoints that a rule has no use for are deleted, but never those of a live run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from multimodal import checkpoint
from multimodal.config import ConfigError, DamagedCheckpoint, RunError
from multimodal.inventory.listing import Entry, size_of
from multimodal.run_lock import RunLock

Rule = Literal["best_and_last", "last", "all", "damaged"]


@dataclass(frozen=True)
class Deletion:
    """Of a run."""

    name: str
    run: Path
    folders: list[Path]
    """Of checkpoints."""
    size: int
    """Bytes of them."""

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(folder.name for folder in self.folders)}"


def planned(listed: Sequence[Entry], rule: Rule) -> tuple[list[Deletion], list[tuple[str, str]]]:
    """What a rule deletes of runs that are not live, and which runs are left alone, with the reason.

    The checkpoints that stay are read first: where one is damaged, an older one may be all there is.
    """
    found, left = [], []
    for entry in listed:
        kept, folders = _divided(entry.folder, rule)
        if not folders:
            continue
        if entry.status == "live":
            left.append((entry.run.name, "is being trained"))
            continue
        try:
            for folder in kept:
                checkpoint.verify(folder)
        except DamagedCheckpoint as error:
            left.append((entry.run.name, str(error)))
            continue
        found.append(Deletion(entry.run.name, entry.folder, folders, sum(map(size_of, folders))))
    return found, left


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


def delete(planned: Sequence[Deletion]) -> int:
    """Do it, under each run's lock; the bytes that are free then.

    RunError names what is still there, when all else is done.
    """
    freed, wrong = 0, []
    for deletion in planned:
        try:
            lock = RunLock(deletion.run)
        except (RunError, ConfigError) as error:
            wrong.append(str(error))
            continue
        try:
            checkpoint.delete(deletion.run, deletion.folders)
        finally:
            lock.release()
        remaining = [folder for folder in deletion.folders if folder.exists()]
        wrong += [f"{folder} is still there" for folder in remaining]
        freed += deletion.size - sum(map(size_of, remaining))
    if wrong:
        raise RunError("not all was deleted:\n  " + "\n  ".join(wrong))
    return freed

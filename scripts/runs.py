"""List runs and clean them up: `scripts/runs.py [PATTERN...] [status=failed] [where='seed=1'] [clean=RULE]`."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from multimodal.cli import launch, plain, program
from multimodal.config import ConfigError, RunError, check
from multimodal.inventory import cleaning
from multimodal.inventory.listing import Entry, Status, entries, table
from multimodal.inventory.where import Condition, paths
from multimodal.report.asked import Several, SeveralRuns, Words
from multimodal.report.numbers import short
from multimodal.resolve import did_you_mean

logger = logging.getLogger(__name__)


def _conditions_are_some(config: "RunsConfig") -> Iterator[tuple[str, str]]:
    for text in config.where:
        try:
            Condition.parse(text)
        except ValueError as error:
            yield "where", str(error)


def _what_is_cleaned_is_there(config: "RunsConfig") -> Iterator[tuple[str, str]]:
    if config.clean is not None and not Path(config.paths.runs).is_dir():  # names would be looked for elsewhere
        yield "paths.runs", f"there is no folder '{config.paths.runs}', and nothing is deleted elsewhere"


class RunsConfig(SeveralRuns):
    """Which runs, and what becomes of their checkpoints."""

    rules = (*SeveralRuns.rules, _conditions_are_some, _what_is_cleaned_is_there)

    status: Several[Status]
    """Runs that stand so; any, if there are none. `clean` takes finished ones, unless some are named."""
    where: Words
    """Conditions on settings, all of which hold."""
    clean: cleaning.Rule | None
    """Which checkpoints are deleted; null only lists."""
    yes: bool
    """Delete without asking."""


@program("runs")
def main(composed: DictConfig) -> None:
    """Print how runs stand; with `clean`, what would be deleted, ask, and delete."""
    asked = check(plain(composed), RunsConfig)
    listed = _filtered(asked, entries(asked.found[0]))
    if asked.clean is None:
        logger.info("%s", table(listed) if listed else "no run is so")
        return
    if not asked.status:
        listed = [entry for entry in listed if entry.status == "finished"]
    planned, left = cleaning.planned(listed, asked.clean)
    for name, why in left:
        logger.warning("%s is left alone: %s", name, why)
    for deletion in planned:
        logger.info("%s (%sB)", deletion, short(deletion.size))
    count = sum(len(deletion.folders) for deletion in planned)
    if not count:
        logger.info("there is nothing to delete")
    elif _agreed(asked.yes, f"delete {count} checkpoints, {short(sum(d.size for d in planned))}B? [y/N] "):
        cleaned = cleaning.delete(planned, asked.clean)
        for told in cleaned.gone:
            logger.warning("%s", told)
        logger.info("%sB deleted", short(cleaned.freed))
        if cleaned.left:
            raise RunError("\n  ".join(["not all was deleted:", *cleaned.left]))


def _filtered(asked: RunsConfig, listed: list[Entry]) -> list[Entry]:
    conditions = [Condition.parse(text) for text in asked.where]
    known = paths(entry.run.config for entry in listed)
    if unknown := [condition.path for condition in conditions if condition.path not in known]:
        raise ConfigError([("where", f"no run has a setting '{path}'.{did_you_mean(path, known)}") for path in unknown])
    return [
        entry
        for entry in listed
        if (not asked.status or entry.status in asked.status)
        and all(condition.holds(entry.run.config) for condition in conditions)
    ]


def _agreed(yes: bool, question: str) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise RunError("there is no terminal to ask on, and nothing was deleted: yes=true does not ask")
    return input(question).strip().lower() in ("y", "yes")


if __name__ == "__main__":
    launch(main, verbatim=("runs", "where"), listed="runs")

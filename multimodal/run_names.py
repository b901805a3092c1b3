"""Names of the runs of a grid: readable, and the same for the same command."""

import hashlib
import re
from collections.abc import Sequence

from multimodal.config import TrainConfig

MAX_NAME = 100
NAMED_OTHERWISE = ("run", "paths", "experiment", "debug", "dry_run")
"""First words of overrides that do not go into a name: they are in it already, or do not say what is computed."""


def run_name(
    base: str,  # what the configuration says
    overrides: Sequence[str],  # of this run
    typed: Sequence[str],  # words of the command line
) -> str:
    """That of one run of a grid: the name that all would have, with what is its own.

    Its own are overrides that were not typed as they are, which the grid has made of lists and ranges, and those that
    are the same for all where they change what is computed. A name that the grid gives itself (`run.name=a,b`), or in
    which a user says what goes into it, stays.
    """
    names = [override for override in overrides if override.startswith("run.name=")]
    if names and (names[-1] not in typed or "${" in names[-1]):
        return base
    words = [one for one in overrides if _first_word(one) not in NAMED_OTHERWISE]
    own = [one for one in words if one not in typed]
    own += [one for one in words if one in typed and _changes(one)]  # behind: where all is too long they are cut
    return f"{base}-{safe_name(own)}" if own else base


def safe_name(overrides: Sequence[str]) -> str:
    """Overrides as one file name, "optimizer.lr=0.001-seed=2"; where that is too long it ends in a hash."""
    name = "-".join(re.sub(r"[^\w.=+-]+", "_", override).strip("_") for override in overrides)
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _first_word(override: str) -> str:
    """The section that it is about; of a group with a package (`tower@towers.image`), that of the package."""
    key = override.lstrip("+~").partition("=")[0]
    return key.partition("@")[2].partition(".")[0] or re.split(r"[.@]", key)[0]


def _changes(override: str) -> bool:
    """Whether it is identity; parts of operational sections (where, how fast, how often watched) are none."""
    field = TrainConfig.model_fields.get(_first_word(override))
    return field is None or "operational" not in field.metadata

"""Groups of runs that differ in nothing but their seed, and what they are compared by."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

from multimodal.config import computed
from multimodal.report.folders import Run, number, split
from multimodal.report.numbers import better, is_share
from multimodal.report.overview import speed
from multimodal.run_folder import FINISHED

SEED = re.compile(r"[-_.]?(?:seed[=_-]?|s)\d+(?=$|[-_.])")
"""How a run's name says its seed."""
FACTS = {"train/loss": -1, "parameters": -1, "samples": -1, "samples_per_s": 1}
"""What is known of a run besides its evaluations, and whether more of it is better."""


@dataclass(frozen=True)
class Group:
    """Runs with the same settings."""

    name: str
    runs: list[Run]
    """By seed."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What is computed, but for the seed; empty for a model that was only evaluated."""

    @cached_property
    def seeds(self) -> list[int]:
        """Of the runs; 0 for a model that has none."""
        return [seed_of(run) for run in self.runs]

    def values(self, key: str) -> dict[int, float]:
        """A metric by seed, of those runs that have it."""
        found = {seed: measures(run).get(key) for seed, run in zip(self.seeds, self.runs, strict=True)}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Compared:
    """All groups, and the runs that are in none, with the reason."""

    groups: list[Group]
    left_out: list[tuple[str, str]]

    @cached_property
    def keys(self) -> list[str]:
        """All that some run is measured by: its evaluations, then other facts; without what is `unlike`."""
        keys = dict.fromkeys(key for group in self.groups for run in group.runs for key in measures(run))
        unlike = self.unlike
        return [key for key in keys if key not in FACTS and key not in unlike] + [key for key in FACTS if key in keys]

    @property
    def unlike(self) -> set[str]:
        """Metrics whose chance or number of samples is not that of all runs: they were measured on other data."""
        seen: dict[str, set[tuple[str, float]]] = {}
        for run in (run for group in self.groups for run in group.runs):
            for key, value in run.values.items():
                facts = {"chance": value.chance, "count": value.count}
                seen.setdefault(key, set()).update((name, fact) for name, fact in facts.items() if fact is not None)
        return {key for key, facts in seen.items() if len(facts) > len({name for name, _ in facts})}


def compared(runs: Iterable[Run], foreign: Iterable[tuple[str, str]] = ()) -> Compared:
    """The runs in groups, in the order in which they come; of runs with the same settings and seed the first counts.

    What is `foreign`, with its reason, is left out beside those that cannot be compared.
    """
    members: dict[str, list[Run]] = {}
    settings: dict[str, dict[str, Any]] = {}
    left_out = list(foreign)
    for run in runs:
        if (why := obstacle(run)) is not None:
            left_out.append((run.name, why))
            continue
        known = {key: value for key, value in computed(run.config).items() if key != "seed"} if run.config else {}
        identity = json.dumps(known, sort_keys=True, default=str) if known else run.name
        same = next((other for other in members.get(identity, []) if seed_of(other) == seed_of(run)), None)
        if same is not None:
            left_out.append((run.name, f"has the settings and the seed of {same.name}, which stands for both"))
            continue
        members.setdefault(identity, []).append(run)
        settings[identity] = known
    groups: list[Group] = []
    for identity, same_settings in members.items():
        name = _name(same_settings)
        taken = sum(group.name == name or group.name.startswith(f"{name} (") for group in groups)
        ordered = sorted(same_settings, key=seed_of)
        groups.append(Group(f"{name} ({taken + 1})" if taken else name, ordered, settings[identity]))
    return Compared(groups, left_out)


def obstacle(run: Run) -> str | None:
    """Why a run cannot be compared, if it cannot; a model that was only evaluated can."""
    if not run.config:
        if run.rows or run.summary:
            return "its config.yaml is missing or damaged"
        return None if run.values else "nothing in it can be read"
    status = run.summary.get("status")
    if status not in FINISHED:
        step = run.summary.get("step", run.rows[-1]["step"] if run.rows else 0)
        return f"is not finished: {status or 'its summary.json is missing or damaged'}, step {step}"
    return None


def seed_of(run: Run) -> int:
    """0 where it has none."""
    seed = run.config.get("seed")
    return seed if isinstance(seed, int) else 0


def measures(run: Run) -> dict[str, float]:
    """All numbers that a run may be compared by."""
    found: dict[str, float | None] = {key: value.value for key, value in run.values.items()}
    last = {**(run.rows[-1] if run.rows else {}), **run.summary}
    found |= {"train/loss": number(last.get("train/loss")), "samples": number(last.get("samples"))}
    found |= {"parameters": run.parameters, "samples_per_s": speed(run)}
    return {key: value for key, value in found.items() if value is not None}


def direction(key: str, groups: Sequence[Group]) -> int:
    """1 if more of a metric is better, -1 if less is, 0 if its name does not say."""
    return FACTS[key] if key in FACTS else better(split(key)[1], shared(key, groups))


def shared(key: str, groups: Sequence[Group]) -> bool:
    """Whether a metric is a fraction, to be shown in percent."""
    values = [run.values[key] for group in groups for run in group.runs if key in run.values]
    return key not in FACTS and is_share(split(key)[1], values)


def _name(runs: Sequence[Run]) -> str:
    """Of a run by itself, or what the names have in common without what they say of seeds."""
    names = [run.name for run in runs]
    without = {SEED.sub("", name) for name in names}
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = without.pop() if len(without) == 1 else "".join(letters[0] for letters in alike).rstrip("-_.= ")
    return common or names[0]

"""What is evaluated: runs at a checkpoint, and open_clip's models, which have no run."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from multimodal import api, checkpoint
from multimodal.assemble import Evaluation, Problems, load, open_evaluations
from multimodal.config import ConfigError, TrainedConfig, check
from multimodal.finished_run import FinishedRun, Settings
from multimodal.parts import Eval, Sources
from multimodal.remembering import Remembering
from multimodal.results import folder_of

OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class Subject:
    """One model, of which nothing is read yet but what it is."""

    name: str
    folder: Path
    """Where its results go."""
    evals: Mapping[str, Eval]
    """Those that it was trained with."""
    towers: tuple[str, ...]
    """Their names."""
    settings: Settings
    checkpoint: Path | None
    """Of a run; else it is open_clip's."""

    def load(self) -> Remembering:
        """The model, as evaluations see it; ValueError or FileNotFoundError where it cannot be."""
        asked = self.settings
        if self.checkpoint is not None:
            changes = {"paths": asked.paths.model_dump(), "device": asked.device, "workers": asked.workers}
            config, assembled = load(self.checkpoint, asked.weights, **changes)
            return assembled.encoder(config.workers)
        model = api.open_clip(*_open_clip(self.name), asked.device, "auto", workers=asked.workers)
        return Remembering(model.encoder)


def _open_clip(name: str) -> tuple[str, str | None]:
    """Architecture and weights."""
    architecture, _, weights = name.removeprefix(OPEN_CLIP).partition("/")
    return architecture, weights or None


def find(words: tuple[str, ...], settings: Settings, problems: Problems) -> list[Subject]:
    """The models that are named, by run, by a pattern of runs, or as open_clip:ARCHITECTURE/WEIGHTS.

    Those that there are none of are noted among the `problems`.
    """
    found = {}
    for word in words:
        if word.startswith(OPEN_CLIP):
            with problems.at("weights"):
                if settings.weights != "raw":
                    raise ValueError(f"{word} has no running mean of its weights: raw")
            with problems.at("run"):
                found[word] = _of_open_clip(word, settings)
        else:
            for name in _names(word, Path(settings.paths.runs), problems):
                try:
                    found[name] = _of_run(name, settings)
                except ConfigError as error:
                    problems += error.problems
    return list(found.values())


def _of_open_clip(word: str, settings: Settings) -> Subject:
    api.describe_open_clip(*_open_clip(word))
    folder = Path(settings.paths.runs) / word.replace(":", "-").replace("/", "-")
    return Subject(word, folder_of(folder, 0), {}, ("image", "text"), settings, None)


def _names(word: str, runs: Path, problems: Problems) -> list[str]:
    """The word, or the runs that it is a pattern of."""
    if not any(letter in word for letter in "*?["):
        return [word]
    names = fnmatch.filter(sorted(path.name for path in runs.glob("*") if checkpoint.steps(path)), word)
    if not names:
        problems.append(("run", f"no run in {runs} is named like '{word}'"))
    return names


def _of_run(name: str, settings: Settings) -> Subject:
    run = check({**settings.model_dump(include=set(Settings.model_fields)), "run": name}, FinishedRun)
    place = run.find_checkpoint()
    config = check({**checkpoint.load_config(place), "sharding": "none"}, TrainedConfig)
    results = folder_of(run.folder, checkpoint.load_state(place).step)
    return Subject(name, results, config.evals, tuple(config.towers), settings, place)


def open_all(
    subjects: Sequence[Subject], evals: Mapping[str, Eval], data: Sources, problems: Problems
) -> dict[str, dict[str, Evaluation]]:
    """The `evals`, or else each model's own, by its name; what is wrong with their data is among the `problems`."""
    for subject in subjects:
        for name, part in (evals or subject.evals).items():
            if missing := sorted(set(part.towers).difference(subject.towers)):
                have = ", ".join(subject.towers)
                told = f"needs towers named {', '.join(missing)}; {subject.name} has: {have}"
                problems.append((f"evals.{name}", told))
        if not evals and not subject.evals:
            problems.append(("evals", f"{subject.name} was trained with none: name some, such as evals=[shapes]"))
    if evals:
        opened = open_evaluations(evals, data, problems)
        return {subject.name: opened for subject in subjects}
    return {subject.name: open_evaluations(subject.evals, data, problems) for subject in subjects}

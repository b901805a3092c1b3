"""The laws of conf/: every file composes, says every knob of its class and no other, and builds."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from torch import nn

from multimodal.cli import CONF
from multimodal.config import TrainConfig, check
from multimodal.data.augment import Keep
from multimodal.offline import offline
from multimodal.parts import Sources
from multimodal.resolve import Part, find_part

FILES = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
}
PLACES = {
    "tower": ("+tower@towers.extra={}", "towers.extra"),
    "tokenizer": ("tokenizer@towers.text.tokenizer={}", "towers.text.tokenizer"),
    "loss": ("loss=[{}]", "loss.{}"),
    "evals": ("evals=[{}]", "evals.{}"),
    "dataset": ("dataset={}", "dataset"),
    "augment": ("augment={}", "augment"),
    "optimizer": ("optimizer={}", "optimizer"),
    "schedule": ("schedule={}", "schedule"),
    "tracker": ("tracker={}", "tracker"),
}
"""How a choice of each group is taken, and where it is then found."""

GIVEN = "given.csv"
NEEDED = {"sigmoid": ["model.logit_bias=-10.0"]}
"""What a choice asks of the rest of the configuration."""
NO_PARTS = {
    *("experiment", "sweep", "sampler", "pruner", "suite", "tuning", "architecture", "to", "hardware", "debug", "hydra")
}
CHOICES = [(group, choice) for group in PLACES for choice in FILES.get(group, [])]
DATASETS = os.environ.get("MULTIMODAL_DATASETS")


def filled(value: Any) -> Any:
    """With something for every value that the user must give."""
    if isinstance(value, Mapping):
        return {key: filled(item) for key, item in value.items()}
    return GIVEN if value == "???" else value


@cache
def chosen(compose: Compose, group: str, choice: str) -> tuple[dict[str, Any], TrainConfig, Any]:
    """The raw part, the whole configuration with it, and the part."""
    override, place = PLACES[group]
    raw: Any = filled(compose(override.format(choice), "checkpoint.best=null", *NEEDED.get(choice, ())))
    config: Any = check(raw, TrainConfig)
    part = config
    for key in place.format(choice).split("."):
        raw = raw[key]
        part = part[key] if isinstance(part, dict) else getattr(part, key)
    assert isinstance(part, Part)
    return raw, config, part


def parts_in(raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "_target_" in raw:
        yield raw
    for value in raw.values():
        if isinstance(value, Mapping):
            yield from parts_in(value)


def test_every_folder_is_of_a_known_kind() -> None:
    assert set(FILES) <= PLACES.keys() | NO_PARTS
    assert PLACES.keys() <= set(FILES)
    assert all(FILES[group] for group in PLACES)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_file_composes_passes_and_says_every_knob_of_its_class_and_no_other(
    compose: Compose, group: str, choice: str
) -> None:
    raw, _, part = chosen(compose, group, choice)
    assert raw["_target_"] == f"{type(part).__module__}.{type(part).__qualname__}"
    for inner in parts_in(raw):
        fields = find_part(inner["_target_"], Part).model_fields
        assert set(inner) == {"_target_", *fields}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_the_target_is_the_first_line_of_a_part(group: str, choice: str) -> None:
    lines = [line.strip() for line in (CONF / group / f"{choice}.yaml").read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if any(line.startswith("_target_:") for line in lines):
        at = next(i for i, line in enumerate(lines) if line.startswith("_target_:"))
        before = [line for line in lines[:at] if not line.startswith(("defaults:", "-"))]
        assert before in ([], [f"{choice}:"])
    else:
        assert lines[0].startswith("defaults:"), "a preset inherits from the base"


@pytest.mark.parametrize("group", ["loss", "evals"])
def test_of_groups_that_may_be_combined_a_file_has_one_top_key_named_as_the_file(compose: Compose, group: str) -> None:
    for choice in FILES[group]:
        _, config, _ = chosen(compose, group, choice)
        assert list(getattr(config, group)) == [choice]


@pytest.mark.parametrize("experiment", FILES.get("experiment", []))
def test_an_experiment_composes_and_passes(compose: Compose, experiment: str) -> None:
    check(compose(f"experiment={experiment}"), TrainConfig)


@pytest.mark.parametrize("suite", FILES.get("suite", []))
def test_a_suite_composes_and_passes(compose: Compose, suite: str) -> None:
    evals = check(compose(f"+suite={suite}", "checkpoint.best=null"), TrainConfig).evals
    assert len(evals) > 1


def captions() -> list[str]:
    return ["a red circle", "a blue square"]


@pytest.mark.parametrize("choice", FILES["tower"])
def test_a_tower_builds_and_its_output_is_as_wide_as_it_says(compose: Compose, choice: str) -> None:
    _, config, tower = chosen(compose, "tower", choice)
    if "name" in type(tower).model_fields and tower.reads == "text":
        with offline(), pytest.raises(ValueError, match=tower.name):  # a hub's, or no such folder
            tower.preprocessor(captions, Keep(), None)
        return
    preprocessor = tower.preprocessor(captions, Keep(), None)
    embed_dim = 768 if getattr(tower, "projection", None) == "none" else config.model.embed_dim
    with torch.device("meta"):
        module = tower.build(preprocessor, embed_dim)
        projected = module.projection(torch.empty(2, module.width))
    assert sum(p.numel() for p in module.parameters()) > 10_000
    assert projected.shape == (2, embed_dim)


@pytest.mark.parametrize("choice", FILES["tokenizer"])
def test_a_tokenizer_builds(compose: Compose, choice: str) -> None:
    _, _, tokenizer = chosen(compose, "tokenizer", choice)
    if "name" in type(tokenizer).model_fields:
        with pytest.raises(ValueError, match="no value given"):
            tokenizer.build(captions, None)
        return
    encoding = tokenizer.build(captions, None)
    assert encoding.decode(torch.tensor(encoding("a red square"))) == "a red square"


@pytest.mark.parametrize("choice", FILES["loss"])
def test_a_loss_needs_what_the_towers_give_and_weighs_something(compose: Compose, choice: str) -> None:
    _, config, loss = chosen(compose, "loss", choice)
    assert loss.needs() <= {f"{tower}_features" for tower in config.towers} | {"logit_bias"}
    assert loss.weight > 0


@pytest.mark.parametrize("choice", FILES["optimizer"])
def test_an_optimizer_builds_and_steps(compose: Compose, choice: str) -> None:
    _, _, optimizer = chosen(compose, "optimizer", choice)
    weight = nn.Parameter(torch.ones(2, 2))
    built = optimizer.build([{"params": [weight], "weight_decay": optimizer.weight_decay}])
    weight.sum().backward()
    built.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("choice", FILES["schedule"])
def test_a_schedule_warms_up_to_the_peak(compose: Compose, choice: str) -> None:
    _, _, schedule = chosen(compose, "schedule", choice)
    assert [schedule(step, 4, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert all(0 <= schedule(step, 4, 100) <= 1 for step in range(100))


def needs_files(raw: Mapping[str, Any]) -> bool:
    return any(key in part for part in parts_in(raw) for key in ("path", "urls"))


@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c[0] in ("dataset", "evals")])
def test_a_dataset_or_evaluation_builds_where_its_files_are(
    compose: Compose, group: str, choice: str, tmp_path: Path
) -> None:
    raw, _, part = chosen(compose, group, choice)
    at: Callable[[Path], Any] = Sources if group == "evals" else Path
    if any(value == GIVEN for inner in parts_in(raw) for value in inner.values()):
        with pytest.raises((ValueError, OSError), match="given"):
            part.build(at(tmp_path))
        return
    if choice == "imagenet":
        with pytest.raises(FileNotFoundError, match="there is no folder 'imagenet/val' below"):
            part.build(at(tmp_path))
        return
    if needs_files(raw) and not DATASETS:
        pytest.skip("needs the files of data sets, in the folder that MULTIMODAL_DATASETS names")
    built = part.build(at(Path(DATASETS or tmp_path)))
    assert callable(built) if group == "evals" else len(built) > 0

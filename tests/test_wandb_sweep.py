"""The ready file for `wandb sweep`: every trial that it can draw is a command that composes and passes."""

import itertools
from typing import Any

import pytest
from conftest import composed
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from multimodal.cli import CONF
from multimodal.config import TrainConfig, check, metrics_of


def drawn(parameter: dict[str, Any]) -> list[Any]:
    """The values, or the ends of the range."""
    if "value" in parameter:
        return [parameter["value"]]
    return list(parameter["values"]) if "values" in parameter else [parameter["min"], parameter["max"]]


def expanded(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The command of a trial, as W&B's agent makes it."""
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "program": [sweep["program"]]}
    words = create_sweep_command(list(sweep["command"]))
    return [
        one
        for word in words
        for one in (macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word])
    ]


def test_every_trial_composes_and_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep_config(str(CONF / "wandb_sweep.yaml"))
    assert sweep is not None
    assert sweep.keys() <= {
        "program",
        "name",
        "project",
        "method",
        "metric",
        "early_terminate",
        "parameters",
        "command",
    }
    assert sweep["method"] in ("bayes", "random", "grid")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    names, ranges = zip(*((name, drawn(one)) for name, one in sweep["parameters"].items()), strict=True)
    first = [values[0] for values in ranges]
    last = [values[-1] for values in ranges]
    for values in (first, last, *itertools.islice(itertools.product(*ranges), 3)):
        command = expanded(sweep, dict(zip(names, values, strict=True)))
        assert command[:4] == ["/usr/bin/env", "uv", "run", "train.py"]
        config = check(composed(*command[4:]), TrainConfig)
        assert config.run.name == "sweep-abc"
        assert sweep["metric"]["name"] in metrics_of(config)
        assert sweep["metric"]["goal"] == {"max": "maximize", "min": "minimize"}[config.checkpoint.mode]

"""What a law is fitted to: the size and the error of finished runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from multimodal.comparison.groups import Compared, direction, measures, shared
from multimodal.config import ConfigError, check
from multimodal.hardware import Hardware
from multimodal.plan import PlanConfig, Planner
from multimodal.resolve import did_you_mean

Axis = Literal["flops", "parameters", "samples"]
TITLES: dict[Axis, str] = {"flops": "training FLOPs", "parameters": "parameters", "samples": "samples seen"}


@dataclass(frozen=True)
class Point:
    """A run."""

    name: str
    x: float
    error: float


def complement(metric: str, found: Compared) -> bool:
    """Whether the error is what a metric lacks to 1, and not the metric itself; ValueError if it is neither."""
    if metric not in found.keys:
        raise ValueError(f"no run has '{metric}'.{did_you_mean(metric, found.keys)}")
    sign = direction(metric, found.groups)
    if sign < 0 or shared(metric, found.groups):
        return sign > 0
    raise ValueError(f"'{metric}' is neither a fraction of which more is better nor a number of which less is")


def points(found: Compared, metric: str, axis: Axis, hardware: Hardware) -> tuple[list[Point], list[tuple[str, str]]]:
    """Of all runs that say enough, and what is missing from the others."""
    lacking = complement(metric, found)
    made, left_out = [], list(found.left_out)
    for group in found.groups:
        try:
            each = flops_per_sample(group.runs[0].config, hardware) if axis == "flops" else 1.0
        except ConfigError as error:
            why = error.problems[0][1]
            left_out += [(run.name, f"its FLOPs cannot be counted: {why}") for run in group.runs]
            continue
        for run in group.runs:
            known = measures(run)
            try:
                size, value = known["samples" if axis == "flops" else axis], known[metric]
            except KeyError as error:
                left_out.append((run.name, f"does not say its {error.args[0]}"))
                continue
            made.append(Point(run.name, each * size, 1 - value if lacking else value))
    return made, left_out


def flops_per_sample(config: Mapping[str, Any], hardware: Hardware) -> float:
    """What training computes for a sample, of the whole batch at once, so that micro-batches do not count."""
    changes = {"sharding": "none", "hardware": hardware, "num_gpus": 1, "out": None}
    assumed = {"utilisation": 1.0, "memory_share": 1.0, "samples_per_epoch": None}
    return Planner(check({**config, **changes, **assumed}, PlanConfig)).whole_batch_flops()


def planned_size(plan: Mapping[str, Any], axis: Axis) -> float:
    """Of what scripts/plan.py wrote down; ValueError where it does not say."""
    time = plan.get("time")
    try:
        if axis == "parameters":
            return float(plan["num_parameters"]["total"])
        samples = float(time["samples"])  # type: ignore[index]
        return samples if axis == "samples" else samples * float(plan["whole_batch_flops"])
    except (KeyError, TypeError):
        raise ValueError(
            f"is no plan with a size in {TITLES[axis]}: a duration in samples or steps gives one"
        ) from None

"""What an experiment will take, before it runs: `scripts/plan.py experiment=NAME hardware=h100 num_gpus=64`."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from multimodal.cli import launch, plain, program
from multimodal.config import RunError, check
from multimodal.files import write_json
from multimodal.plan import PlanConfig, Planner

logger = logging.getLogger(__name__)

NAMES = {
    "batch": "input batch",
    "optimizer": "optimizer state",
    "mean": "mean of the weights",
    "checkpoint": "copy that is saved",
    "loss": "(the loss, in its turn)",
}
UNKNOWN = "of how many samples? samples_per_epoch=N, or duration=Nsamples"


@program("plan")
def main(composed: DictConfig) -> None:
    """Rehearse a step, print size, memory, time and cost; exit status 1 if it does not fit."""
    config = check(plain(composed), PlanConfig)
    if config.duration.unit == "epochs" and config.samples_per_epoch is None:
        logger.info("no time will be told: duration=%s %s", config.duration, UNKNOWN)
    logger.info("rehearsing steps without data or memory; for the largest models this takes minutes")
    with tqdm(desc="rehearsing", unit=" passes", leave=False, disable=None) as bar:
        plan = planned(Planner(config, bar.update))
    logger.info("%s", "\n".join(lines(config, plan)))
    if config.out is not None:
        write_json(Path(config.out), plan)
    if not plan["fits"]:
        memory, helps = plan["memory"], plan["helps"]
        told = f"{memory['peak'] / 1e9:.1f} GB do not fit into {memory['budget'] / 1e9:.1f} GB"
        raise RunError(f"{told}; it fits with {', or '.join(helps)}" if helps else f"{told}: a smaller model, or more")


def planned(planner: Planner) -> dict[str, Any]:
    """The whole plan as plain data."""
    config, size = planner.config, planner.micro_batch_size
    memory, time = planner.memory(size), planner.time()
    checkpointing = {
        name: planner.memory(size, grad_checkpointing=on).peak
        for name, on in (("with", True), ("without", False))
        if planner.can_checkpoint(True) or planner.can_checkpoint(False)
    }
    return {
        "towers": {name: asdict(tower) for name, tower in planner.towers().items()},
        "num_parameters": planner.rehearsal.model.num_parameters(),
        "hardware": config.hardware.name,
        "num_gpus": config.num_gpus,
        "precision": planner.precision,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": size,
        "largest_micro_batch_size": planner.largest_micro_batch(),
        "memory": {**asdict(memory), "peak": memory.peak, "budget": planner.budget},
        "peak_by_grad_checkpointing": checkpointing,
        "fits": planner.fits(memory),
        "helps": [] if planner.fits(memory) else list(planner.helps()),
        "training_flops": planner.training_flops(),
        "whole_batch_flops": planner.whole_batch_flops(),
        "utilisation": config.utilisation,
        "samples_per_s": planner.samples_per_s(),
        "time": None if time is None else asdict(time),
    }


def lines(config: PlanConfig, plan: dict[str, Any]) -> Iterator[str]:
    """The same, for people."""
    devices = f"{plan['num_gpus']} x {plan['hardware']}"
    rows = config.global_batch_size // config.num_gpus
    size = plan["micro_batch_size"] or rows
    held = "a share of the model on each" if config.sharding == "full" else "the whole model on each"
    yield f"{config.run.name} on {devices}, {plan['precision']}, {held}"
    yield f"batch of {config.global_batch_size:,}: {rows:,} on each, {min(size, rows):,} at a time"
    yield ""
    yield f"{'tower':10} {'parameters':>15} {'trained':>15} {'forward GFLOPs':>15} {'in full form':>15}"
    sizes = plan["towers"]
    total = {key: sum(tower[key] for tower in sizes.values()) for key in next(iter(sizes.values()))}
    for name, tower in {**sizes, "together": total}.items():
        flops = f"{tower['forward_flops'] / 1e9:15,.2f} {tower['full_form_flops'] / 1e9:15,.2f}"
        yield f"{name:10} {tower['parameters']:15,} {tower['trained']:15,} {flops}"
    yield f"a step computes {plan['training_flops'] / 1e9:,.2f} GFLOPs for each sample, the loss among them"
    yield ""
    memory = plan["memory"]
    yield f"{'memory of each':24} {'GB':>9}"
    parts = "weights optimizer mean gradients batch features activations checkpoint peak loss"
    for part in parts.split():
        if memory[part]:
            yield f"{NAMES.get(part, part):22} {memory[part] / 1e9:9.3f}"
    yield f"to fill: {memory['budget'] / 1e9:.1f} GB, {config.memory_share:.0%} of {config.hardware.memory_gb:g}"
    for name, peak in plan["peak_by_grad_checkpointing"].items():
        yield f"peak {name} grad_checkpointing: {peak / 1e9:.3f} GB"
    largest = plan["largest_micro_batch_size"]
    found = "all rows" if largest == rows else largest or "none"
    yield f"largest micro_batch_size that fits, of powers of two: {found}"
    if not plan["fits"]:
        return
    yield ""
    yield f"at {config.utilisation:.0%} of the peak: {plan['samples_per_s']:,.0f} samples/s"
    if plan["time"] is None:
        yield f"duration={config.duration} {UNKNOWN}"
        return
    time = {key: f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for key, value in plan["time"].items()}
    price = f"at ${config.hardware.price_per_hour:g} an hour, an assumption"
    yield f"{time['samples']} samples, {time['steps']} steps: {time['hours']} hours"
    yield f"{time['gpu_hours']} device hours, ${time['dollars']} {price}"


if __name__ == "__main__":
    launch(main, verbatim=("out",))

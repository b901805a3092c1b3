"""How near the planned memory of a training step is to what a step really takes, and on a GPU its planned speed.

    uv run python benchmarks/plan_memory.py                  # three small models
    uv run python benchmarks/plan_memory.py --quick          # one
    uv run python benchmarks/plan_memory.py --device cuda    # ViT-B-32 on a GPU

Measured is the highest resident size of a process of its own over two training steps (Linux), above its size before
the model was made and after a step of another, tiny model, which loads what libraries load once. malloc is told to give
back what is freed; as it comes it keeps holes, which is measured too, in another process. Planned is the peak of
`scripts/plan.py` with `hardware=cpu`, one device and the same settings. Ends in one line of JSON: planned / measured.

On a GPU measured is the most that tensors take together (`torch.cuda.max_memory_allocated`), beside what is there after
a step of the tiny model. Captions fill the context, as they do in a plan. Planned pairs a second are those of
`--hardware` at its `utilisation`; what a step reached instead is said beside them. The time is that of the last steps.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from stopwatch import DEVICES, Device, allocated, seconds

from multimodal.assemble import assemble
from multimodal.batch import Batch
from multimodal.cli import CONF, plain, register_plugins
from multimodal.config import check
from multimodal.optim import parameter_groups
from multimodal.plan import PlanConfig, Planner
from multimodal.step import training_step

ALWAYS = (
    "run.name=measured",
    "evals=[]",
    "checkpoint.best=null",
    "tracker=none",
    "checkpoint.every=never",
)
CPU = ("hardware=cpu", "device=cpu")
SMALL = ("tower@towers.image=vit_tiny", "tower@towers.text=text_transformer_small")
MODELS = {
    "resnet_tiny, 512, fp32": ("precision=fp32", "global_batch_size=512"),
    "vit_tiny, 512, bf16": ("tower@towers.image=vit_tiny", "precision=bf16", "global_batch_size=512"),
    "vit_tiny, 1024 by 256, fp32": (*SMALL, "precision=fp32", "global_batch_size=1024", "micro_batch_size=256"),
}
TINY = ("tower@towers.image=vit_tiny", "towers.image.layers=1", "global_batch_size=8")
LARGE_MODEL = ("architecture=vit_b_32", "precision=bf16")
CHECKPOINTED = ("towers.image.grad_checkpointing=true", "towers.text.grad_checkpointing=true")
ON_A_GPU = {
    "256": ("global_batch_size=256",),
    "256, checkpointed": ("global_batch_size=256", *CHECKPOINTED),
    "1024": ("global_batch_size=1024",),
    "1024, checkpointed": ("global_batch_size=1024", *CHECKPOINTED),
    "1024 by 256": ("global_batch_size=1024", "micro_batch_size=256"),
    "1024 by 256, checkpointed": ("global_batch_size=1024", "micro_batch_size=256", *CHECKPOINTED),
}
STEPS, STEPS_ON_A_GPU = 2, 8
M_MMAP_THRESHOLD, LARGE = -3, 2**16
"""What malloc takes from the system, and gives back to it, by itself; glibc raises it to 32 MiB as it goes."""


def configured(*overrides: str) -> PlanConfig:
    """As scripts/plan.py composes it."""
    register_plugins()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(plain(compose("plan", [*ALWAYS, *overrides])), PlanConfig)


def train(config: PlanConfig, steps: int, device: Device = "cpu") -> list[float]:
    """Steps of the real thing on made-up data; the seconds of each."""
    source = config.dataset.build(Path(config.paths.datasets))
    assembled = assemble(config, source, None)
    model = assembled.model.train()
    tunings = {name: tower.tuning for name, tower in config.towers.items()}
    optimizer = config.optimizer.build(parameter_groups(model, config.optimizer, tunings))
    size = config.micro_batch_size
    assert not isinstance(size, str)
    samples = [source[index] for index in range(8)]
    inputs = {}
    for name, reader in assembled.readers.items():
        rows = torch.stack([reader.preprocessor(sample.inputs[reader.reads], None) for sample in samples])
        inputs[name] = rows.repeat(config.global_batch_size // len(rows), *[1] * (rows.ndim - 1))
    ids = torch.arange(config.global_batch_size)
    batch = Batch(inputs, ids, {"caption": ids}).to(torch.device(device))
    given = batch, assembled.context, config.max_grad_norm, size
    return [
        seconds(device, lambda: training_step(model, config.loss, optimizer, *given, (config.seed, step)))  # noqa: B023
        for step in range(steps)
    ]


def status(key: str) -> int:
    """A number of bytes from what Linux says of this process."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(overrides: tuple[str, ...], holes: bool, answer: Any) -> None:
    """Sends the bytes at the peak of training above those before there was a model."""
    torch.set_num_threads(1)
    if not holes:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    config = configured(*CPU, *overrides)
    train(configured(*CPU, *TINY, f"precision={config.precision}"), 1)
    ctypes.CDLL(None).malloc_trim(0)  # what the tiny model leaves is not there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is counted anew
    before = status("VmRSS")
    train(config, STEPS)
    answer.send(status("VmHWM") - before)


def in_a_process(overrides: tuple[str, ...], holes: bool = False) -> int:
    """The same, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure, args=(overrides, holes, theirs))
    process.start()
    theirs.close()
    found: int = mine.recv()
    process.join()
    return found


class OnAGpu(NamedTuple):
    """What steps took there."""

    memory: int
    pairs_per_s: float


def measure_on_a_gpu(config: PlanConfig, tiny: PlanConfig) -> OnAGpu:
    """The peak above what the tiny model leaves, and the speed of the last steps."""
    train(tiny, 2, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = allocated("cuda")
    torch.cuda.reset_peak_memory_stats()
    taken = train(config, STEPS_ON_A_GPU, "cuda")
    last = statistics.median(taken[STEPS_ON_A_GPU // 2 :])
    return OnAGpu(torch.cuda.max_memory_allocated() - before, config.global_batch_size / last)


def on_a_gpu(quick: bool, hardware: str) -> None:
    """A table, then one line of JSON."""
    always = (f"hardware={hardware}", "device=cuda")
    tiny = configured(*always, *TINY, "precision=bf16")
    ratios = {}
    print(f"{'':28} {'planned':>12} {'measured':>12} {'ratio':>6} {'planned':>10} {'measured':>12} {'of the peak':>12}")
    for name, words in list(ON_A_GPU.items())[: 1 if quick else None]:
        config = configured(*always, *LARGE_MODEL, *words)
        measured = measure_on_a_gpu(config, tiny)
        planner = Planner(config)
        planned, speed = planner.memory(planner.micro_batch_size).peak, planner.samples_per_s()
        ratios[name] = round(planned / measured.memory, 3)
        ratios[f"{name}, pairs/s"] = round(speed / measured.pairs_per_s, 3)
        sizes = f"{planned / 2**20:8.0f} MiB {measured.memory / 2**20:8.0f} MiB {ratios[name]:6.3f}"
        reached = config.utilisation * measured.pairs_per_s / speed
        print(f"{name:28} {sizes} {speed:8.0f}/s {measured.pairs_per_s:10.0f}/s {reached:12.1%}", flush=True)
    print(json.dumps(ratios))


def on_a_cpu(quick: bool) -> None:
    """A table, then one line of JSON."""
    ratios = {}
    print(f"{'model':28} {'planned':>12} {'measured':>12} {'ratio':>6} {'with holes':>12}")
    for name in list(MODELS)[: 1 if quick else None]:
        measured, with_holes = in_a_process(MODELS[name]), in_a_process(MODELS[name], holes=True)
        planner = Planner(configured(*CPU, *MODELS[name]))
        planned = planner.memory(planner.micro_batch_size).peak
        ratios[name] = round(planned / measured, 3)
        sizes = f"{planned / 2**20:8.1f} MiB {measured / 2**20:8.1f} MiB {ratios[name]:6.3f}"
        print(f"{name:28} {sizes} {with_holes / 2**20:8.1f} MiB", flush=True)
    print(json.dumps(ratios))


def main() -> None:
    """Print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first model only")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cpu unless told")
    parser.add_argument("--hardware", default="h100", help="what a GPU is planned as, of conf/hardware")
    asked = parser.parse_args()
    if asked.device == "cuda":
        on_a_gpu(asked.quick, asked.hardware)
    else:
        on_a_cpu(asked.quick)


if __name__ == "__main__":
    main()

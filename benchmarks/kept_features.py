"""Training with a frozen image tower whose features are kept, against the same frozen tower and against none frozen.

Runs the three in turn, several rounds, on `shapes` (or any experiment), and prints the medians of samples per second
in steady state and their ratios. What computing the features takes is printed beside: it is paid once.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from multimodal.cli import CONF, plain
from multimodal.config import TrainConfig, check

VARIANTS = {
    "unfrozen": [],
    "frozen": ["towers.image.tuning.frozen=all"],
    "kept": ["towers.image.tuning.frozen=all", "towers.image.tuning.keep_features=true"],
}


def measure(overrides: list[str], steps: int, runs: str) -> tuple[float, float]:
    """Samples per second of the later half of a run, and the seconds before its first step."""
    from multimodal.trainer import Trainer

    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [*overrides, f"duration={steps}steps", f"paths.runs={runs}"])
    config = check(plain(composed), TrainConfig)
    trainer, started = Trainer(config), time.monotonic()
    trainer.run()
    whole = time.monotonic() - started
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/samples_per_s"] for row in rows if "train/samples_per_s" in row]
    trained = sum(config.global_batch_size / rate for rate in rates)
    return statistics.median(rates[len(rates) // 2 :]), whole - trained


def main() -> None:
    """Print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("overrides", nargs="*", help="of the experiment, such as experiment=cifar10_tiny")
    asked = parser.parse_args()
    rounds, steps, size = (1, 12, 512) if asked.quick else (5, 40, 4096)
    logging.disable(logging.WARNING)
    os.environ["WANDB_MODE"] = "disabled"
    common = ["tracker=none", "evals=[]", "checkpoint.best=null", "checkpoint.every=never", "log.every=1steps"]
    if not any(word.startswith(("experiment=", "dataset")) for word in asked.overrides):
        common.append(f"dataset.size={size}")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as runs:
        for number in range(rounds):
            for name, changes in VARIANTS.items():
                name_of_run = f"run.name={name}-{number}"
                found[name].append(measure([*common, *asked.overrides, *changes, name_of_run], steps, str(Path(runs))))
    rates = {name: statistics.median(rate for rate, _ in measured) for name, measured in found.items()}
    for name, rate in rates.items():
        before = statistics.median(seconds for _, seconds in found[name])
        print(f"{name:9} {rate:9.1f} samples/s  {rate / rates['unfrozen']:5.2f}x  {before:6.1f} s outside of steps")
    ratios = {
        name: statistics.median(
            ours / theirs for (ours, _), (theirs, _) in zip(found[name], found["unfrozen"], strict=True)
        )
        for name in ("frozen", "kept")
    }
    print(json.dumps({f"{name}/unfrozen": round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()

"""How long training stands still at a checkpoint: written in the background, and waited for.

    uv run python benchmarks/saving.py                            # ViT-B-32 with AdamW, 151 M parameters
    uv run python benchmarks/saving.py --quick                    # two blocks, one round
    uv run python benchmarks/saving.py architecture=vit_l_14

Both ways in turn, in one process, by the trainer's own loop on random images: after a first step each checkpoint is
begun at every fourth, so that it is written while three others are taken. Wall time, with the medians (and range) of
rounds: what a save takes in the loop, and what the whole round takes, its last write included. Ends in one line of
JSON: waited for / in the background.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time

from hydra import compose, initialize_config_dir

from multimodal.cli import CONF, plain
from multimodal.config import TrainConfig, check
from multimodal.trainer import Trainer

WAYS = {"waited for": False, "background": True}
ALWAYS = (
    *("tracker=none", "evals=[]", "checkpoint.best=null", "checkpoint.every=4steps", "checkpoint.keep=1"),
    *("log.every=4steps", "duration=9steps", "warmup=1steps", "global_batch_size=8", "dataset.size=64", "workers=0"),
)
SMALL = ("towers.image.layers=1", "towers.text.layers=1", "global_batch_size=2", "duration=5steps")


class Timed(Trainer):
    """Notes how long each save takes in the loop."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.saves: list[float] = []
        self.begun = 0.0

    def _save(self, best: bool) -> None:
        begun = time.monotonic()
        super()._save(best)
        self.saves.append(time.monotonic() - begun)

    def _loop(self, batches: object) -> None:
        self.begun = time.monotonic()
        super()._loop(batches)  # type: ignore[arg-type]
        self.whole = time.monotonic() - self.begun


def told(found: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(found):6.2f} s ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    """Print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, one round")
    parser.add_argument("overrides", nargs="*", default=["architecture=vit_b_32"], help="of the experiment")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    saves: dict[str, list[float]] = {way: [] for way in WAYS}
    wholes: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(1 if asked.quick else 3):
        for way, background in WAYS.items():
            with tempfile.TemporaryDirectory() as runs, initialize_config_dir(str(CONF), version_base="1.3"):
                names = [f"paths.runs={runs}", f"run.name=saving{number}", f"checkpoint.background={background}"]
                one = Timed(
                    check(
                        plain(compose("train", [*asked.overrides, *ALWAYS, *(SMALL if asked.quick else ()), *names])),
                        TrainConfig,
                    )
                )
                one.run()
            saves[way] += one.saves[:-1]  # the last one is at the end
            wholes[way].append(one.whole)
    parameters = sum(p.numel() for p in one.model.parameters())
    print(f"{parameters / 1e6:.0f} M parameters")
    for way in WAYS:
        print(f"{way:11} a save {told(saves[way])}   all steps and saves {told(wholes[way])}")
    ratios = {
        name: round(statistics.median(found["waited for"]) / statistics.median(found["background"]), 2)
        for name, found in (("save", saves), ("whole", wholes))
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()

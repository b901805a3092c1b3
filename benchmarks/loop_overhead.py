"""What training costs outside of its steps: data, votes, the log, checkpoints.

    uv run python benchmarks/loop_overhead.py                        # flickr8k_tiny, 200 steps
    uv run python benchmarks/loop_overhead.py --quick                # 30 steps
    uv run python benchmarks/loop_overhead.py experiment=shapes_tiny

The trainer's own loop, in one thread, in seconds of the processor: a log entry every 10 steps, a checkpoint every 50,
no evaluation. What the thread that writes checkpoints takes counts too (write). A few batches are read before and given
again and again, as if from a cache, so that reading is not in it. The first steps are left out. Ends in one line of
JSON: the share of the time that is outside of steps, by part.
"""

import argparse
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from multimodal import trainer
from multimodal.batch import Batch
from multimodal.cli import CONF, plain
from multimodal.config import TrainConfig, check

CACHED, WARMUP = 4, 5
ALWAYS = ("tracker=none", "evals=[]", "checkpoint.best=null", "log.every=10steps", "checkpoint.every=50steps")


class Timed(trainer.Trainer):
    """Counts the processor's seconds by the names of the loop's spans, and in steps."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.seconds: Counter[str] = Counter()
        self.started = self.mine = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds up what is done inside."""
        started = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - started

    def _batches(self) -> Generator[Batch, None, None]:
        read = super()._batches()
        cached = list(islice(read, CACHED))
        read.close()
        yield from cycle(cached)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        if self.state.step == WARMUP:
            self.seconds.clear()
            self.started, self.mine = time.process_time(), time.thread_time()
        with self.span("step"):
            return super()._step(batch)

    def _loop(self, batches: Iterator[Batch]) -> None:
        super()._loop(batches)
        self.seconds["whole"] = time.process_time() - self.started
        self.seconds["write"] = self.seconds["whole"] - (time.thread_time() - self.mine)  # the other thread's


def main() -> None:
    """Print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("overrides", nargs="*", default=["experiment=flickr8k_tiny"], help="of the experiment")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    steps = 30 if asked.quick else 200
    with tempfile.TemporaryDirectory() as runs:
        words = [
            *asked.overrides,
            *ALWAYS,
            f"duration={steps}steps",
            f"paths.runs={runs}",
            "run.name=loop",
            "workers=0",
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            one = Timed(check(plain(compose("train", words)), TrainConfig))
        spans: Any = one.span
        trainer.span = spans  # type: ignore[misc]
        one.run()
    whole = one.seconds.pop("whole")
    step = one.seconds.pop("step")
    shares = {name: taken / whole for name, taken in one.seconds.most_common()}
    outside = 1 - step / whole
    print(f"a step takes {1e3 * step / (steps - WARMUP):.1f} ms of the processor; outside of it, of all:")
    for name, share in {**shares, "rest": outside - sum(shares.values())}.items():
        print(f"  {name:8} {share:7.2%}")
    print(json.dumps({"outside": round(outside, 4), **{name: round(share, 5) for name, share in shares.items()}}))


if __name__ == "__main__":
    main()

"""Kill a tiny run again and again, often inside its writes, and hold what it ends with against a run left alone.

    python tests/kills.py --kills 100

A life is a fork of this process, which has imported everything already. A third of the kills come at a random time,
the others when a checkpoint is being written or deleted; what a kill leaves behind says which hit. After each one all
checkpoints must be sound, the best must be marked if it was, and of the newest ones that were to be kept none may be
gone but for as many newer ones. At the end weights, their mean, optimizer, state and
all numbers of the log but clocks must be equal to the last bit.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, composed
from safetensors.torch import load_file

from multimodal import checkpoint, journal, trainer
from multimodal.config import TrainConfig, check

STEPS = 60
RUN = [
    *(word for word in TINY if not word.startswith(("evals=", "duration=", "checkpoint.", "run.name="))),
    f"duration={STEPS}steps",
    "ema.decay=0.9",
    "towers.image.patch_dropout=0.5",
    "augment=crop_flip",
    "evals=[shapes]",
    "evals.shapes.dataset.size=16",
    "evals.shapes.allow_empty_classes=true",
    "evals.shapes.every=10steps",
    "checkpoint.every=2steps",
    "checkpoint.keep=2",
    "checkpoint.best=eval/shapes/top1",
]
LONGEST = 240.0
"""Seconds that a life may take."""
WRITES, DELETIONS = ".partial-step", ".partial-old"
"""What the names begin with that a kill there leaves behind."""
CLOCKS = ("train/samples_per_s", "train/data_wait")


def configuration(runs: Path, name: str) -> TrainConfig:
    return check(composed(*RUN, f"run.name={name}", f"paths.runs={runs}"), TrainConfig)


def begin(config: TrainConfig, log: Path) -> int:
    """A process that runs what is configured, and ends with a status that says whether it could; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()  # it is killed together with its data workers
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        trainer.run_folder.provenance.facts = dict  # git, and figures, take longer than such a run
        trainer.run_folder.provenance.uncommitted = str
        journal.figures.curves = lambda _: Picture()
        trainer.Trainer(config).run()
        log.with_suffix(".modules").write_text(json.dumps(sorted(sys.modules)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Picture:
    """Of nothing."""

    def savefig(self, path: Path, dpi: int) -> None:
        path.touch()


def ended(pid: int) -> bool:
    """Whether a life is over by itself; an error ends this program too."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found and status:
        raise AssertionError(f"a run ended with status {status}")
    return found != 0


def to_the_end(pid: int) -> bool:
    """Wait until a life is over by itself."""
    since = time.monotonic()
    while not ended(pid):
        assert time.monotonic() - since < LONGEST
        time.sleep(0.02)
    return True


def hidden(folder: Path) -> list[str]:
    """Names that only exist while a checkpoint is written, replaced or deleted."""
    with suppress(FileNotFoundError):
        return [name for name in os.listdir(folder / checkpoint.FOLDER) if name.startswith(".")]
    return []


def wait(pid: int, folder: Path, draw: random.Random, life: float) -> bool:
    """Until the moment of a kill; whether the run ended before."""
    until = time.monotonic() + draw.uniform(0, life)
    aimed = draw.choice((None, WRITES, DELETIONS))
    while time.monotonic() < until:
        if ended(pid):
            return True
        time.sleep(0.001)
    while aimed and not any(name.startswith(aimed) for name in hidden(folder)):
        if ended(pid):
            return True
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.01) if aimed == WRITES else 0)
    return ended(pid)


def outcome(config: TrainConfig) -> dict[str, Any]:
    """All that a run has computed."""
    folder = checkpoint.find(config.folder)
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    state = checkpoint.load_state(folder).model_dump(exclude={"run_id", "log_bytes"})
    return {
        **{name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")},
        "rows": [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows],
        "state": state,
        "best": checkpoint.find(config.folder, "best").name,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Which results are not equal to the last bit."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, dict) and any(isinstance(value, torch.Tensor) for value in x.values()):
            return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        return bool(x == y)

    return [name for name in one if not same(one[name], other[name])]


def kill_and_compare(runs: Path, kills: int, seed: int) -> Counter[str]:
    """Where the kills hit, and in how many runs; AssertionError if one lost something, or computed otherwise."""
    draw, found = random.Random(seed), Counter[str]()
    log = runs / "log.txt"
    whole, killed = configuration(runs, "whole"), configuration(runs, "killed")
    to_the_end(begin(whole, log))
    for module in json.loads(log.with_suffix(".modules").read_text()):
        with suppress(Exception):
            importlib.import_module(module)
    shutil.rmtree(whole.folder)
    begun = time.monotonic()
    to_the_end(begin(whole, log))
    life = (time.monotonic() - begun) / 2
    expected, before, had_best = outcome(whole), list[int](), False
    while True:
        config = killed.model_copy(update={"workers": found["kills"] % 2})
        pid = begin(config, log)
        if wait(pid, config.folder, draw, life) if found["kills"] < kills else to_the_end(pid):
            assert (wrong := differences(outcome(config), expected)) == [], wrong
            assert hidden(config.folder) == []
            found["runs"] += 1
            before, had_best = [], False
            shutil.rmtree(config.folder)
            if found["kills"] >= kills:
                return found
            continue
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found["kills"] += 1
        left = hidden(config.folder)
        found["inside a write"] += any(name.startswith(WRITES) for name in left)
        found["inside a deletion"] += any(name.startswith(DELETIONS) for name in left)
        saved = checkpoint.steps(config.folder)
        found["before the first checkpoint"] += not saved
        for step in saved:
            checkpoint.verify(checkpoint.step_folder(config.folder, step))
        keep = config.checkpoint.keep
        gone = [step for step in before[-keep:] if step not in saved and sum(other > step for other in saved) < keep]
        assert not gone, f"{gone} were saved, and are gone: {before}, then {saved}"
        has_best = (config.folder / checkpoint.FOLDER / checkpoint.BEST).exists()  # it is a link
        assert has_best or not had_best, "the best was marked, and is no more"
        before, had_best = saved, has_best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(kill_and_compare(Path(place), asked.kills, asked.seed)))

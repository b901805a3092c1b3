"""Two runs at once against one after the other, on this machine's cores: what `hydra/launcher=joblib` gains.

    uv run python benchmarks/grids.py                  # two runs of shapes_tiny, 100 steps each
    uv run python benchmarks/grids.py --quick          # 5 steps each, where starting takes most of the time

Both ways by `train.py -m`, in turn. Wall time of the whole grid, which includes that every run starts a program, with
the threads that each run had: one after the other it has all cores, at once its share. Ends in one line of JSON: one
after the other / two at once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {"one after the other": 1, "two at once": 2}
ALWAYS = ("tracker=none", "evals=[]", "checkpoint.best=null", "checkpoint.every=never", "workers=0", "seed=1,2")


def run(n_jobs: int, steps: int, runs: Path) -> float:
    """Seconds that a grid of two runs takes."""
    train = [sys.executable, str(Path(__file__).parent.parent / "train.py"), "-m", "hydra/launcher=joblib"]
    words = [f"hydra.launcher.n_jobs={n_jobs}", f"duration={steps}steps", f"paths.runs={runs}", *ALWAYS]
    free = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    begun = time.monotonic()
    subprocess.run([*train, *words], check=True, env=free, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def threads(runs: Path) -> list[int]:
    """Of each run."""
    return [json.loads(path.read_text())[-1]["threads"] for path in sorted(runs.glob("*/environment.json"))]


def main() -> None:
    """Print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, one round")
    quick = parser.parse_args().quick
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 if quick else 3):
        for way, n_jobs in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[way].append(run(n_jobs, 5 if quick else 100, Path(folder)))
                had = threads(Path(folder))
            print(f"{way:20} {seconds[way][-1]:6.1f} s, threads {' and '.join(map(str, had))}", flush=True)
    before, after = (statistics.median(found) for found in seconds.values())
    print(json.dumps({"two_at_once": round(before / after, 2)}))


if __name__ == "__main__":
    main()

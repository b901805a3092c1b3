"""Peak memory of retrieval: `uv run python benchmarks/retrieval_memory.py [50000]`; evaluation.py runs it too.

So many images and captions of 512 dimensions, ranked both ways with all metrics and intervals, on one thread, in a
process that has loaded nothing else; torch by itself takes half a GiB. Ends in one line of JSON.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from multimodal.evals.ranking import Matches, rank_metrics, ranked

DIMS = 512


def main() -> None:
    """Print R@1, which is near 1, and the peak in GiB."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = F.normalize(torch.randn(count, DIMS), dim=1)
    texts = F.normalize(images + 0.1 * torch.randn(count, DIMS), dim=1)
    places = torch.arange(count)
    matches = Matches.of(places, places, places)
    for queries, items, right in ((images, texts, matches), (texts, images, matches.reversed)):
        found = rank_metrics(*ranked(queries, items, right), right.counts, count)
        print(f"{count:,} x {count:,}: R@1 {found['r1'].value:.4f}")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"retrieval_peak_gib": round(int(status["VmHWM"].split()[0]) / 2**20, 3)}))


if __name__ == "__main__":
    main()
